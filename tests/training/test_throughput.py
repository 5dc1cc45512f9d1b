"""Goodput against sums done by hand, on a clock that is set; memory."""

import types

import jax
import pytest

from hourjax.training.throughput import Goodput, hbm_usage, wall_clock


class Clock:
  def __init__(self, now=1000.0):
    self.now = now

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


def _steps(goodput, clock, steps, seconds=10.0):
  for step in steps:
    goodput.begin_step(step)
    clock.now += seconds


def test_one_start(tmp_path, clock):
  goodput = Goodput(tmp_path, start=0, clock=clock)
  clock.now += 5  # opening data: no step yet
  goodput.begin_step(1)
  clock.now += 30  # 20 of them compile
  goodput.add_lost(20, "compile")
  assert goodput.share() == pytest.approx(10 / 35)
  _steps(goodput, clock, [2, 3])
  goodput.add_lost(4, "save")
  assert goodput.share() == pytest.approx((10 + 10 + 6) / 55)
  assert goodput.lost_seconds == {"compile": 20, "save": 4}
  goodput.close()


def test_a_crash_between(tmp_path, clock):
  goodput = Goodput(tmp_path, start=0, clock=clock)
  _steps(goodput, clock, [1, 2, 3, 4])
  # Killed in step 4, which has no line yet; 2 was saved; down for 60 s.
  clock.now += 60
  began = clock.now
  clock.now += 7
  goodput = Goodput(tmp_path, start=2, began=began, clock=clock)
  assert goodput.share() == pytest.approx(20 / 107)
  assert goodput.lost_seconds == {"recomputed": 10, "down": 70}
  goodput.add_lost(7, "restore")
  _steps(goodput, clock, [3, 4])
  goodput.close()
  assert goodput.share() == pytest.approx(40 / 127)
  lost = sum(goodput.lost_seconds.values())
  assert 40 + lost == 127  # every second is somewhere


def test_starts_that_come_to_nothing(tmp_path, clock):
  goodput = Goodput(tmp_path, start=0, clock=clock)
  _steps(goodput, clock, [1, 2, 3])
  goodput.close()
  for _ in range(3):
    clock.now += 100
    Goodput(tmp_path, start=3, clock=clock)
  goodput = Goodput(tmp_path, start=3, clock=clock)
  assert goodput.lost_seconds == {"down": 300}
  assert goodput.share() == pytest.approx(30 / 330)


def test_an_older_checkpoint_than_the_last_time(tmp_path, clock):
  goodput = Goodput(tmp_path, start=0, clock=clock)
  _steps(goodput, clock, [1, 2, 3, 4])
  goodput.close()
  goodput = Goodput(tmp_path, start=3, clock=clock)
  _steps(goodput, clock, [4])
  goodput.close()
  assert goodput.share() == pytest.approx(40 / 50)
  goodput = Goodput(tmp_path, start=1, clock=clock)
  assert goodput.share() == pytest.approx(10 / 50)
  assert goodput.lost_seconds == {"recomputed": 10 + 30}
  goodput = Goodput(tmp_path, start=0, clock=clock)
  assert goodput.share() == 0


def test_a_saved_step_keeps_its_time_if_killed_at_once(tmp_path, clock):
  goodput = Goodput(tmp_path, start=0, clock=clock)
  _steps(goodput, clock, [1])
  clock.now += 2
  goodput.add_lost(2, "save")
  goodput = Goodput(tmp_path, start=1, clock=clock)
  assert goodput.share() == pytest.approx(10 / 12)


def test_a_damaged_file_begins_anew(tmp_path, clock):
  (tmp_path / "goodput.jsonl").write_text('{"began": 1\n{"step": 9')
  goodput = Goodput(tmp_path, start=9, clock=clock)
  _steps(goodput, clock, [10])
  assert goodput.share() == 1


def test_time_lost_is_never_more_than_there_was(tmp_path, clock):
  goodput = Goodput(tmp_path, start=0, clock=clock)
  _steps(goodput, clock, [1])
  goodput.add_lost(50, "save")
  assert goodput.share() == 0
  goodput.close()


def test_the_wall_clock_is_one():
  import time

  assert abs(wall_clock() - time.time()) < 60


GIB = 2**30


def _device(stats):
  return types.SimpleNamespace(memory_stats=lambda: stats)


def test_the_fullest_device_counts():
  one = _device({"bytes_in_use": 2 * GIB, "peak_bytes_in_use": 5 * GIB})
  two = _device({"bytes_in_use": 3 * GIB, "peak_bytes_in_use": 4 * GIB})
  assert hbm_usage([one, two]) == {"hbm_gib": 3.0, "hbm_peak_gib": 5.0}


def test_what_no_device_knows_is_left_out():
  assert hbm_usage([_device({"bytes_in_use": GIB})]) == {"hbm_gib": 1.0}
  assert (
    hbm_usage([_device(None)])
    == hbm_usage([])
    == hbm_usage(jax.local_devices())
    == {}
  )

  def unable():
    raise NotImplementedError

  assert hbm_usage([types.SimpleNamespace(memory_stats=unable)]) == {}
