"""`.npy` files of bfloat16 features, written in chunks."""

import errno
import io
import os
import pathlib
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt16

from hourjax.data.store.npy import read_header
from hourjax.errors import UserError
from hourjax.storage import Bucket, Folder


class Stored(NamedTuple):
  """Holds a video's entry in the index.

  Attributes:
    frames: number of stored frames.
    duration: of the video, in seconds.
  """

  frames: int
  duration: float


class FeatureWriter:
  """Writes one video's features to a temporary file, then moves it in place.

  As a context manager it calls `finish`, or `abandon` after an error.
  """

  def __init__(
    self,
    storage: Folder | Bucket,
    key: str,
    partial: pathlib.Path,
    stored: Stored,
    shape: tuple[int, int],
  ):
    """Opens the temporary file and writes its header.

    Args:
      storage: receives the finished array.
      key: name of the array in the storage.
      partial: temporary file.
      stored: number of frames that will be added, and the duration.
      shape: (Q, V) of each frame.
    """
    self.stored = stored
    self._storage, self._key, self._partial = storage, key, partial
    self._shape, self._frames = tuple(shape), 0
    self._file = io.FileIO(partial, "wb")
    try:
      self._write(header_bytes((stored.frames, *shape)))
    except BaseException:
      self.abandon()
      raise

  def __enter__(self) -> "FeatureWriter":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is None:
      self.finish()
    else:
      self.abandon()

  def add(self, features: Shaped[np.ndarray, "n Q V"]) -> None:
    """Appends frames.

    Args:
      features: of any float type; stored as bfloat16.

    Raises:
      UserError: some values are not finite in bfloat16.
      ValueError: the shape differs, or there are more frames than announced.
      OSError: the disk is full.
    """
    end = self._frames + len(features)
    if features.shape[1:] != self._shape or end > self.stored.frames:
      raise ValueError(
        f"{self._key}: features {features.shape} after {self._frames} frames,"
        f" announced are {(self.stored.frames, *self._shape)}"
      )
    bits = np.ascontiguousarray(features, ml_dtypes.bfloat16).view(np.uint16)
    if not is_finite(bits):
      raise UserError(
        f"frames {self._frames} to {end - 1}: the tower gives NaN or infinite"
        " features; check its weights"
      )
    self._write(bits.reshape(-1).view(np.uint8).data)
    self._frames = end

  def finish(self) -> None:
    """Moves the array to its place in the storage.

    Raises:
      UserError: the store's file system refuses the name.
      ValueError: there are fewer frames than announced.
      OSError: the disk is full.
    """
    try:
      if self._frames != self.stored.frames:
        raise ValueError(
          f"{self._key}: {self._frames} frames of {self.stored.frames}"
        )
      # The array must be on disk before the index line that refers to it.
      os.fsync(self._file)
      self._file.close()
      self._storage.put_file(self._partial, self._key)
    except OSError as error:
      self.abandon()
      if error.errno != errno.ENAMETOOLONG:
        raise
      raise UserError(
        f"the store cannot hold a file named {self._key} (too long); rename"
        " the video"
      ) from None
    except BaseException:
      self.abandon()
      raise

  def abandon(self) -> None:
    """Removes the temporary file."""
    self._file.close()
    self._partial.unlink(missing_ok=True)

  def _write(self, data: bytes | memoryview) -> None:
    """Writes all bytes of `data`."""
    view = memoryview(data)
    while view:  # unbuffered writes may take less, e.g. on a full disk
      view = view[self._file.write(view) :]


def header_bytes(shape: tuple[int, ...]) -> bytes:
  """Returns the header of a `.npy` file of bfloat16.

  Args:
    shape: (F, Q, V) of the array.
  """
  file = io.BytesIO()
  about = {"descr": "|V2", "fortran_order": False, "shape": tuple(shape)}
  np.lib.format.write_array_header_1_0(file, about)
  return file.getvalue()


def parse_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
  """Parses a `.npy` header.

  Returns:
    Shape and dtype of the array.

  Raises:
    OSError: the bytes are not such a header.
  """
  file = io.BytesIO(header)
  try:
    shape, dtype = read_header(file)
    if file.tell() != len(header):
      raise ValueError("another layout")
  except ValueError as error:
    raise OSError(f"not a .npy file of features: {error}") from None
  return shape, dtype


def is_finite(bits: UInt16[np.ndarray, "*any"]) -> bool:
  """Returns whether none of these bfloat16 values is NaN or infinite.

  Values that are not finite have all exponent bits set: 0x7f80 to 0x7fff, which
  are the largest int16, and 0xff80 to 0xffff, which are the largest uint16. Two
  maxima find them without temporary arrays.

  Args:
    bits: the values, viewed as uint16.
  """
  if not bits.size:
    return True
  return bool(bits.view(np.int16).max() < 0x7F80 and bits.max() < 0xFF80)
