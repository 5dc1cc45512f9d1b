"""Rules for the frames that the model receives of a video.

Training, extraction, answering and evaluation follow the same rule:

    video             as pixels                     as stored features
    below 128 s       128 uniform frames            all of 128 uniform frames
    128 s and longer  every round(fps)-th frame     one a second, uniform

A file of fewer than 128 frames gives all of them. Where every round(fps)-th
frame makes fewer than 128, the file gives 128 uniform frames. The time
instruction states the number of frames; videos of fewer than 128 are repeated
to 128 in the memory only.

Each function gives the numbers of the official code, and all index arrays
ascend. Below 128 seconds there are two deliberate differences from it:

- The official code uses int(duration) rows of stored features. In its training
  short videos never come as features, so no weights were trained on that, and
  one video would have 60 frames as features and 128 as pixels.
- The official code uses every round(fps)-th frame as soon as these are 128.
  Below 128 seconds this happens just under 128 seconds, and at rates such as
  1.4, where up to 191 frames would be used.

Files are opened in `data/media/video.py`. See hourjax/README.md, Video tokens.
"""

import math
from fractions import Fraction

import numpy as np
from jaxtyping import Int32

from hourjax.errors import UserError

MIN_FRAMES = 128  # the memory repeats the frames of a shorter video to so many
SHORT = 128  # seconds; of a shorter video MIN_FRAMES uniform frames are used
# Rates that encoders are set to are fractions with smaller denominators, such
# as 30000/1001.
_DENOMINATOR = 10**6

Rate = Fraction | float | int  # frames a second


def video_file_frames(total_frames: int, fps: Rate) -> Int32[np.ndarray, "F"]:
  """Returns the frames used of a video file, in training and in answering.

    300 frames, 30 fps: 10 s -> 128 frames 0, 2, 4, 7, ..., 299
    100 frames, 10 fps: 10 s -> all of them
    6000 frames, 30 fps: 200 s -> 200 frames 0, 30, 60, ..., 5970

  Args:
    total_frames: of the file.
    fps: average frames a second, as the file states it. Of 7.5 every 8th frame
      is used, and of a rate that is less by a millionth every 7th: the official
      code rounds it as it is, halves to the even number.

  Returns:
    int32 [F] ascending frame indices.

  Raises:
    UserError: there are no frames, or the rate is not positive.
  """
  _check_rate(total_frames, fps)
  if total_frames / float(fps) < SHORT:
    return _linspace(total_frames, min(total_frames, MIN_FRAMES))
  return raw_video_frames(total_frames, fps)


def video_file_count(total_frames: int, fps: Rate) -> int:
  """Returns how many frames `video_file_frames` returns."""
  _check_rate(total_frames, fps)
  uniform = min(total_frames, MIN_FRAMES)
  if total_frames / float(fps) < SHORT:
    return uniform
  return max(-(-total_frames // _step(fps)), uniform)


def rate_from_duration(total_frames: int, duration: float) -> Fraction:
  """Returns the rate of a video of which only number and seconds are known.

  The quotient of floats may be a little less than a rate of 7.5, which would
  round to 7 and not to 8, so the nearest simple fraction is taken. That is a
  guess: a file may state a rate that is 7.49999994.

  Args:
    total_frames: of the file.
    duration: of the file, in seconds.

  Raises:
    UserError: there are no frames, or the duration is not positive.
  """
  if total_frames < 1 or not 0 < duration < math.inf:
    raise UserError(
      f"a video of {total_frames} frames in {duration} seconds; both must be"
      " positive, check the file"
    )
  return Fraction(total_frames / duration).limit_denominator(_DENOMINATOR)


def extraction_frames(
  total_frames: int, fps: Rate
) -> tuple[Int32[np.ndarray, "F"], float]:
  """Returns the frames whose features are stored: one a second, or 128.

    3000 frames, 30 fps: 100 s -> 128 frames 0, 23, 47, ..., 2999
    100 frames: fewer than 128 -> all of them

  A video with less than one frame a second gives every frame once.

  Args:
    total_frames: of the file.
    fps: frames a second.

  Returns:
    int32 [F] ascending frame indices, and the duration in seconds, rounded to
    1/100 as the store holds it.

  Raises:
    UserError: there are no frames, or the rate is not positive.
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
  """Returns the rows of the stored features that the model receives.

    128 rows, 3.33 s -> all of them
    600 rows, 599.2 s -> 599 rows 0, 1, 2, ..., 597, 599

  Args:
    stored: number of stored rows.
    duration: of the video, in seconds, as stored.

  Returns:
    int32 [F] ascending row indices. Of a video below 128 seconds there are 128,
    or all rows where fewer are stored; of a longer video there is one a second,
    min(stored, int(duration)).
  """
  return _linspace(stored, stored_feature_count(stored, duration))


def stored_feature_count(stored: int, duration: float | int) -> int:
  """Returns how many rows `stored_feature_frames` returns."""
  return min(stored, MIN_FRAMES if duration < SHORT else int(duration))


def is_sparse(stored: int, duration: float | int) -> bool:
  """Returns whether a short video has too few stored rows for the rule.

  This is so if its features were extracted at one frame a second or less: a
  video of 10.4 s then has 10 or 11 rows. A file with so few frames has as many
  rows, and nothing in a feature store distinguishes the two cases.

  Args:
    stored: number of stored rows.
    duration: of the video, in seconds, as stored.
  """
  few = stored < MIN_FRAMES and duration < SHORT
  return few and stored <= math.ceil(duration)


def sparse_note(videos: int) -> str:
  """Returns the warning about sparse videos, "" if there are none.

  Args:
    videos: number of videos for which `is_sparse` is true.
  """
  if not videos:
    return ""
  many = "1 video" if videos == 1 else f"{videos:,} videos"
  return (
    f"{many} below {SHORT} seconds used at one frame a second at most, not"
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
  """Returns frames of a video file at a fixed step, with the official options.

    1000 frames, 2.5 fps -> step round(2.5) = 2 -> 500 frames

  Args:
    total_frames: of the file.
    avg_fps: frames a second of the file.
    video_fps: frames a second that are wanted: every
      round(avg_fps / video_fps)-th frame is used.
    min_frames: where fewer result, this many uniform frames are used, or all.
    frames_upbound: if positive, and more frames result, this many uniform
      frames are used.
    force_sample: whether `frames_upbound` frames are used even if fewer result.

  Returns:
    int32 [F] ascending frame indices.

  Raises:
    UserError: there are no frames, or a rate is not positive.
  """
  _check_rate(total_frames, avg_fps)
  _check_rate(total_frames, video_fps)
  step = _step(avg_fps, video_fps)
  indices = np.arange(0, total_frames, step, dtype=np.int32)
  if len(indices) < min_frames:
    indices = _linspace(total_frames, min(total_frames, min_frames))
  if frames_upbound > 0 and (force_sample or len(indices) > frames_upbound):
    indices = _linspace(total_frames, frames_upbound)
  return indices


def time_instruction(duration: float | int, frames: int) -> str:
  """Returns the sentence on a video's duration and number of frames.

  See hourjax/README.md, Conversations.

  Args:
    duration: of the video, in seconds.
    frames: number of frames that the model receives.
  """
  return (
    f"The video lasts for {duration:.2f} seconds, and {frames} frames are "
    "uniformly sampled from it. Please answer the following questions "
    "related to this video."
  )


def _step(avg_fps: Rate, video_fps: Rate = 1) -> int:
  """Returns the step between frames of a rate, halves rounded to even.

  Videos of 0.5 fps or less round to 0, where the official code fails.
  """
  return max(1, round(float(avg_fps) / video_fps))


def _check_rate(total_frames: int, fps: Rate) -> None:
  """Refuses impossible numbers of frames and rates."""
  if total_frames < 1 or not 0 < fps < math.inf:
    raise UserError(
      f"a video of {total_frames} frames at {fps} frames a second; both must "
      "be positive, check the file"
    )


def _linspace(total: int, count: int) -> Int32[np.ndarray, "count"]:
  """Returns `count` indices from 0 to total - 1, cut to integers."""
  return np.linspace(0, total - 1, count, dtype=np.int64).astype(np.int32)
