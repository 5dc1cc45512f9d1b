"""What rows hold."""

import dataclasses
import re

import numpy as np
import pytest

from hourjax.data.rows import Size
from hourjax.data.sample_sizes import pixel_frames
from hourjax.errors import UserError
from hourjax.models.flops import Work, sample_flops
from hourjax.planning import stage_data
from hourjax.planning import workload as workloads
from hourjax.planning.workload import make_workload, stage_of, trained
from tests.planning.examples import experiment, in_rows


@pytest.fixture(scope="module")
def stages():
  return {stage: experiment(stage=stage, frames=512) for stage in (1, 2, 3)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_is_recognised_and_packed(stages, stage):
  found = stages[stage]
  workload = make_workload(found)
  assert workload.name == f"stage{stage}" == stage_of(found)
  # Published counts, in millions; a few do not fit.
  published = {1: 3.2, 2: 0.56, 3: 4.45}[stage]
  assert workload.samples / 1e6 == pytest.approx(published, rel=0.02)
  assert set(workload.streams) == ({"short", "long"} if stage == 3 else {""})
  for number, name in enumerate(workload.streams):
    capacity = np.array(found.row_specs[name].capacity.astuple())
    sizes = workload.sizes[workload.stream == number]
    assert (sizes <= capacity).all()
    # Rows are as full as packing makes them, in one capacity at least.
    filled = sizes.mean(axis=0) / np.maximum(capacity, 1)
    assert (0.8 if stage == 3 else 0.6) < filled.max() <= 1


def test_videomarathon_has_its_hours(stages):
  workload = make_workload(stages[3])
  hours = workload.seconds.mean() * workload.rows / 3600
  # 0.7M conversations about videos of 20.9 minutes on average, and 1.3M
  # about videos of less than a minute on average.
  assert hours == pytest.approx(0.7e6 * 20.9 / 60 + 1.3e6 * 57 / 3600, rel=0.1)


def _short(count):
  parts = (workloads.Part("short", count, "short"),)
  return stage_data.draw(parts, 1.0, np.random.default_rng(0))


def test_short_videos_last_up_to_three_minutes():
  """As those of LLaVA-Video-178K, and none is cut to a length."""
  seconds = _short(4000).duration
  assert 0 < seconds.min() < 10 and 175 < seconds.max() <= 180
  assert len(np.unique(seconds)) > 3000
  assert (seconds > 120).mean() == pytest.approx(0.234 / 1.3, abs=0.02)


@pytest.mark.parametrize("stored", [False, True])
def test_short_videos_have_the_frames_of_training(stored):
  columns = _short(400)
  visual = workloads._video_input(columns, np.full(400, stored))
  assert not visual.problems and (visual.stored == stored).all()
  short = columns.duration < 128
  assert 0 < short.sum() < len(short)
  # A file of few frames has no more to take.
  there = np.where(stored, 128, columns.num_frames[short])
  np.testing.assert_array_equal(
    visual.num_frames[short], np.minimum(128, there)
  )
  for n in np.flatnonzero(~short):
    seconds, fps = float(columns.duration[n]), float(columns.fps[n])
    pixels = len(pixel_frames("", int(columns.num_frames[n]), seconds, fps)[1])
    assert visual.num_frames[n] == (int(seconds) if stored else pixels)
    assert abs(pixels - seconds) < 1.1


def _with_short_rows(found, capacity):
  """The experiment with other rows of the stream of short videos."""
  return dataclasses.replace(
    found, stream_rows=found.stream_rows | {"short": capacity}
  )


def test_short_videos_come_as_pixels_where_rows_have_room(stages):
  """Those of stage 3 beside VideoMarathon's features, and none is refused."""
  found = stages[3]
  for stage in (2, 3):
    workload = make_workload(stages[stage])
    frames, features = workload.sizes[:, 1], workload.sizes[:, 0]
    assert frames.sum() and (stage == 3) == bool(features.sum())
    assert not any("left out" in line for line in workload.assumptions)
  capacity = dataclasses.replace(found.stream_rows["short"], frames=0)
  without = make_workload(_with_short_rows(found, capacity))
  assert not without.sizes[:, 1].sum()
  # The same samples in fewer rows, short videos as features too.
  assert without.sizes[:, 0].sum() > workload.sizes[:, 0].sum()


@pytest.mark.parametrize(
  ("stage", "stored"), [(2, False), (3, False), (3, True)]
)
def test_a_video_of_150_seconds_can_be_used(stages, stage, stored):
  """As pixels beside its features; the tower does not learn from it."""
  columns = _short(1)
  columns = dataclasses.replace(
    columns, duration=np.array([150.0]), num_frames=np.array([4500], np.int32)
  )
  sizes, problems = workloads._measure(
    stages[stage], columns, np.array([stored])
  )
  assert not problems
  size = Size(*sizes[0].tolist())
  assert (size.frames, size.features) == ((0, 9600) if stored else (150, 0))
  assert size.memory == 150 * 65


def test_what_fits_no_row_is_counted_by_kind(stages):
  capacity = dataclasses.replace(stages[3].stream_rows["short"], frames=140)
  found = make_workload(_with_short_rows(stages[3], capacity))
  (line,) = [line for line in found.assumptions if "left out" in line]
  share = re.fullmatch(
    "(.*)% of the samples of kind short left out: they fit no row's frames",
    line,
  )
  # 140 to 180 of 120 to 180 seconds, of 18 %.
  assert float(share[1]) == pytest.approx(12, abs=1.5)


def test_one_video_a_row(stages):
  found = stages[3]
  workload = make_workload(found, "video=3600")
  (row,) = workload.sizes.tolist()
  sizes = dict(zip(Size.names(), row))
  assert sizes["features"] == 3600 * 64
  assert sizes["memory"] == 3600 * 65
  assert 512 * 17 < sizes["queries"] < sizes["decoder"] < 512 * 17 + 1200
  assert workload.seconds.tolist() == [3600]
  assert workload.work.cross_pairs[0] == sizes["queries"] * sizes["memory"]
  useful = sample_flops(found.model, workload.sizes, trained(found))
  assert workload.useful == useful


def test_full_rows(stages):
  workload = make_workload(stages[1], "full")
  assert workload.sizes.tolist() == [list(stages[1].rows.astuple())]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_are_those_of_training(stages, stage):
  """As many samples as published, in micro-batches that hold their rows."""
  found = stages[stage]
  workload = make_workload(found)
  steps = workloads.steps_of(found, workload)
  count = len(workload.useful)
  assert steps.samples == 128
  assert steps.number == workload.samples / 128
  assert steps.rows == pytest.approx(workload.steps.mean())
  times = -(-workload.steps // found.batch_rows)
  assert len(steps.order) == times.sum()
  assert steps.micro_batches == pytest.approx(times.mean())
  # Each drawn row once, and no micro-batch of nothing but empty rows.
  there = steps.order[steps.order < count]
  assert sorted(there.tolist()) == list(range(count))
  assert (steps.order.min(axis=1) < count).all()
  samples = workload.samples / workload.rows * steps.rows
  assert samples == pytest.approx(128, rel=1e-6)


def test_steps_by_hand(stages):
  """Steps of 3 and 1 rows in micro-batches of 2; row 4 is the empty one."""
  found = dataclasses.replace(stages[3], batch_rows=2)
  workload = make_workload(found, "video=3600")
  workload = dataclasses.replace(
    workload,
    work=Work(*(np.repeat(column, 4) for column in workload.work)),
    useful=np.ones(4),
    seconds=np.ones(4),
    sizes=np.repeat(workload.sizes, 4, axis=0),
    stream=np.zeros(4, np.int64),
    steps=np.array([3, 1]),
  )
  steps = workloads.steps_of(found, workload)
  assert steps.order.tolist() == [[0, 1], [2, 4], [3, 4]]
  assert (steps.micro_batches, steps.rows) == (1.5, 2)
  rows = in_rows(found, 3)
  steps = workloads.steps_of(rows, workload)
  assert steps.order[:2].tolist() == [[0, 1], [2, 3]]
  assert (steps.micro_batches, steps.rows) == (3, 6)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ("stage4", "known are stage1, stage2, stage3, video=SECONDS, full and"),
    ("video=0", "give whole seconds"),
    ("video=an hour", "give whole seconds"),
    ("video=86400", "config.rows.memory=235520 < 5616000"),
  ],
)
def test_other_data_is_refused(stages, data, message):
  with pytest.raises(UserError) as error:
    make_workload(stages[3], data)
  assert f"--data={data}" in str(error.value) and message in str(error.value)
