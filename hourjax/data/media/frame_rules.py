"""Frame rules: which frames of a video are taken, and what the model is told.

One rule for training, extraction, questions and evaluation:

    video             as pixels                     as stored features
    below 128 s       128 uniform frames            all of 128 uniform frames
    128 s and longer  every round(fps)-th frame     one a second, uniform

or all frames of a file that has fewer than 128; where every round(fps)-th are
fewer, 128 uniform ones. The model is told how many frames it is shown; only
fewer than 128 are repeated, in the memory.

Single rules are the official ones, number by number, and index arrays ascend.
Below 128 seconds two differences from the official code are deliberate:

- Of stored features it shows int(duration) rows. Its short videos never come as
  features, so no weights were trained on that, and the same video would be told
  as 60 frames here and as 128 there.
- It takes every round(fps)-th frame as soon as these are 128, which below 128
  seconds happens in the last of them and at rates such as 1.4, where up to 191
  frames would come.

Files are opened elsewhere, in `data/video.py`.
"""

import math
from fractions import Fraction

import numpy as np
from jaxtyping import Int32

from hourjax.errors import UserError

MIN_FRAMES = 128
SHORT = 128  # seconds; a shorter video is shown by MIN_FRAMES uniform frames
# Rates of videos are fractions with smaller denominators, such as 30000/1001.
_DENOMINATOR = 10**6

Rate = Fraction | float | int  # frames a second


def shown_frames(total_frames: int, duration: float) -> Int32[np.ndarray, "F"]:
  """Frames that are shown of a video file, in training and in answering.

    300 frames, 10 s -> 128 frames 0, 2, 4, 7, ..., 299
    100 frames, 10 s -> all of them
    6000 frames, 200 s -> 200 frames 0, 30, 60, ..., 5970

  Args:
    total_frames: of the file.
    duration: in seconds: `total_frames` over the rate.

  Raises:
    UserError: no frames, or no positive duration.
  """
  if total_frames < 1 or not 0 < duration < math.inf:
    raise UserError(
      f"a video of {total_frames} frames in {duration} seconds; both must be"
      " positive, check the file"
    )
  if duration < SHORT:
    return _linspace(total_frames, min(total_frames, MIN_FRAMES))
  # The quotient of floats may be a little less than a rate of 7.5, which would
  # round to 7 and not to 8.
  rate = Fraction(total_frames / duration).limit_denominator(_DENOMINATOR)
  return raw_video_frames(total_frames, rate)


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
  """Rows of the stored features that are shown.

    128 rows, 3.33 s -> all of them
    600 rows, 599.2 s -> 599 rows 0, 1, 2, ..., 597, 599

  Args:
    stored: rows there are.
    duration: of the video, in seconds, as stored.

  Returns:
    Ascending indices: of a video below 128 seconds 128 (all rows where there
    are fewer), of others one a second, min(stored, int(duration)).
  """
  return _linspace(stored, stored_feature_count(stored, duration))


def stored_feature_count(stored: int, duration: float | int) -> int:
  """How many frames `stored_feature_frames` gives."""
  return min(stored, MIN_FRAMES if duration < SHORT else int(duration))


def is_sparse(stored: int, duration: float | int) -> bool:
  """Whether a short video's features are too few to follow the rule.

  So they are if they were extracted at one frame a second (or less): 10.4 s
  then have 10 or 11 rows. A file of so few frames has as many rows, and nothing
  in a feature store tells the two apart.

  Args:
    stored: rows there are.
    duration: of the video, in seconds, as stored.
  """
  few = stored < MIN_FRAMES and duration < SHORT
  return few and stored <= math.ceil(duration)


def sparse_note(videos: int) -> str:
  """What is to be said where videos are sparse, "" where there are none."""
  if not videos:
    return ""
  many = "1 video" if videos == 1 else f"{videos:,} videos"
  return (
    f"{many} below {SHORT} seconds shown at one frame a second at most, not"
    f" by {MIN_FRAMES} frames: the stored features hold no more. Where the"
    " video file does, extract it again."
  )


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
