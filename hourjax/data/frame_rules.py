"""Frame rules: which frames of a video are taken, and what the model is told.

The rules are the official ones, number by number; index arrays ascend. Files
are opened elsewhere, in `data/video.py`.
"""

from fractions import Fraction

import numpy as np
from jaxtyping import Int32

from hourjax.errors import UserError

MIN_FRAMES = 128

Rate = Fraction | float | int  # frames a second


def extraction_frames(
  total_frames: int, fps: Rate
) -> tuple[Int32[np.ndarray, "F"], float]:
  """Frames whose features are stored, about one a second, at least 128.

    3000 frames, 30 fps: 100 s -> 128 frames 0, 23, 47, ..., 2999
    100 frames: fewer than 128 -> all of them

  A video slower than one frame a second gives every frame once.

  Returns:
    Frame indices, and the duration in seconds rounded to 1/100 as stored.

  Raises:
    UserError: no frames, or no positive rate.
  """
  _check_rate(total_frames, fps)
  duration = total_frames / float(fps)
  if total_frames < MIN_FRAMES:
    count = total_frames
  else:
    count = min(max(int(duration), MIN_FRAMES), total_frames)
  return _linspace(total_frames, count), round(duration, 2)


def stored_feature_frames(
  stored: int, duration: float | int
) -> Int32[np.ndarray, "F"]:
  """Rows of the stored features that training uses: one a second.

    128 rows, 3.33 s -> 0, 63, 127

  Args:
    stored: rows there are.
    duration: of the video, in seconds, as stored.

  Returns:
    min(stored, int(duration)) ascending indices: none under one second.
  """
  return _linspace(stored, stored_feature_count(stored, duration))


def stored_feature_count(stored: int, duration: float | int) -> int:
  """How many frames `stored_feature_frames` gives."""
  return min(stored, int(duration))


def raw_video_frames(
  total_frames: int,
  avg_fps: Rate,
  *,
  video_fps: Rate = 1,
  min_frames: int = MIN_FRAMES,
  frames_upbound: int = -1,
  force_sample: bool = True,
) -> Int32[np.ndarray, "F"]:
  """Frames of a video that is read without stored features.

  Every round(avg_fps / video_fps)-th frame; where these are fewer than
  `min_frames`, that many (or all) spread uniformly; where `frames_upbound` is
  positive and they are more, or `force_sample` is set, exactly that many.

    1000 frames, 2.5 fps -> step round(2.5) = 2 -> 500 frames

  Raises:
    UserError: no frames, or no positive rate.
  """
  _check_rate(total_frames, avg_fps)
  _check_rate(total_frames, video_fps)
  # Videos of 0.5 fps or less round to 0, where the official code fails.
  step = max(1, round(float(avg_fps) / video_fps))
  indices = np.arange(0, total_frames, step, dtype=np.int32)
  if len(indices) < min_frames:
    indices = _linspace(total_frames, min(total_frames, min_frames))
  if frames_upbound > 0 and (force_sample or len(indices) > frames_upbound):
    indices = _linspace(total_frames, frames_upbound)
  return indices


def time_instruction(duration: float | int, frames: int) -> str:
  """What the model is told about a video (SPEC section 2)."""
  return (
    f"The video lasts for {duration:.2f} seconds, and {frames} frames are "
    "uniformly sampled from it. Please answer the following questions "
    "related to this video."
  )


def _check_rate(total_frames: int, fps: Rate) -> None:
  if total_frames < 1 or not fps > 0:
    raise UserError(
      f"a video of {total_frames} frames at {fps} frames a second; both must "
      "be positive, check the file"
    )


def _linspace(total: int, count: int) -> Int32[np.ndarray, "count"]:
  """`count` indices from 0 to total - 1, cut to integers (not rounded)."""
  return np.linspace(0, total - 1, count, dtype=np.int64).astype(np.int32)
