"""Headers of `.npy` arrays, read without trust in what they claim."""

import io
import math

import numpy as np


def read_header(file: io.BufferedIOBase) -> tuple[tuple[int, ...], np.dtype]:
  """Reads the header of a `.npy` array in C order.

  No memory is taken for what it claims: compare `array_bytes` with the bytes
  that there are.

  Returns:
    Shape and dtype. The file then stands at the first value.

  Raises:
    ValueError: it is none, or of a layout that is not read here.
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
  """Bytes of an array, as a Python integer: a claim may be beyond int64."""
  return math.prod(shape) * dtype.itemsize
