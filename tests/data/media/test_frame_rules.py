"""Which frames are taken: the official rules, and one rule for every path."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hourjax.data import sample_sizes
from hourjax.data.media import frame_rules
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from tests import golden_files
from tests.data.media.frame_cases import CASES, uniform

RULES = golden_files.load_json("frame_indices.json")
INDICES = golden_files.npz("frame_indices.npz")


def _cases(kind):
  return [
    pytest.param(entry, id=entry.get("key", f"{kind}.{i}"))
    for i, entry in enumerate(RULES.get(kind, []))
  ]


def _check_stored(indices, key):
  # Not every case has its indices stored: the webm ones have counts only.
  expected = INDICES.get(key, indices)
  assert indices.dtype == np.int32
  np.testing.assert_array_equal(indices, expected, strict=True)


# --- against golden ---------------------------------------------------------


@pytest.mark.parametrize("entry", _cases("pyav"))
def test_extraction_frames(entry):
  indices, duration = frame_rules.extraction_frames(
    entry["total_frames"], Fraction(entry["fps"])
  )
  assert duration == entry["returned_duration"] == entry["stored_duration"]
  assert len(indices) == entry["n_frames"] == entry["returned_sampled_frm"]
  _check_stored(indices, entry["key"])


@pytest.mark.parametrize("entry", _cases("pt"))
def test_stored_feature_frames(entry):
  stored, duration = entry["T"], entry["duration"]
  indices = frame_rules.stored_feature_frames(stored, duration)
  if duration < 128:
    # Deliberately not the official int(duration): its short videos never come
    # as features, and 128 frames are what their pixels are trained on.
    assert indices.tolist() == uniform(stored, min(stored, 128))
    return
  assert len(indices) == entry["shape"][0]
  _check_stored(indices, entry["key"])
  instruction = frame_rules.time_instruction(duration, len(indices))
  assert instruction == entry["time_instruction"]


def _raw_with_defaults():
  """Official results on the frames of a video file, with its durations."""
  for entry in RULES.get("raw", []):
    args = {k: v for k, v in entry["args"].items() if k != "force_sample"}
    standard = args == {"video_fps": 1, "min_frames": 128, "frames_upbound": -1}
    if standard and "error" not in entry:
      yield pytest.param(entry, id=entry["key"])


@pytest.mark.parametrize("entry", _cases("raw"))
def test_raw_video_frames(entry):
  total, fps = entry["total_frames"], entry["avg_fps"]
  indices = frame_rules.raw_video_frames(total, fps, **entry["args"])
  if "error" in entry:  # the official code fails where hourjax must not
    assert indices[0] == 0 and indices[-1] == total - 1
    assert (np.diff(indices) > 0).all()
    return
  assert len(indices) == entry["n_frames"]
  _check_stored(indices, entry["key"])
  instruction = frame_rules.time_instruction(total / fps, len(indices))
  assert instruction == entry["time_instruction"]


@pytest.mark.parametrize("entry", list(_raw_with_defaults()))
def test_frames_of_a_file_are_official(entry):
  total, fps = entry["total_frames"], entry["avg_fps"]
  indices = frame_rules.video_file_frames(total, fps)
  assert len(indices) == frame_rules.video_file_count(total, fps)
  _check_stored(indices, entry["key"])
  instruction = frame_rules.time_instruction(total / fps, len(indices))
  assert instruction == entry["time_instruction"]


# --- one rule, side by side -------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_on_pixels(case):
  duration, indices = sample_sizes.pixel_frames(
    "a.mp4", case.frames, float(case.frames / case.fps), float(case.fps)
  )
  assert len(indices) == frame_rules.video_file_count(
    case.frames, float(case.fps)
  )
  assert indices.tolist() == case.indices and len(indices) == case.from_file
  instruction = frame_rules.time_instruction(duration, len(indices))
  assert f" {case.seconds} seconds, and {case.from_file} frames " in instruction


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_extraction_and_training_on_features(case, tmp_path):
  extracted, duration = frame_rules.extraction_frames(case.frames, case.fps)
  assert extracted.tolist() == uniform(case.frames, case.stored)
  line = {"video": "a.mp4", "frames": len(extracted), "duration": duration}
  (tmp_path / "index-00000.jsonl").write_text(json.dumps(line) + "\n")
  store = FeatureStore(tmp_path)
  duration, rows = sample_sizes.stored_frames(store, "a.mp4")
  assert len(rows) == case.from_features
  instruction = frame_rules.time_instruction(duration, len(rows))
  assert (
    f" {case.seconds} seconds, and {case.from_features} frames " in instruction
  )
  assert bool(sample_sizes.sparse_videos(store, ["a.mp4"])) == case.sparse
  if case.duration < 128:  # the frames used of the file
    assert extracted[rows].tolist() == case.indices


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_frames_lie_evenly_over_a_video(case):
  """So the attention map, which knows their number alone, has the right times.

  Of both ways of reading: the n-th of N is on screen within the n-th of N equal
  parts.
  """
  extracted, _ = frame_rules.extraction_frames(case.frames, case.fps)
  rows = frame_rules.stored_feature_frames(len(extracted), case.duration)
  for indices in (np.array(case.indices), extracted[rows]):
    edges = np.linspace(0, case.frames, len(indices) + 1)
    assert (indices < edges[1:]).all() and (indices + 1 > edges[:-1]).all()


# --- without golden ---------------------------------------------------------


@settings(deadline=None)
@given(
  total=st.integers(1, 20_000),
  fps=st.fractions(Fraction(1, 20), 120, max_denominator=1001),
)
def test_rules_give_ascending_frames_of_the_video(total, fps):
  extracted, duration = frame_rules.extraction_frames(total, fps)
  raw = frame_rules.raw_video_frames(total, fps)
  from_file = frame_rules.video_file_frames(total, fps)
  kept = frame_rules.stored_feature_frames(len(extracted), duration)
  for indices, of in (
    (extracted, total),
    (raw, total),
    (from_file, total),
    (kept, len(extracted)),
  ):
    assert indices.dtype == np.int32
    assert (np.diff(indices) > 0).all()
    assert indices[0] == 0 and indices[-1] < of
  assert len(extracted) >= min(total, 128)
  assert len(from_file) == frame_rules.video_file_count(total, fps)
  if total / fps < 128:
    assert len(from_file) == len(kept) == min(total, 128)
    assert from_file.tolist() == extracted[kept].tolist()
  else:
    assert from_file.tolist() == raw.tolist()
    assert len(kept) == min(len(extracted), int(duration))


@pytest.mark.parametrize("rate", ["15/2", "25/2", "30000/1001", "30"])
def test_a_rate_taken_back_from_the_duration_is_the_simple_one(rate):
  """As of datasets that were prepared without the rates of their videos."""
  for total in range(1000, 40_000, 777):
    duration = float(total / Fraction(rate))
    assert frame_rules.rate_from_duration(total, duration) == Fraction(rate)
  duration, indices = sample_sizes.pixel_frames("a.mp4", 1125, 150.0)
  assert indices.tolist() == list(range(0, 1125, 8))


def test_slow_videos_give_every_frame_once():
  indices, duration = frame_rules.extraction_frames(1000, Fraction(2, 5))
  assert duration == 2500.0
  np.testing.assert_array_equal(indices, np.arange(1000))
  raw = frame_rules.raw_video_frames(1000, Fraction(1, 2))
  np.testing.assert_array_equal(raw, np.arange(1000))


@pytest.mark.parametrize("total, fps", [(0, 30), (10, 0), (10, -1.0)])
def test_rules_refuse_impossible_videos(total, fps):
  for rule in (
    frame_rules.extraction_frames,
    frame_rules.raw_video_frames,
    frame_rules.video_file_frames,
    frame_rules.video_file_count,
  ):
    with pytest.raises(UserError, match=f"{total} frames at {fps}"):
      rule(total, fps)


@pytest.mark.parametrize(
  "total, duration", [(0, 1.0), (10, 0.0), (10, float("nan"))]
)
def test_no_rate_is_taken_of_impossible_videos(total, duration):
  message = re.escape(f"{total} frames in {duration} seconds")
  with pytest.raises(UserError, match=message):
    frame_rules.rate_from_duration(total, duration)


@pytest.mark.parametrize(
  "stored, duration, sparse",
  [
    # One frame a second of files with more, by whichever rounding.
    (60, 60.02, True),
    (61, 60.02, True),
    (127, 127.99, True),
    (3, 3.33, True),
    (5, 60.0, True),  # less than that
    # What extraction stores.
    (128, 60.02, False),
    (100, 3.33, False),
    (120, 119.0, False),
    (150, 100.0, False),
    # Long videos have one frame a second.
    (128, 128.0, False),
    (100, 200.0, False),
    (3600, 3600.0, False),
  ],
)
def test_features_of_one_frame_a_second_are_told_apart(
  stored, duration, sparse
):
  assert frame_rules.is_sparse(stored, duration) == sparse


def test_what_is_said_of_sparse_features():
  assert frame_rules.sparse_note(0) == ""
  assert frame_rules.sparse_note(1).startswith("1 video below 128 seconds ")
  assert frame_rules.sparse_note(1234).startswith("1,234 videos below 128")
