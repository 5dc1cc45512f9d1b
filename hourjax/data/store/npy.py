"""Headers of `.npy` arrays of unknown origin."""

import io
import math

import numpy as np


def read_header(file: io.BufferedIOBase) -> tuple[tuple[int, ...], np.dtype]:
  """Reads the header of a `.npy` array in C order.

  No memory is allocated for the shape that it states. Compare `array_bytes`
  with the size of the file before the values are read.

  Args:
    file: at the start of the header; then at the first value.

  Returns:
    Shape and dtype.

  Raises:
    ValueError: there is no such header, or the layout is not supported.
  """
  try:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
      raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
  except Exception as error:  # numpy evaluates a literal: errors of any type
    raise ValueError(f"no header of an array: {error}") from None
  if fortran or dtype.hasobject or any(size < 0 for size in shape):
    raise ValueError(f"an array {shape} of {dtype} in another layout")
  return shape, dtype


def array_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
  """Returns the bytes of an array, which may be more than int64 holds."""
  return math.prod(shape) * dtype.itemsize
