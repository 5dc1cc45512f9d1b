"""Everything together: what one logged step leaves in which file."""

import dataclasses
import errno
import math
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.errors import UserError
from hourjax.training import metric_writer as watch_module
from hourjax.training.metric_writer import (
  MetricsConfig,
  MetricWriter,
  read_metrics,
)
from tests.training.event_files import curves, read_events


class Clock:
  now = 1000.0

  def __call__(self):
    return self.now


def _watch(workdir, config=None, **changed):
  options = {"run_config": {"seed": 7}, "steps": 100, "start": 0,
             "flops_per_second": 1e15, **changed}  # fmt: skip
  return MetricWriter(workdir, config or MetricsConfig(), **options)


def _wrote(watch, step, **changed):
  options = {
    "scalars": {"loss": 2.5, "grad_norm": 0.5, "grad_norm/memaug": 0.25},
    "tokens": 3000,
    "video_seconds": 7200.0,
    "model_flops": 4e15,
    "data_wait": 2.0,
    "learning_rates": {"memaug": 1e-4, "decoder": 2e-5},
    "counts": {"unread_damaged": 3},
    **changed,
  }
  watch.wrote(step, options.pop("scalars"), **options)


def _logged(workdir):
  return curves(read_events(workdir / "tensorboard"))


def test_the_values(tmp_path, capsys):
  clock = Clock()
  watch = _watch(tmp_path, clock=clock)
  clock.now += 4
  watch.lost(4, "restore")
  for step in range(1, 6):
    watch.step_begins(step)
    clock.now += 2
    if step == 1:
      clock.now += 20
      watch.lost(20, "compile")
  _wrote(watch, 5)
  watch.close()
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
  watch = _watch(tmp_path, clock=clock, start=20)
  for step in range(21, 41):
    watch.step_begins(step)
    clock.now += 1 if step <= 30 else 3
    if step in (30, 40):
      _wrote(watch, step)
    if step == 30:
      clock.now += 5
      watch.lost(5, "save")
  watch.close()
  first, second = read_metrics(tmp_path)
  assert (first["step_seconds"], second["step_seconds"]) == (1, 3)
  assert (first["mfu"], second["mfu"]) == pytest.approx((0.4, 4 / 30))
  assert second["goodput"] == pytest.approx(40 / 45)


def test_what_is_not_known_is_left_out(tmp_path):
  """No peak of CPUs, no memory statistics: no zeros either."""
  watch = _watch(tmp_path, flops_per_second=None)
  watch.step_begins(1)
  _wrote(watch, 1, learning_rates={}, counts={}, video_seconds=0)
  watch.close()
  (row,) = read_metrics(tmp_path)
  assert not {"mfu", "hbm_gib", "hbm_peak_gib"} & row.keys()
  assert row["video_hours_per_second"] == 0


def test_memory_of_devices_that_know_it(tmp_path, monkeypatch):
  device = types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 2**31})
  monkeypatch.setattr(watch_module.jax, "local_devices", lambda: [device])
  watch = _watch(tmp_path)
  _wrote(watch, 1)
  watch.close()
  assert read_metrics(tmp_path)[0]["hbm_gib"] == 2
  assert _logged(tmp_path)["memory/hbm_gib"] == {1: 2.0}


def test_arrays_and_numbers_that_are_not_finite(tmp_path):
  """As they come from the device; the step's own tokens come before sums."""
  watch = _watch(tmp_path)
  scalars = {"loss": jnp.float32(math.nan), "grad_norm": np.float32(math.inf),
             "tokens": np.int32(5)}  # fmt: skip
  _wrote(watch, 1, scalars=scalars)
  watch.close()
  (row,) = read_metrics(tmp_path)
  assert math.isnan(row["loss"]) and row["grad_norm"] == math.inf
  assert row["tokens"] == 5
  assert math.isnan(_logged(tmp_path)["train/loss"][1])


def test_started_again_from_a_checkpoint(tmp_path):
  clock = Clock()
  for start, last in [(0, 5), (3, 6)]:
    watch = _watch(tmp_path, start=start, clock=clock)
    for step in range(start + 1, last + 1):
      watch.step_begins(step)
      clock.now += 10
      _wrote(watch, step, scalars={"loss": step + start})
    watch.close()
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
  watch = _watch(tmp_path)
  watch.step_begins(1)
  watch.close()
  watch.close()
  watch.lost(1, "save")  # a save that ends later is not an error
  _wrote(watch, 1)
  assert not read_metrics(tmp_path)


def test_other_hosts_write_nothing(tmp_path, capsys):
  config = MetricsConfig(profile_steps="1:3")
  watch = _watch(tmp_path, config, primary=False)
  watch.step_begins(1)
  _wrote(watch, 1)
  watch.lost(1, "save")
  watch.close()
  assert not list(tmp_path.iterdir())
  captured = capsys.readouterr()
  assert not captured.err + captured.out


def test_without_tensorboard(tmp_path):
  watch = _watch(tmp_path, MetricsConfig(tensorboard=False))
  _wrote(watch, 1)
  watch.close()
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

  monkeypatch.setattr(watch_module, "WandbRun", Run)
  watch = _watch(tmp_path, MetricsConfig(wandb="hours"))
  _wrote(watch, 1)
  watch.close()
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
    _watch(tmp_path, MetricsConfig(wandb="hours"), primary=primary)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("primary", [True, False])
def test_a_trace_outside_the_run(tmp_path, primary):
  config = MetricsConfig(profile_steps="99:103")
  with pytest.raises(UserError) as error:
    _watch(tmp_path, config, primary=primary)
  assert str(error.value) == (
    "config.watch.profile_steps is 99:103, which asks for step 102, but the"
    " run ends with step 100; choose steps of the run"
  )


def test_a_trace_up_to_the_last_step(tmp_path):
  watch = _watch(tmp_path, MetricsConfig(profile_steps="2:4"), steps=3)
  for step in (1, 2, 3):
    watch.step_begins(step)
  watch.close()
  assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_trace_that_an_earlier_start_took(tmp_path, capsys):
  config = MetricsConfig(profile_steps="10:12")
  watch = _watch(tmp_path, config, start=11)
  watch.step_begins(12)
  watch.close()
  assert not (tmp_path / "profile").exists()
  assert "no trace: the steps 10 to 11" in capsys.readouterr().err


def test_a_trace_takes_no_time_from_steps(tmp_path, monkeypatch):
  clock = Clock()

  def slow(*_):
    clock.now += 50

  watch = _watch(tmp_path, MetricsConfig(profile_steps="2:3"), clock=clock)
  monkeypatch.setattr(watch._profiler, "_start", slow)
  monkeypatch.setattr(watch_module.jax, "local_devices", list)
  monkeypatch.setattr("time.monotonic", clock)
  for step in (1, 2, 3):
    watch.step_begins(step)
    clock.now += 2
  _wrote(watch, 3)
  watch.close()
  assert read_metrics(tmp_path)[0]["lost_seconds/profile"] >= 50
  assert read_metrics(tmp_path)[0]["step_seconds"] == pytest.approx(2)


def test_config_of_a_trace():
  with pytest.raises(UserError, match=r"config\.watch\.profile_steps is '9'"):
    dataclasses.replace(MetricsConfig(), profile_steps="9")


def test_a_full_disk_does_not_stop_the_run(tmp_path, capsys):
  watch = _watch(tmp_path)

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  files = [watch._metrics._ledger, watch._goodput._ledger]
  files.append(watch._writers["TensorBoard's events"])
  opened = [thing._file for thing in files]
  for thing in files:
    thing._file = types.SimpleNamespace(write=full, flush=full, close=full)
  for step in range(1, 4):
    watch.step_begins(step)
    _wrote(watch, step)
    watch.lost(0.1, "save")
  error = capsys.readouterr().err
  for name in ("metrics.jsonl", "goodput.jsonl", "TensorBoard's events"):
    assert error.count(f"warning: {name} could not be written") == 1
  # Space again.
  for thing, file in zip(files, opened):
    thing._file = file
  _wrote(watch, 4)
  watch.close()
  assert [row["step"] for row in read_metrics(tmp_path)] == [4]
  assert list(_logged(tmp_path)["train/loss"]) == [4]


def test_thousands_of_steps_are_cheap(tmp_path):
  """At most 2 ms a logged step and 0.2 ms another: no file is read again."""
  watch = _watch(tmp_path, steps=3000)
  began = time.process_time()
  for step in range(1, 3001):
    watch.step_begins(step)
    if step % 10 == 0:
      _wrote(watch, step)
  took = time.process_time() - began
  watch.close()
  assert len(read_metrics(tmp_path)) == 300
  assert took < 300 * 2e-3 + 3000 * 0.2e-3
  began = time.process_time()
  _watch(tmp_path, steps=3000, start=2995).close()
  assert time.process_time() - began < 0.5
