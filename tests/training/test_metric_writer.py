"""What a logged step leaves in which file, and what is read back of it."""

import builtins
import dataclasses
import errno
import io
import json
import math
import os
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.errors import UserError
from hourjax.training import metric_writer
from hourjax.training.metric_writer import (
  MetricsConfig,
  MetricsFile,
  MetricWriter,
  read_curve,
  read_metrics,
)
from tests.training.event_files import curves, read_events


class Clock:
  now = 1000.0

  def __call__(self):
    return self.now


SUMS = {
  "steps": 5, "samples": 640, "rows": 95, "micro_batches": 8, "tokens": 3000,
  "video_seconds": 7200.0, "flops": 4e15,
}  # fmt: skip


def _writer(workdir, config=None, **changed):
  options = {"run_config": {"seed": 7}, "steps": 100, "start": 0,
             "flops_per_second": 1e15, **changed}  # fmt: skip
  return MetricWriter(workdir, config or MetricsConfig(), **options)


def _wrote(writer, step, **changed):
  options = {
    "scalars": {"loss": 2.5, "grad_norm": 0.5, "grad_norm/memaug": 0.25},
    "sums": SUMS,
    "data_wait": 2.0,
    "learning_rates": {"memaug": 1e-4, "decoder": 2e-5},
    "counts": {"unread_damaged": 3},
    **changed,
  }
  writer.write(step, options.pop("scalars"), **options)


def _logged(workdir):
  return curves(read_events(workdir / "tensorboard"))


def test_the_values(tmp_path, capsys):
  clock = Clock()
  writer = _writer(tmp_path, clock=clock)
  clock.now += 4
  writer.add_lost(4, "restore")
  for step in range(1, 6):
    writer.begin_step(step)
    clock.now += 2
    if step == 1:
      clock.now += 20
      writer.add_lost(20, "compile")
  _wrote(writer, 5)
  writer.close()
  (row,) = read_metrics(tmp_path)
  # Five steps of 2 s; what was lost is not theirs.
  assert row == {
    "step": 5,
    "loss": 2.5,
    "grad_norm": 0.5,
    "grad_norm/memaug": 0.25,
    "tokens": 3000,
    "learning_rate/memaug": 1e-4,
    "learning_rate/decoder": 2e-5,
    "step_seconds": 2.0,
    "tokens_per_second": 300.0,
    "video_hours_per_second": pytest.approx(0.2),
    "mfu": pytest.approx(0.4),
    "samples_per_step": 128,
    "rows_per_step": 19,
    "micro_batches_per_step": 1.6,
    "tokens_per_step": 600,
    "video_hours_per_step": 0.4,
    "data_wait": 0.2,
    "goodput": pytest.approx(10 / 34),
    "lost_seconds/restore": 4,
    "lost_seconds/compile": 20,
    "unread_damaged": 3,
  }
  shown = _logged(tmp_path)
  assert '"seed": 7' in shown.pop("config/text_summary")[0]
  float32 = {tag: np.float32(v[5]) for tag, v in shown.items()}
  assert float32 == {
    "train/loss": np.float32(2.5),
    "train/grad_norm": np.float32(0.5),
    "grad_norm/memaug": np.float32(0.25),
    "train/tokens": np.float32(3000),
    "learning_rate/memaug": np.float32(1e-4),
    "learning_rate/decoder": np.float32(2e-5),
    "speed/step_seconds": np.float32(2),
    "speed/tokens_per_second": np.float32(300),
    "speed/video_hours_per_second": np.float32(0.2),
    "speed/mfu": np.float32(0.4),
    "step/samples_per_step": np.float32(128),
    "step/rows_per_step": np.float32(19),
    "step/micro_batches_per_step": np.float32(1.6),
    "step/tokens_per_step": np.float32(600),
    "step/video_hours_per_step": np.float32(0.4),
    "time/data_wait": np.float32(0.2),
    "time/goodput": np.float32(10 / 34),
    "lost_seconds/restore": np.float32(4),
    "lost_seconds/compile": np.float32(20),
    "skipped/unread_damaged": np.float32(3),
  }
  # 95 more steps of 2 s: it compiles no more.
  assert capsys.readouterr().err == (
    "step 5/100  loss 2.500  grad norm 0.50  2 s/step  0:03:10 left"
    "  MFU 40.0%  0.2 video h/s\n"
  )


def test_values_since_the_last_call(tmp_path):
  clock = Clock()
  writer = _writer(tmp_path, clock=clock, start=20)
  for step in range(21, 41):
    writer.begin_step(step)
    clock.now += 1 if step <= 30 else 3
    if step in (30, 40):
      _wrote(writer, step)
    if step == 30:
      clock.now += 5
      writer.add_lost(5, "save")
  writer.close()
  first, second = read_metrics(tmp_path)
  assert (first["step_seconds"], second["step_seconds"]) == (1, 3)
  assert (first["mfu"], second["mfu"]) == pytest.approx((0.4, 4 / 30))
  assert second["goodput"] == pytest.approx(40 / 45)


def test_what_is_not_known_is_left_out(tmp_path):
  """No peak of CPUs, no memory statistics: no zeros either."""
  writer = _writer(tmp_path, flops_per_second=None)
  writer.begin_step(1)
  sums = SUMS | {"video_seconds": 0}
  _wrote(writer, 1, learning_rates={}, counts={}, sums=sums)
  writer.close()
  (row,) = read_metrics(tmp_path)
  assert not {"mfu", "hbm_gib", "hbm_peak_gib"} & row.keys()
  assert row["video_hours_per_second"] == 0


def test_memory_of_devices_that_know_it(tmp_path, monkeypatch):
  device = types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 2**31})
  monkeypatch.setattr(metric_writer.jax, "local_devices", lambda: [device])
  writer = _writer(tmp_path)
  _wrote(writer, 1)
  writer.close()
  assert read_metrics(tmp_path)[0]["hbm_gib"] == 2
  assert _logged(tmp_path)["memory/hbm_gib"] == {1: 2.0}


def test_arrays_and_numbers_that_are_not_finite(tmp_path):
  """As they come from the device; the step's own tokens come before sums."""
  writer = _writer(tmp_path)
  scalars = {"loss": jnp.float32(math.nan), "grad_norm": np.float32(math.inf),
             "tokens": np.int32(5)}  # fmt: skip
  _wrote(writer, 1, scalars=scalars)
  writer.close()
  (row,) = read_metrics(tmp_path)
  assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf
  assert row["tokens"] == 5
  assert math.isnan(_logged(tmp_path)["train/loss"][1])


def test_started_again_from_a_checkpoint(tmp_path):
  clock = Clock()
  for start, last in [(0, 5), (3, 6)]:
    writer = _writer(tmp_path, start=start, clock=clock)
    for step in range(start + 1, last + 1):
      writer.begin_step(step)
      clock.now += 10
      _wrote(writer, step, scalars={"loss": step + start})
    writer.close()
    clock.now += 20
  rows = read_metrics(tmp_path)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
  losses = {row["step"]: row["loss"] for row in rows}
  assert losses == {1: 1, 2: 2, 3: 3, 4: 7, 5: 8, 6: 9}
  assert _logged(tmp_path)["train/loss"] == losses
  # Two steps twice and 20 s without a process, of 100 s.
  assert rows[-1]["goodput"] == pytest.approx(0.6)
  assert rows[-1]["lost_seconds/recomputed"] == 20
  assert rows[-1]["lost_seconds/down"] == 20


def test_closing_twice(tmp_path):
  writer = _writer(tmp_path)
  writer.begin_step(1)
  writer.close()
  writer.close()
  writer.add_lost(1, "save")  # a save that ends later is not an error
  _wrote(writer, 1)
  assert not read_metrics(tmp_path)


def test_other_hosts_write_nothing(tmp_path, capsys):
  config = MetricsConfig(profile_steps="1:3")
  writer = _writer(tmp_path, config, primary=False)
  writer.begin_step(1)
  _wrote(writer, 1)
  writer.add_lost(1, "save")
  writer.close()
  assert not list(tmp_path.iterdir())
  captured = capsys.readouterr()
  assert not captured.err + captured.out


def test_without_tensorboard(tmp_path):
  writer = _writer(tmp_path, MetricsConfig(tensorboard=False))
  _wrote(writer, 1)
  writer.close()
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"metrics.jsonl", "goodput.jsonl"}


def test_wandb_gets_the_same(tmp_path, monkeypatch):
  made = []

  class Run:
    def __init__(self, *arguments):
      self.arguments, self.written = arguments, []
      made.append(self)

    def write(self, step, values):
      self.written.append((step, values))

    def close(self):
      self.written.append("closed")

  monkeypatch.setattr(metric_writer, "WandbWriter", Run)
  writer = _writer(tmp_path, MetricsConfig(wandb="hours"))
  _wrote(writer, 1)
  writer.close()
  (run,) = made
  assert run.arguments == ("hours", tmp_path, {"seed": 7})
  (step, values), closed = run.written
  assert (step, closed) == (1, "closed")
  shown = _logged(tmp_path)
  assert values.keys() == shown.keys() - {"config/text_summary"}
  assert values["train/loss"] == 2.5


@pytest.mark.parametrize("primary", [True, False])
def test_wandb_missing_stops_every_host(tmp_path, monkeypatch, primary):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="package wandb is not installed"):
    _writer(tmp_path, MetricsConfig(wandb="hours"), primary=primary)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("primary", [True, False])
def test_a_trace_outside_the_run(tmp_path, primary):
  config = MetricsConfig(profile_steps="99:103")
  with pytest.raises(UserError) as error:
    _writer(tmp_path, config, primary=primary)
  assert str(error.value) == (
    "config.metrics.profile_steps is 99:103, which asks for step 102, but the"
    " run ends with step 100; choose steps of the run"
  )


def test_a_trace_up_to_the_last_step(tmp_path):
  writer = _writer(tmp_path, MetricsConfig(profile_steps="2:4"), steps=3)
  for step in (1, 2, 3):
    writer.begin_step(step)
  writer.close()
  assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_trace_that_an_earlier_start_took(tmp_path, capsys):
  config = MetricsConfig(profile_steps="10:12")
  writer = _writer(tmp_path, config, start=11)
  writer.begin_step(12)
  writer.close()
  assert not (tmp_path / "profile").exists()
  assert "no trace: the steps 10 to 11" in capsys.readouterr().err


def test_a_trace_takes_no_time_from_steps(tmp_path, monkeypatch):
  clock = Clock()

  def slow(*_):
    clock.now += 50

  writer = _writer(tmp_path, MetricsConfig(profile_steps="2:3"), clock=clock)
  monkeypatch.setattr(writer._profiler, "_start", slow)
  monkeypatch.setattr(metric_writer.jax, "local_devices", list)
  monkeypatch.setattr("time.monotonic", clock)
  for step in (1, 2, 3):
    writer.begin_step(step)
    clock.now += 2
  _wrote(writer, 3)
  writer.close()
  assert read_metrics(tmp_path)[0]["lost_seconds/profile"] >= 50
  assert read_metrics(tmp_path)[0]["step_seconds"] == pytest.approx(2)


def test_config_of_a_trace():
  with pytest.raises(UserError, match=r"config\.metrics\.profile_steps is '9'"):
    dataclasses.replace(MetricsConfig(), profile_steps="9")


def test_a_full_disk_does_not_stop_the_run(tmp_path, capsys):
  writer = _writer(tmp_path)

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  files = [writer._metrics._writer, writer._goodput._writer]
  files.append(writer._writers["TensorBoard's events"])
  opened = [thing._file for thing in files]
  for thing in files:
    thing._file = types.SimpleNamespace(write=full, flush=full, close=full)
  for step in range(1, 4):
    writer.begin_step(step)
    _wrote(writer, step)
    writer.add_lost(0.1, "save")
  error = capsys.readouterr().err
  for name in ("metrics.jsonl", "goodput.jsonl", "TensorBoard's events"):
    assert error.count(f"warning: {name} could not be written") == 1
  # Space again.
  for thing, file in zip(files, opened):
    thing._file = file
  _wrote(writer, 4)
  writer.close()
  assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
  assert list(_logged(tmp_path)["train/loss"]) == [4]


def test_no_step_opens_a_file(tmp_path, monkeypatch):
  """A step costs the same however long the run is: nothing is read again."""
  opened = []

  def spy(real):
    def call(path, *args, **options):
      opened.append(path)
      return real(path, *args, **options)

    return call

  for module in (builtins, io, os):
    monkeypatch.setattr(module, "open", spy(module.open))
  writer = _writer(tmp_path, steps=300)
  assert opened
  opened.clear()
  for step in range(1, 301):
    writer.begin_step(step)
    if step % 10 == 0:
      _wrote(writer, step)
  assert opened == []
  writer.close()
  assert len(read_metrics(tmp_path)) == 30
  # Nor does a resumed run read more than once what is there.
  counts = []
  for start in (20, 295):
    opened.clear()
    _writer(tmp_path, steps=300, start=start).close()
    counts.append(len(opened))
  assert counts[0] == counts[1]


def _write(workdir, start, steps):
  metrics = MetricsFile(workdir, start=start)
  for step in steps:
    metrics.write(step, {"loss": step / 2})
  metrics.close()


def _steps(workdir):
  return [row["step"] for row in read_metrics(workdir)]


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
  _write(tmp_path, 0, [1, 10, 20, 30])
  _write(tmp_path, 20, [])
  assert _steps(tmp_path) == [1, 10, 20]
  _write(tmp_path, 20, [30])
  assert _steps(tmp_path) == [1, 10, 20, 30]
  assert read_metrics(tmp_path)[-1] == {"step": 30, "loss": 15.0}


def test_a_torn_line_is_dropped(tmp_path):
  _write(tmp_path, 0, [1, 2])
  path = tmp_path / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 3, "lo')
  assert _steps(tmp_path) == [1, 2]
  _write(tmp_path, 2, [3])
  assert [json.loads(x)["step"] for x in path.open()] == [1, 2, 3]


def test_a_kill_at_the_start_loses_nothing(tmp_path, monkeypatch):
  """The old lines stay until the new file is whole."""
  _write(tmp_path, 0, [1, 2])
  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      MetricsFile(tmp_path, start=1)
  assert _steps(tmp_path) == [1, 2]


def test_numbers_that_are_not_finite_are_json(tmp_path):
  metrics = MetricsFile(tmp_path, start=0)
  metrics.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
  metrics.close()
  text = (tmp_path / "metrics.jsonl").read_text()

  def refuse(constant):
    raise ValueError(f"{constant} is no JSON")

  row = json.loads(text, parse_constant=refuse)
  assert row["a"] == "NaN" and row["c"] == "-Infinity"
  (row,) = read_metrics(tmp_path)
  assert math.isnan(row["a"])
  assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1.5)
  # They are kept by a restart.
  MetricsFile(tmp_path, start=1).close()
  assert (tmp_path / "metrics.jsonl").read_text() == text


def test_the_curve_goes_on_from_the_run_before(tmp_path):
  for name, before in [("one", ""), ("two", str(tmp_path / "one"))]:
    (tmp_path / name).mkdir()
    _write(tmp_path / name, 0, [1, 2])
    config = json.dumps({"init": before})
    (tmp_path / name / "config.json").write_text(config)
  rows = read_curve(tmp_path / "two")
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert [row["loss"] for row in rows] == [0.5, 1.0, 0.5, 1.0]
