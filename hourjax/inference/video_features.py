"""A video in memory as features: its frames encoded, or a file of features."""

import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from hourjax import schema
from hourjax.data.media.frame_rules import MIN_FRAMES, shown_frames
from hourjax.data.media.video import Reading, decode_frames, probe
from hourjax.data.store.features import TOWER_FILE, FeatureStore
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder

# Told how many frames are done, and of how many.
Progress = Callable[[int, int], None]


class VideoFeatures(NamedTuple):
  """A video file, encoded.

  Attributes:
    features: of its frames, in bfloat16.
    duration: in seconds.
    share: of the frames, that could be read, from 0 to 1; the nearest pictures
      without damage stand in for the others.
  """

  features: Shaped[np.ndarray, "F Q V"]
  duration: float
  share: float

  @property
  def note(self) -> str:
    """What is to be said of a file that was read in part, "" of others."""
    return part_note(self.share)


def part_note(share: float) -> str:
  """What is to be said of such a share of frames read, "" where all were."""
  if share == 1:
    return ""
  return (
    f"{share:.1%} of the frames wanted can be read; the nearest picture"
    " is shown for the others, which are damaged or missing."
  )


def read_video_features(
  path: str | os.PathLike, encoder: Encoder, progress: Progress
) -> VideoFeatures:
  """Encodes a video file.

  Frames are those that training on video files shows; below 128 seconds they
  are also those that extraction stores. While the devices encode a batch, the
  next one is decoded.

  Raises:
    UserError: the video cannot be read, or too little of it.
  """
  info = probe(path)
  indices = shown_frames(info.frames, info.duration)
  features = np.empty((len(indices), *encoder.shape), ml_dtypes.bfloat16)
  waiting, done = [], 0

  def collect() -> None:
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
  """A .npy file of features; read where they are used.

  Raises:
    UserError: it cannot be read, or does not hold floats.
  """
  if path.exists():
    schema.check_file(path, remedy="give a .npy file of features")
  try:
    features = np.load(path, mmap_mode="r")
  except Exception as error:  # numpy evaluates a header: of many types
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
  """Features as floats: numpy reads stored bfloat16 as two bytes without type.

  Raises:
    UserError: they are no floats.
  """
  if features.dtype.kind == "V" and features.dtype.itemsize == 2:
    return features.view(ml_dtypes.bfloat16)  # as numpy stores it
  if not jnp.issubdtype(features.dtype, jnp.floating):
    raise UserError(
      f"{name} holds {features.dtype}, features are bfloat16 or floats"
    )
  return features


def stored_duration(path: pathlib.Path, frames: int) -> float:
  """Seconds of a video, given a file of its features.

  As the store knows that the file lies in, else a frame is a second.

  Raises:
    UserError: no store knows it, and every video of up to 129 seconds has so
      many frames.
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
  """The store in a folder, if there is one."""
  if not next(folder.glob("index*.jsonl"), None):
    return None
  try:
    return FeatureStore(folder)
  except UserError:
    if (folder / TOWER_FILE).exists():
      raise
    return None  # an index of something else
