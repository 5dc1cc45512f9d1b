import json
import math
import subprocess
import sys
import time

import pytest

from hourjax.training.trackers import Events
from tests.training.event_files import curves, read_events

CONFIG = {"model": {"layers": 36}, "seed": 0}


def _write(folder, start, points):
  events = Events(folder, start=start, config=CONFIG)
  for step, value in points.items():
    events.write(step, {"train/loss": value, "speed/mfu": 0.5})
  events.close()


def test_torch_is_not_imported_for_it():
  """tensorboardX would, where there is one: seconds of every start."""
  code = "import sys; import hourjax.train; assert 'torch' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_scalars_and_the_configuration(tmp_path):
  began = time.time()
  _write(tmp_path / "tensorboard", 0, {1: 2.5, 20: -0.125})
  first, *events = read_events(tmp_path / "tensorboard")
  assert first["file_version"] == "brain.Event:2"
  assert all(began <= x["wall_time"] <= time.time() for x in [first, *events])
  shown = curves(events)
  assert shown["train/loss"] == {1: 2.5, 20: -0.125}
  assert shown["speed/mfu"] == {1: 0.5, 20: 0.5}
  (config,) = shown["config/text_summary"].values()
  assert config.startswith("```json\n{\n") and config.endswith("\n```")
  assert json.loads(config.strip("`").removeprefix("json")) == CONFIG


def test_steps_that_are_taken_again_replace_the_first_ones(tmp_path):
  # Starts within one second each have a file of their own.
  _write(tmp_path, 0, {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0})
  _write(tmp_path, 2, {3: 2.5})
  _write(tmp_path, 2, {3: 2.25, 4: 1.5})
  assert len(list(tmp_path.iterdir())) == 3
  shown = curves(read_events(tmp_path))
  assert shown["train/loss"] == {1: 4.0, 2: 3.0, 3: 2.25, 4: 1.5}
  # Every step after the checkpoint goes, also one that is not logged again.
  _write(tmp_path, 2, {4: 1.25})
  shown = curves(read_events(tmp_path))
  assert shown["train/loss"] == {1: 4.0, 2: 3.0, 4: 1.25}


def test_what_a_kill_leaves_can_be_read(tmp_path):
  events = Events(tmp_path, start=0, config=CONFIG)
  events.write(1, {"train/loss": 1.0})
  assert read_events(tmp_path)[-1]["values"] == {"train/loss": 1.0}
  events.close()


def test_numbers_that_are_not_finite(tmp_path):
  _write(tmp_path, 0, {1: math.nan, 2: math.inf})
  losses = curves(read_events(tmp_path))["train/loss"]
  assert math.isnan(losses[1]) and losses[2] == math.inf


def test_the_reader_sees_damage(tmp_path):
  _write(tmp_path, 0, {1: 1.0})
  (path,) = tmp_path.iterdir()
  content = bytearray(path.read_bytes())
  content[-7] ^= 1
  path.write_bytes(content)
  with pytest.raises(AssertionError):
    read_events(tmp_path)
