"""Images inside parquet files, named like files below them.

    ai2d/train-00000-of-00001.parquet/image/12      row 12 of column image
    m4/train-00003-of-00010.parquet/images/7.1      the second image of row 7

Hugging Face's data sets hold their images in this way, a hundred rows to a
group. Reading one image reads its group's column, which stays in memory for the
next few reads; nothing else is read, and files are not unpacked.
"""

import collections
import os
import pathlib
import threading
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from hourjax.errors import UserError

SUFFIX = ".parquet"
MOST_GROUP = 64 << 20  # bytes of a group's images that are read for one

_FILES = 8  # whose rows are known at a time
_GROUPS = 2  # whose images are in memory at a time

_lock = threading.Lock()
_files: collections.OrderedDict[str, tuple] = collections.OrderedDict()
_groups: collections.OrderedDict[tuple, Any] = collections.OrderedDict()


def name_of(
  file: str | os.PathLike, column: str, row: int, position: int | None
) -> str:
  """The name of an image; `position` is in a list of images, else None."""
  at = f"{row}" if position is None else f"{row}.{position}"
  return f"{os.fspath(file)}/{column}/{at}"


def inside(path: str | os.PathLike) -> pathlib.Path | None:
  """The parquet file that holds the image of a name, None for other files."""
  parts = pathlib.Path(path).parts
  if len(parts) < 3 or not parts[-3].lower().endswith(SUFFIX):
    return None
  file = pathlib.Path(*parts[:-2])
  # Path.is_file() raises where the name is too long.
  return file if os.path.isfile(file) else None


def read(path: str | os.PathLike) -> bytes:
  """The bytes of an image by its name.

  Raises:
    UserError: no such row or column, or the file is damaged.
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
  """Refuses a file whose groups are too large to be read for one image.

  Raises:
    UserError: names the largest group's bytes.
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
  # A changed file is another one.
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


def _cached(cache: collections.OrderedDict, key: Any, most: int, make) -> Any:
  with _lock:
    found = cache.get(key)
    if found is not None:
      cache.move_to_end(key)
      return found
  made = make()  # several threads may read at a time
  with _lock:
    cache[key] = made
    while len(cache) > most:
      cache.popitem(last=False)
  return made


def _starts(file: str) -> np.ndarray:
  """The first row of each group, and the number of rows."""
  metadata = pyarrow.parquet.read_metadata(file)
  groups = range(metadata.num_row_groups)
  rows = [metadata.row_group(i).num_rows for i in groups]
  return np.cumsum([0, *rows])


def _group(file: str, column: str, group: int) -> Any:
  with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
    if column not in table.schema_arrow.names:
      raise LookupError(f"no column {column!r}")
    return table.read_row_group(
      group, columns=[column], use_threads=False
    ).column(0)
