"""Features of one video: its frames encoded, or read from a file."""

import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from hourjax import schema
from hourjax.data.media.frame_rules import MIN_FRAMES, video_file_frames
from hourjax.data.media.video import Reading, decode_frames, probe
from hourjax.data.store.features import TOWER_FILE, FeatureStore
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder

# Gets the number of frames that are done, and of all frames.
Progress = Callable[[int, int], None]


class VideoFeatures(NamedTuple):
  """Holds the tower's features of a video file.

  Attributes:
    features: features of the frames, in bfloat16.
    duration: length of the video in seconds.
    share: fraction of the frames that could be decoded, from 0 to 1. In place
      of a damaged frame the nearest sound one is encoded.
  """

  features: Shaped[np.ndarray, "F Q V"]
  duration: float
  share: float

  @property
  def note(self) -> str:
    """Returns a note on a file that was decoded in part, else ""."""
    return part_note(self.share)


def part_note(share: float) -> str:
  """Returns a note on a video of which this fraction was decoded.

  Returns:
    The note; "" if all frames were decoded.
  """
  if share == 1:
    return ""
  return (
    f"{share:.1%} of the frames wanted can be read; the nearest frame"
    " is shown for the others, which are damaged or missing."
  )


def read_video_features(
  path: str | os.PathLike, encoder: Encoder, progress: Progress
) -> VideoFeatures:
  """Encodes the frames of a video file.

  They are the frames that training on video files uses; below 128 seconds also
  those that extraction stores. While the devices encode a batch, the next one
  is decoded.

  Args:
    path: the video file.
    encoder: the vision tower.
    progress: gets the number of encoded frames, and of all frames.

  Raises:
    UserError: the video cannot be read, or too little of it.
  """
  info = probe(path)
  indices = video_file_frames(info.frames, info.fps)
  features = np.empty((len(indices), *encoder.shape), ml_dtypes.bfloat16)
  waiting: list[tuple[jax.Array, int]] = []
  done = 0

  def collect() -> None:
    """Copies the oldest batch from the devices."""
    nonlocal done
    encoded, count = waiting.pop(0)
    features[done : done + count] = np.asarray(encoded)[:count]
    done += count
    progress(done, len(indices))

  side = encoder.image_size
  progress(0, len(indices))
  reading = Reading()
  chunks = decode_frames(
    path, indices, side, info=info, batch=encoder.batch, reading=reading
  )
  for chunk in chunks:
    if len(chunk) < encoder.batch:
      short = encoder.batch - len(chunk)
      empty = np.zeros((short, side, side, 3), np.uint8)
      waiting.append((encoder(np.concatenate([chunk, empty])), len(chunk)))
    else:
      waiting.append((encoder(chunk), len(chunk)))
    if len(waiting) > 1:
      collect()
  while waiting:
    collect()
  return VideoFeatures(features, round(info.duration, 2), reading.share)


def load_features(path: pathlib.Path) -> Shaped[np.ndarray, "..."]:
  """Opens a .npy file of features; frames are read when they are used.

  Args:
    path: the file.

  Raises:
    UserError: the file cannot be read, or does not hold floats.
  """
  if path.exists():
    schema.check_file(path, remedy="give a .npy file of features")
  try:
    features = np.load(path, mmap_mode="r")
  except Exception as error:  # numpy evaluates the header: many types
    raise UserError(
      f"cannot read features {path}: {getattr(error, 'strerror', 0) or error};"
      " give a .npy file of an array (frames, tokens, width)"
    ) from None
  if not isinstance(features, np.ndarray):
    raise UserError(f"{path} holds several arrays, not one; give a .npy file")
  return as_floats(features, str(path))


def as_floats(
  features: Shaped[np.ndarray, "..."], name: str
) -> Shaped[np.ndarray, "..."]:
  """Returns features as floats.

  Args:
    features: an array as numpy reads it: bfloat16 comes as two bytes without a
      type.
    name: name of the array, for the error.

  Raises:
    UserError: they are not floats.
  """
  if features.dtype.kind == "V" and features.dtype.itemsize == 2:
    return features.view(ml_dtypes.bfloat16)
  if not jnp.issubdtype(features.dtype, jnp.floating):
    raise UserError(
      f"{name} holds {features.dtype}, features are bfloat16 or floats"
    )
  return features


def stored_duration(path: pathlib.Path, frames: int) -> float:
  """Returns the duration in seconds of a video, given a file of its features.

  The feature store in which the file lies knows it; without a store a frame is
  a second.

  Args:
    path: the file of features.
    frames: number of its frames.

  Raises:
    UserError: no store knows the duration, and there are 128 frames, as of
      every video that is shorter than 129 seconds.
  """
  path = path.absolute()
  for folder in path.parents:
    store = _store(folder)
    name = path.relative_to(folder).with_suffix("").as_posix()
    if store and name in store:
      return float(store.stored(name).duration)
  if frames == MIN_FRAMES:
    raise UserError(
      f"{path} has {frames} frames, which every video shorter than"
      f" {frames + 1} seconds has, and no feature store around it knows more;"
      " give its duration in seconds"
    )
  return float(frames)


def _store(folder: pathlib.Path) -> FeatureStore | None:
  """Returns the feature store in a folder, if there is one."""
  if not next(folder.glob("index*.jsonl"), None):
    return None
  try:
    return FeatureStore(folder)
  except UserError:
    if (folder / TOWER_FILE).exists():
      raise
    return None  # the index of something else
