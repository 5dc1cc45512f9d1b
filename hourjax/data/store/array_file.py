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
  """What the index knows of a video: frames stored and seconds of video."""

  frames: int
  duration: float


class FeatureWriter:
  """Writes one video's features to a temporary file, then moves it in place.

  As a context manager it finishes, or leaves nothing if an error passes.
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
      storage: where the array goes in the end.
      key: under which name.
      partial: temporary file.
      stored: frames that will come, and the duration.
      shape: (Q, V) of each.
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

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind is None:
      self.finish()
    else:
      self.abandon()

  def add(self, features: Shaped[np.ndarray, "n Q V"]) -> None:
    """Appends frames, in any float type.

    Raises:
      UserError: values that are not finite in bfloat16.
      ValueError: another shape, or more frames than announced.
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
    self._write(bits.reshape(-1).view(np.uint8))
    self._frames = end

  def finish(self) -> None:
    """Puts the array in place.

    Raises:
      UserError: the store's file system refuses the name.
      ValueError: fewer frames than announced.
      OSError: the disk is full.
    """
    try:
      if self._frames != self.stored.frames:
        raise ValueError(
          f"{self._key}: {self._frames} frames of {self.stored.frames}"
        )
      # The index line must not reach the disk before what it speaks of.
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
    """Removes what was written."""
    self._file.close()
    self._partial.unlink(missing_ok=True)

  def _write(self, data) -> None:
    view = memoryview(data)
    while view:  # unbuffered writes may take less, e.g. on a full disk
      view = view[self._file.write(view) :]


def header_bytes(shape: tuple[int, int, int]) -> bytes:
  """What precedes the values in a `.npy` of bfloat16."""
  file = io.BytesIO()
  about = {"descr": "|V2", "fortran_order": False, "shape": tuple(shape)}
  np.lib.format.write_array_header_1_0(file, about)
  return file.getvalue()


def parse_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
  """Shape and dtype that a `.npy` header states.

  Raises:
    OSError: it is none.
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
  """Whether no bfloat16 among these bits is NaN or infinite.

  All exponent bits are set in 0x7f80 to 0x7fff, the largest int16, and in
  0xff80 to 0xffff, the largest uint16: two maxima, without temporaries.
  """
  if not bits.size:
    return True
  return bool(bits.view(np.int16).max() < 0x7F80 and bits.max() < 0xFF80)
