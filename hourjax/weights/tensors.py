"""Tensors of safetensors files, read a part at a time.

A file begins with 8 bytes that hold the length of a JSON header, then comes
the header, then the tensors as they lie in memory. Files are read from given
offsets and not mapped: pages of a mapped file count as memory of the process,
so that a model which is read that way takes twice its size.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import ml_dtypes
import numpy as np
from pydantic import Field

from hourjax import progress, schema
from hourjax.errors import UserError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MOST_HEADER = 100 * 2**20  # bytes, as in the format's own library
_BLOCK = 2 * 2**20  # values that are read and converted at a time
_PATCH = 128  # rows that are transposed at a time, to stay in the CPU's cache
_BAR_BYTES = 2**26  # from which on a progress bar is shown
_AGAIN = "copy it again"
_OTHER = "copy it again, or take another checkpoint"
_Count = Annotated[int, Field(ge=0, lt=2**60)]


class _Entry(schema.Schema):
  """Describes a tensor in a file's header."""

  dtype: str
  shape: list[_Count]
  data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Describes where a tensor lies.

  Attributes:
    name: in the file.
    file: that holds it.
    dtype: as the format names it, e.g. "BF16".
    shape: of the tensor.
    start: offset of its first byte in the file.
    end: offset after its last byte.
  """

  name: str
  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  start: int
  end: int


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Reads which tensors a file holds, by name.

  Args:
    path: of a safetensors file.

  Raises:
    UserError: the file is a Git-LFS pointer, was cut, or is not a safetensors
      file.
  """
  try:
    if path.exists() and not path.is_file():
      raise UserError(f"{path} is no regular file; {_AGAIN}")
    with path.open("rb") as file:
      size = os.fstat(file.fileno()).st_size
      first = file.read(8)
      length = int.from_bytes(first, "little")
      schema.check_pointer(path, first + file.read(100))
      file.seek(8)
      if len(first) < 8 or not 2 <= length <= min(_MOST_HEADER, size - 8):
        raise _unreadable(path, f"a header of {length} bytes in {size}")
      header = file.read(length)
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}; {_AGAIN}") from None
  raw = schema.parse_json(header, f"the header of {path}", remedy=_AGAIN)
  if not isinstance(raw, dict):
    raise _unreadable(path, "the header is no JSON object")
  raw.pop("__metadata__", None)
  tensors = {
    name: _tensor(path, name, entry, 8 + length) for name, entry in raw.items()
  }
  _check_extent(path, tensors, 8 + length, size)
  return tensors


def _tensor(path: pathlib.Path, name: str, raw: Any, first: int) -> Tensor:
  """Checks an entry of the header; `first` is the tensors' first byte."""
  where = f"the header of {path}, {schema.shorten(name)}"
  entry = schema.validate(_Entry, raw, where, remedy=_AGAIN)
  start, end = entry.data_offsets
  if entry.dtype in DTYPES:
    size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    if end - start != size:
      raise _unreadable(
        path, f"{name} has {end - start} bytes, its shape takes {size}"
      )
  shape = tuple(entry.shape)
  return Tensor(name, path, entry.dtype, shape, first + start, first + end)


def _check_extent(
  path: pathlib.Path, tensors: dict[str, Tensor], first: int, size: int
) -> None:
  """Raises unless the tensors fill the file, one after the other."""
  at = first
  for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
    if tensor.start != at or tensor.end < at:
      raise _unreadable(
        path, f"{tensor.name} begins at byte {tensor.start} instead of {at}"
      )
    at = tensor.end
  if at != size:
    raise _unreadable(path, f"{size} bytes instead of {at}")


def _unreadable(path: pathlib.Path, reason: str) -> UserError:
  return UserError(
    f"{path} is not a readable safetensors file ({reason}); {_AGAIN}"
  )


class TensorReader:
  """Reads tensors of several files, which it opens once, in blocks of rows."""

  def __init__(self, tensors: dict[str, Tensor]):
    """Stores which tensors there are; files are opened on `__enter__`.

    Args:
      tensors: by the name under which they are read.
    """
    self._tensors = tensors
    self._files = contextlib.ExitStack()
    self._open: dict[pathlib.Path, int] = {}

  def __enter__(self) -> "TensorReader":
    """Opens the files."""
    for path in {tensor.file for tensor in self._tensors.values()}:
      try:
        self._open[path] = os.open(path, os.O_RDONLY)
      except OSError as error:
        self.__exit__()
        raise UserError(
          f"cannot read {path}: {error.strerror}; {_AGAIN}"
        ) from None
      self._files.callback(os.close, self._open[path])
    return self

  def __exit__(self, *_: object) -> None:
    """Closes the files."""
    self._files.close()

  def __getitem__(self, name: str) -> Tensor:
    """Returns where a tensor lies."""
    return self._tensors[name]

  def names(self) -> set[str]:
    """Returns the names of all tensors."""
    return set(self._tensors)

  def rows(
    self, name: str, start: int, stop: int, dtype: np.dtype
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Reads rows of a tensor in blocks.

    Args:
      name: of the tensor.
      start: first row.
      stop: row after the last one.
      dtype: of the blocks.

    Yields:
      The number of a block's first row, and the block.

    Raises:
      UserError: a value is not finite, or the file ends too early.
    """
    tensor = self._tensors[name]
    own = DTYPES[tensor.dtype]
    width = math.prod(tensor.shape[1:])
    step = max(1, _BLOCK // max(1, width))
    for first in range(start, stop, step):
      count = min(step, stop - first)
      block = np.empty((count, *tensor.shape[1:]), own)
      self._fill(tensor, block, first * width * own.itemsize)
      with np.errstate(over="ignore", invalid="ignore"):
        block = block.astype(dtype, copy=False)
      check_finite(f"{tensor.file}: {name}", block, _OTHER)
      yield first, block

  def fill(self, name: str, target: np.ndarray, start: int) -> bool:
    """Reads rows directly into `target` if its dtype and layout allow it.

    Args:
      name: of the tensor.
      target: array of as many whole rows as are wanted.
      start: number of the first row.

    Returns:
      Whether the rows were read. If not, the dtype differs from the file's or
      the array is not contiguous, and nothing was read.

    Raises:
      UserError: a value is not finite, or the file ends too early.
    """
    tensor = self._tensors[name]
    if target.dtype != DTYPES[tensor.dtype] or not target.flags.c_contiguous:
      return False
    flat = target.reshape(-1)
    width = math.prod(tensor.shape[1:])
    for first in range(0, flat.size, _BLOCK):
      block = flat[first : first + _BLOCK]
      self._fill(tensor, block, (start * width + first) * block.itemsize)
      check_finite(f"{tensor.file}: {name}", block, _OTHER)
    return True

  def _fill(self, tensor: Tensor, block: np.ndarray, offset: int) -> None:
    view = block.reshape(-1).view(np.uint8).data
    at, file = tensor.start + offset, self._open[tensor.file]
    while view:
      try:
        count = os.preadv(file, [view], at)
      except OSError as error:
        raise UserError(
          f"cannot read {tensor.file}: {error.strerror}; {_AGAIN}"
        ) from None
      if not count:
        raise _unreadable(tensor.file, f"it ends before byte {at + 1}")
      view, at = view[count:], at + count


def transpose(target: np.ndarray, block: np.ndarray) -> None:
  """Writes block.T into `target`.

  It is done in patches that stay in the CPU's cache, which is four times as
  fast as all at once; and as integers, because numpy copies dtypes that are
  not its own (bfloat16) one value at a time.

  Args:
    target: that is written, contiguous or not.
    block: of rows.
  """
  if target.dtype == block.dtype:
    kind = np.dtype(f"u{block.itemsize}")
    target, block = target.view(kind), block.view(kind)
  for row in range(0, len(block), _PATCH):
    target[:, row : row + _PATCH] = block[row : row + _PATCH].T


def check_finite(where: str, block: np.ndarray, remedy: str) -> None:
  """Raises if a value is infinite or NaN: its exponent's bits are all ones.

  Args:
    where: the values come from, for the message.
    block: contiguous array.
    remedy: what the user can do, as the last words of the message.
  """
  size = block.dtype.itemsize
  limit = {
    np.dtype(np.float64): 0x7FF0 << 48,
    np.dtype(np.float32): 0x7F80 << 16,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
  }[block.dtype]
  if not block.size:
    return
  # Read as signed integers, positive floats are ordered as floats are; read as
  # unsigned integers, negative ones come last, ordered by magnitude. A maximum
  # needs no memory and a hundredth of the time of the copy.
  negative = limit + (1 << (8 * size - 1))
  if (
    block.view(f"i{size}").max() >= limit
    or block.view(f"u{size}").max() >= negative
  ):
    wrong = int((~np.isfinite(block.astype(np.float64))).sum())
    raise UserError(
      f"{where} is not finite as {block.dtype} in {wrong} of {block.size}"
      f" values looked at, and nothing can be answered with it; {remedy}"
    )


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """Returns an empty array at an address that is a multiple of 64.

  JAX uses such an array on the CPU without copying it.

  Args:
    shape: of the array.
    dtype: of the array.
  """
  dtype = np.dtype(dtype)
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)


def in_threads(function: Callable[[Any], object], jobs: Sequence[Any]) -> None:
  """Calls a function for every job in a few threads.

  Args:
    function: called with a job.
    jobs: of which some run at a time. After the first error no job is started
      any more, and the error is raised.
  """
  workers = min(4, os.cpu_count() or 1, len(jobs))
  if workers < 2:
    for job in jobs:
      function(job)
    return
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    running = [pool.submit(function, job) for job in jobs]
    try:
      for future in concurrent.futures.as_completed(running):
        future.result()
    except BaseException:
      for future in running:
        future.cancel()
      raise


class MegabyteBar:
  """Shows a bar over megabytes if there are many; threads may share it."""

  def __init__(self, total: int, desc: str, *, shown: bool = True):
    """Draws the bar.

    Args:
      total: number of bytes.
      desc: what is shown before the bar.
      shown: whether there may be a bar.
    """
    self._bar = None
    if shown and total >= _BAR_BYTES:
      self._bar = progress.bar(total >> 20, unit="MB", desc=desc)
    self._lock, self._done = threading.Lock(), 0

  def __enter__(self) -> Callable[[int], None]:
    """Returns what is called with the number of bytes of each piece."""
    return self._add

  def __exit__(self, *_: object) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()

  def _add(self, size: int) -> None:
    with self._lock:
      self._done += size
      if self._bar is not None:
        self._bar.update((self._done >> 20) - self._bar.n)
