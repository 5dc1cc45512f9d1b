"""A video file to features in memory: what `extract` stores, not stored."""

import os
from collections.abc import Callable

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from hourjax.data.video import decode_frames, extraction_frames, probe
from hourjax.errors import UserError
from hourjax.inference.encoder import Encoder

# Told how many frames are done, and of how many.
Progress = Callable[[int, int], None]


def read_film(
  path: str | os.PathLike, encoder: Encoder, progress: Progress
) -> tuple[Shaped[np.ndarray, "F Q V"], float]:
  """Features of a video in bfloat16, and its duration in seconds.

  Frames, their order and their values are those that extraction stores.
  While the devices encode a batch, the next one is decoded.

  Raises:
    UserError: the video cannot be read, or lasts less than a second.
  """
  info = probe(path)
  indices, duration = extraction_frames(info.frames, info.fps)
  if duration < 1:
    raise UserError(
      f"{path} lasts {duration:.2f} seconds and one frame a second is looked"
      " at; give a video of at least 1 second"
    )
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
  chunks = decode_frames(path, indices, side, info=info, batch=encoder.batch)
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
  return features, duration
