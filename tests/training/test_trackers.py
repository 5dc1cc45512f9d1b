"""TensorBoard's files, and W&B: offline (the real package) and as a fake."""

import importlib.util
import json
import math
import subprocess
import sys
import time
import types

import pytest

from hourjax.errors import UserError
from hourjax.training.trackers import (
  TensorBoardWriter,
  WandbWriter,
  require_wandb,
)
from tests.training.event_files import curves, read_events

CONFIG = {"model": {"layers": 36}, "seed": 0}


def _write(folder, start, points):
  events = TensorBoardWriter(folder, start=start, config=CONFIG)
  for step, value in points.items():
    events.write(step, {"train/loss": value, "speed/mfu": 0.5})
  events.close()


@pytest.mark.slow
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
  events = TensorBoardWriter(tmp_path, start=0, config=CONFIG)
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


class FakeWandb(types.ModuleType):
  """As much of wandb as is used; init refuses, or log fails."""

  class Error(Exception):
    pass

  def __init__(self, *, refuses=False):
    super().__init__("wandb")
    self.__spec__ = importlib.util.spec_from_loader("wandb", None)
    self.errors = types.SimpleNamespace(Error=self.Error)
    self.refuses, self.calls, self.given = refuses, [], {}

  def Settings(self, **values):
    return values

  def init(self, **given):
    if self.refuses:
      raise self.Error("no API key")
    self.given = given
    return self

  def log(self, values, step):
    self.calls.append((step, values))
    raise ConnectionError("gone")

  def finish(self):
    self.calls.append("finish")


def test_wandb_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError) as error:
    require_wandb("hours")
  assert "config.metrics.wandb is 'hours'" in str(error.value)
  assert "`pip install -e '.[wandb]'`" in str(error.value)


def test_wandb_refuses(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuses=True))
  with pytest.raises(UserError, match="W&B says: no API key; run `wandb login"):
    WandbWriter("hours", tmp_path, CONFIG)


def test_a_failure_of_wandb_is_said_once_and_ends_it(
  monkeypatch, tmp_path, capsys
):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  run = WandbWriter("hours", tmp_path / ".", CONFIG)
  assert fake.given["project"] == "hours" and fake.given["config"] == CONFIG
  assert fake.given["name"] == tmp_path.name
  assert fake.given["resume"] == "allow"
  for step in range(5):
    run.write(step, {"train/loss": 1.0})
  run.close()
  run.close()
  assert fake.calls == [(0, {"train/loss": 1.0})]
  error = capsys.readouterr().err
  assert error.count("W&B gets nothing more") == 1 and "gone" in error


@pytest.mark.slow
def test_wandb_offline_and_resumed(monkeypatch, tmp_path):
  for name, value in [("MODE", "offline"), ("SILENT", "true")]:
    monkeypatch.setenv(f"WANDB_{name}", value)
  monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
  monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
  workdir = tmp_path / "run"
  workdir.mkdir()
  for values in ({1: 2.5, 2: 2.25}, {2: 2.25, 3: 2.0}):
    run = WandbWriter("hours", workdir, CONFIG)
    for step, loss in values.items():
      run.write(step, {"train/loss": loss})
    run.close()
  (name,) = (workdir / "wandb_id.txt").read_text().split()
  runs = sorted((workdir / "wandb").glob(f"offline-run-*-{name}/*.wandb"))
  # One id: `wandb sync` puts both starts into one run.
  assert [path.name for path in runs] == [f"run-{name}.wandb"] * len(runs)
  written = b"".join(path.read_bytes() for path in runs)
  assert b"train/loss" in written and b"2.25" in written
  assert b"layers" in written and b"hours" in written
