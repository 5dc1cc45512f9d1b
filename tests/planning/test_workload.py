"""What rows hold."""

import numpy as np
import pytest

from hourjax.data.rows import Size
from hourjax.data.sample_sizes import pixel_frames
from hourjax.errors import UserError
from hourjax.models.flops import sample_flops
from hourjax.planning import workload as workloads
from hourjax.planning.workload import make_workload, stage_of, trained
from tests.planning.examples import experiment


@pytest.fixture(scope="module")
def stages():
  return {stage: experiment(stage=stage) for stage in (1, 2, 3)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_is_recognised_and_packed(stages, stage):
  found = stages[stage]
  workload = make_workload(found)
  assert workload.name == f"stage{stage}" == stage_of(found)
  # Published counts, in millions; a few do not fit.
  published = {1: 3.2, 2: 0.56, 3: 4.45}[stage]
  assert workload.samples / 1e6 == pytest.approx(published, rel=0.02)
  capacity = np.array(found.rows.astuple())
  assert (workload.sizes <= capacity).all()
  # Rows are as full as packing makes them, in one capacity at least.
  filled = workload.sizes.mean(axis=0) / np.maximum(capacity, 1)
  assert 0.8 < filled.max() <= 1


def test_videomarathon_has_its_hours(stages):
  workload = make_workload(stages[3])
  hours = workload.seconds.mean() * workload.rows / 3600
  # 0.7M conversations about videos of 20.9 minutes on average, and 1.3M
  # about videos below a minute.
  assert hours == pytest.approx(0.7e6 * 20.9 / 60 + 1.3e6 * 45 / 3600, rel=0.1)


@pytest.mark.parametrize("stored", [False, True])
def test_short_videos_have_the_frames_of_training(stored):
  parts = (workloads.Part("short", 400, "short"),)
  columns = workloads._draw(parts, 1.0, np.random.default_rng(0))
  visual = workloads._video_input(columns, stored)
  assert not visual.problems
  short = columns.duration < 128
  assert 0 < short.sum() < len(short)  # of 5 to 180 seconds
  assert set(visual.num_frames[short]) == {128}
  for n in np.flatnonzero(~short):
    seconds = float(columns.duration[n])
    pixels = len(pixel_frames("", int(columns.num_frames[n]), seconds)[1])
    assert visual.num_frames[n] == (int(seconds) if stored else pixels)
    assert abs(pixels - seconds) < 1.1


def test_one_video_a_row(stages):
  found = stages[3]
  workload = make_workload(found, "video=3600")
  sizes = dict(zip(Size.names(), workload.sizes[0].tolist()))
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


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ("stage4", "known are stage1, stage2, stage3, video=SECONDS and full"),
    ("video=0", "give whole seconds"),
    ("video=an hour", "give whole seconds"),
    ("video=86400", "config.rows.memory=235520 < 5616000"),
  ],
)
def test_other_data_is_refused(stages, data, message):
  with pytest.raises(UserError) as error:
    make_workload(stages[3], data)
  assert f"--data={data}" in str(error.value) and message in str(error.value)
