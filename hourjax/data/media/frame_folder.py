"""Videos that are folders of images, as LLaVA-Hound has its videos.

ShareGPTVideo (`shareVideoGPTV` in LLaVA-Video's lists) publishes frames in
place of videos: one folder for each video, which the official loader reads as
two frames a second. Frames are ordered by the numbers in their names:

    frame_1.jpg  frame_2.jpg  frame_10.jpg
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int, UInt8

from hourjax.data.media.images import image_size, load_image, resize
from hourjax.errors import UserError

FPS = Fraction(2)

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_NUMBER = re.compile(r"(\d+)")


def frame_files(path: str | os.PathLike) -> list[str]:
  """Returns the paths of a folder's images in frame order.

  Files of other kinds are left out.

  Raises:
    UserError: there are no images, or the folder cannot be read.
  """
  try:
    names = os.listdir(path)
  except OSError as error:
    raise UserError(
      f"cannot read video {path}: {error.strerror}", kind="missing"
    ) from error
  names = [
    name
    for name in names
    if name.lower().endswith(tuple(ENDINGS)) and not name.startswith(".")
  ]
  if not names:
    raise UserError(
      f"{path} is not a video but a folder without frames (files that end with"
      f" {', '.join(sorted(ENDINGS))}); fetch the video's frames, or name a"
      " video file"
    )
  return [os.path.join(path, name) for name in sorted(names, key=_order)]


def probe(path: str | os.PathLike) -> tuple[int, Fraction, float, int, int]:
  """Reads a folder's number of frames, rate, duration and frame size.

  Returns:
    Number of frames, frames a second, seconds, and width and height in pixels
    of the first frame that can be read.

  Raises:
    UserError: as `frame_files`; or no frame can be read.
  """
  files = frame_files(path)
  for file in files:
    with contextlib.suppress(UserError):
      return len(files), FPS, float(len(files) / FPS), *image_size(file)
  raise UserError(
    f"{path}: none of its {len(files)} frames can be read; fetch them again",
    kind="damaged",
  )


def decode_frames(
  path: str | os.PathLike,
  indices: Sequence[int] | Int[np.ndarray, "F"],
  size: int | tuple[int, int],
  batch: int = 64,
  failed: list[UserError] | None = None,
) -> Iterator[UInt8[np.ndarray, "n height width 3"]]:
  """Reads frames, resized to a square like any image.

  Args:
    path: of the folder.
    indices: frames to read, ascending; one may occur several times.
    size: side of the square, or width and height, in pixels.
    batch: frames yielded at a time.
    failed: receives an error for each frame that cannot be read, which is then
      replaced by the nearest frame that can; if None, the error is raised.

  Yields:
    uint8 RGB frames, `batch` at a time; the last batch may be smaller.

  Raises:
    UserError: a frame is missing, or cannot be read and is not replaced.
  """
  files = frame_files(path)
  if len(indices) and max(indices) >= len(files):
    raise UserError(
      f"{path} has {len(files)} frames but frame {max(indices)} is needed;"
      " frames are missing, fetch them again"
    )
  pending, last, frame = [], -1, None
  for index in indices:
    if index != last:
      frame, last = resize(_load(files, int(index), failed), size), index
    pending.append(frame)
    if len(pending) == batch:
      yield np.stack(pending)
      pending = []
  if pending:
    yield np.stack(pending)


def frame_at(
  path: str | os.PathLike, second: float, size: int
) -> UInt8[np.ndarray, "size size 3"]:
  """Reads the frame at one moment.

  Args:
    path: of the folder.
    second: since the first frame; beyond the end, the last frame is returned.
    size: side of the result, in pixels.

  Raises:
    UserError: as `decode_frames`.
  """
  files = frame_files(path)
  number = min(int(max(second, 0) * FPS), len(files) - 1)
  return resize(load_image(files[number]), size)


def _load(
  files: Sequence[str], index: int, failed: list[UserError] | None
) -> UInt8[np.ndarray, "height width 3"]:
  """Reads a frame, or the nearest one that can be read, the earlier of two."""
  try:
    return load_image(files[index])
  except UserError as error:
    if failed is None:
      raise
    failed.append(error)
  for other in sorted(range(len(files)), key=lambda n: abs(n - index)):
    with contextlib.suppress(UserError):
      return load_image(files[other])
  raise failed[-1]


def _order(name: str) -> tuple:
  """Returns a sort key in which digits count by value: a2 before a10."""
  parts = _NUMBER.split(name)
  values = tuple(int(p) if i % 2 else p for i, p in enumerate(parts))
  return values, name
