"""Images inside parquet files, named like files below them.

    ai2d/train-00000-of-00001.parquet/image/12      row 12 of column image
    m4/train-00003-of-00010.parquet/images/7.1      the second image of row 7

Hugging Face's datasets hold their images in this way, about a hundred rows in a
row group. Reading one image reads the column of its row group, which stays in
memory for the next few reads. Nothing else is read, and no file is unpacked.
"""

import collections
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from hourjax.errors import UserError

SUFFIX = ".parquet"
MOST_GROUP = 64 << 20  # most bytes of a group's images, read for one of them

_FILES = 8  # files whose row counts are cached
_GROUPS = 2  # groups whose images are cached

_lock = threading.Lock()
_files: collections.OrderedDict[str, tuple] = collections.OrderedDict()
_groups: collections.OrderedDict[tuple, Any] = collections.OrderedDict()


def name_of(
  file: str | os.PathLike, column: str, row: int, position: int | None
) -> str:
  """Returns the name of an image inside a parquet file.

  Args:
    file: path of the parquet file.
    column: that holds the images.
    row: of the image.
    position: in the row's list of images, None if the row has one image.
  """
  at = f"{row}" if position is None else f"{row}.{position}"
  return f"{os.fspath(file)}/{column}/{at}"


def inside(path: str | os.PathLike) -> pathlib.Path | None:
  """Returns the parquet file that an image's name refers to, None if none."""
  parts = pathlib.Path(path).parts
  if len(parts) < 3 or not parts[-3].lower().endswith(SUFFIX):
    return None
  file = pathlib.Path(*parts[:-2])
  # Path.is_file() raises where the name is too long.
  return file if os.path.isfile(file) else None


def read(path: str | os.PathLike) -> bytes:
  """Reads the encoded bytes of an image inside a parquet file.

  Args:
    path: name of the image, see `name_of`.

  Raises:
    UserError: there is no such row or column, or the file is damaged.
  """
  file = inside(path)
  if file is None:
    raise UserError(f"{path} is in no parquet file; fetch it", kind="missing")
  column, at = pathlib.Path(path).parts[-2:]
  row, dot, position = at.partition(".")
  try:
    found = _row(os.fspath(file), column, int(row))
    found = found[int(position)] if dot else found
    content = found["bytes"] if isinstance(found, dict) else found
  except (pyarrow.ArrowException, OSError) as error:
    raise UserError(
      f"{path} cannot be read ({error}); fetch it again", kind="damaged"
    ) from error
  except (ValueError, LookupError, TypeError) as error:
    raise UserError(
      f"{path}: no such image ({error}); prepare the records anew",
      kind="missing",
    ) from error
  if not isinstance(content, bytes):
    raise UserError(f"{path} holds no bytes; drop the record", kind="damaged")
  return content


def check_groups(path: str | os.PathLike, column: str) -> None:
  """Refuses a file whose row groups are too large to be read for one image.

  Args:
    path: of the parquet file.
    column: that holds the images.

  Raises:
    UserError: with the size of the largest group.
  """
  metadata = pyarrow.parquet.read_metadata(path)
  most = 0
  for i in range(metadata.num_row_groups):
    group = metadata.row_group(i)
    chunks = (group.column(k) for k in range(group.num_columns))
    sizes = (
      chunk.total_uncompressed_size
      for chunk in chunks
      if chunk.path_in_schema.split(".")[0] == column
    )
    most = max(most, sum(sizes))
  if most > MOST_GROUP:
    raise UserError(
      f"{path} has groups of up to {most >> 20} MiB of images, read for one of"
      f" them ({MOST_GROUP >> 20} MiB at most); unpack them"
    )


def _row(file: str, column: str, row: int) -> Any:
  """Returns a row's value, through the caches of row counts and images."""
  # A file that was changed must not be read from the cache.
  stat = os.stat(file)
  key = (file, stat.st_size, stat.st_mtime_ns)
  starts = _cached(_files, key, _FILES, lambda: _starts(file))
  if not 0 <= row < starts[-1]:
    raise IndexError(f"row {row} of {starts[-1]}")
  at = int(np.searchsorted(starts, row, side="right")) - 1
  images = _cached(
    _groups, (*key, column, at), _GROUPS, lambda: _group(file, column, at)
  )
  return images[row - int(starts[at])].as_py()


def _cached(
  cache: collections.OrderedDict,
  key: Any,
  most: int,
  make: Callable[[], Any],
) -> Any:
  """Returns a value of a cache of the last `most` ones, made if missing."""
  with _lock:
    found = cache.get(key)
    if found is not None:
      cache.move_to_end(key)
      return found
  made = make()  # outside of the lock: several threads may read at a time
  with _lock:
    cache[key] = made
    while len(cache) > most:
      cache.popitem(last=False)
  return made


def _starts(file: str) -> np.ndarray:
  """Returns the first row of each group, and the number of rows at the end."""
  metadata = pyarrow.parquet.read_metadata(file)
  groups = range(metadata.num_row_groups)
  rows = [metadata.row_group(i).num_rows for i in groups]
  return np.cumsum([0, *rows])


def _group(file: str, column: str, group: int) -> Any:
  """Reads one column of a row group."""
  with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
    if column not in table.schema_arrow.names:
      raise LookupError(f"no column {column!r}")
    return table.read_row_group(
      group, columns=[column], use_threads=False
    ).column(0)
