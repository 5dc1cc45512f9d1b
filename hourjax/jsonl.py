"""JSON-lines files that lose at most the last line when a process is killed.

The indexes and failure lists of a feature store, the metrics of a run and the
answers of an evaluation are all written by `JsonlWriter`. They are read in two
ways: `read_rows` refuses a file with a broken line, since a store must not
silently lose a video; `parse_rows` and `read_valid_rows` skip broken lines,
since a run or an evaluation can make up for them.
"""

import json
import math
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from hourjax import schema
from hourjax.errors import UserError
from hourjax.storage import Bucket, Folder

Row = dict[str, Any]
_MOST_BYTES = 2**30  # millions of lines


class JsonlWriter:
  """Appends rows to one file or object, one a line; safe for threads.

  One process writes to a file. Each call of `add` is a single write, so a kill
  leaves all of its rows or cuts the last line, which readers drop. An object of
  a bucket cannot grow, so it is written whole each time, from memory; rows that
  arrive during such a write share the next one.

  After an error, for instance of a full disk, the rows that are not yet in the
  file stay in memory and are written with the next ones.

  JSON has no numbers that are not finite: they are written as the strings
  "NaN", "Infinity" and "-Infinity", which Python's float() reads.
  """

  def __init__(
    self,
    storage: Folder | Bucket,
    key: str,
    rows: Iterable[Mapping[str, Any]] | None = None,
  ):
    """Writes nothing before the first `add` or `open`.

    Args:
      storage: the folder or bucket of the file.
      key: its name there.
      rows: what the file shall begin with, instead of what is there; by
        default what is there stays, and a last line that a kill cut off is
        removed.
    """
    self._storage, self._key = storage, key
    self._rows = None if rows is None else list(rows)
    # `_lock` guards the rows that wait and their count, `_writing` the file.
    self._lock, self._writing = threading.Lock(), threading.Lock()
    self._waiting: list[bytes] = []
    self._added = self._written = 0
    self._unwritten = b""  # of a folder's file: taken, but not yet written
    self._file: BinaryIO | None = None
    self._content: bytes | None = None  # of a bucket's object

  @classmethod
  def at(
    cls,
    path: str | os.PathLike,
    rows: Iterable[Mapping[str, Any]] | None = None,
  ) -> "JsonlWriter":
    """Returns a writer of the file at a path; see `__init__`."""
    path = pathlib.Path(path)
    return cls(Folder(path.parent), path.name, rows)

  def open(self) -> None:
    """Creates the file now, with the rows that it shall begin with.

    Raises:
      OSError: it cannot be written.
    """
    with self._writing:
      self._flush()

  def add(self, *rows: Mapping[str, Any]) -> None:
    """Writes rows; they are in the file when this returns.

    Raises:
      OSError: they cannot be written, or only in part; the rest waits for the
        next call.
    """
    lines = b"".join(map(_line, rows))
    with self._lock:
      self._waiting.append(lines)
      self._added += 1
      mine = self._added
    with self._writing:
      # Another thread may have written these rows with its own.
      if self._written < mine:
        self._flush()

  def close(self) -> None:
    """Closes the file; rows that an error held back are tried once more."""
    with self._writing:
      try:
        if self._unwritten:
          self._flush()
      finally:
        if self._file is not None:
          self._file.close()
          self._file = None

  def _flush(self) -> None:
    """Writes all rows that wait."""
    with self._lock:
      added = self._added
      lines = b"".join(self._waiting)
      self._waiting.clear()
    if isinstance(self._storage, Folder):
      self._unwritten += lines
      self._append(self._storage)
    else:
      self._content = self._begin() + lines
      self._storage.write(self._key, self._content)
    self._written = added

  def _append(self, folder: Folder) -> None:
    """Writes `_unwritten` to the end of a file, which stays open."""
    if self._file is None:
      path = folder.location(self._key)
      if self._rows is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
      else:
        folder.write(self._key, b"".join(map(_line, self._rows)))
        self._rows = None  # a file that is opened again is continued
      self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (see close)
    while self._unwritten:
      count = self._file.write(self._unwritten)
      self._unwritten = self._unwritten[count:]

  def _begin(self) -> bytes:
    """Returns what an object of a bucket holds so far."""
    if self._content is not None:
      return self._content
    if self._rows is not None:
      return b"".join(map(_line, self._rows))
    try:
      return _without_torn_line(self._storage.read(self._key))
    except FileNotFoundError:
      return b""


def parse_rows(content: bytes) -> Iterator[tuple[int, Row]]:
  """Yields the number of each line, from 1, and its JSON object.

  Lines that are no JSON object are left out: half a line as a kill leaves it,
  an empty line, another JSON value.
  """
  for number, line in enumerate(content.split(b"\n"), start=1):
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(row, dict):
      yield number, row


def read_valid_rows(
  path: str | os.PathLike,
  kinds: Mapping[str, type[schema.Schema]],
  *,
  remedy: str = "bring it back from a copy, or delete it",
) -> list[Row]:
  """Reads the rows of a file of one or several kinds, and checks their types.

  Broken lines and rows of no known kind are left out.

  Args:
    path: of the file.
    kinds: what a row that has a certain key must look like, by that key; the
      first key that a row has counts.
    remedy: what the user can do where the file cannot be read.

  Raises:
    UserError: the file is missing or unreadable, or a row has values of other
      types; names the line.
  """
  content = schema.read_bytes(path, remedy=remedy, most=_MOST_BYTES)
  rows = []
  for number, row in parse_rows(content):
    for kind in [kinds[key] for key in kinds if key in row][:1]:
      where = f"{path}, line {number}"
      schema.validate(kind, row, where, remedy="delete the line")
      rows.append(row)
  return rows


def read_rows(storage: Folder | Bucket, key: str) -> list[Row]:
  """Reads all rows of a file, none of which may be broken.

  Only the last line may lack its end, as a killed process leaves it; it is left
  out unless it can be read.

  Args:
    storage: the folder or bucket of the file.
    key: its name there.

  Raises:
    UserError: the file is missing, or a line is no JSON object.
  """
  where = storage.location(key)
  try:
    content = storage.read(key)
  except OSError as error:
    raise UserError(
      f"{where} cannot be read ({error}); bring it back from a copy, or delete"
      " it and extract again"
    ) from None
  schema.check_pointer(where, content)
  rows = []
  *lines, torn = content.split(b"\n")
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      if not isinstance(row, dict):
        raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
      raise UserError(
        f"{where}, line {number} is broken ({error}); delete the line and run"
        " again"
      ) from None
    rows.append(row)
  rows.extend(row for _, row in parse_rows(torn))
  return rows


def _without_torn_line(content: bytes) -> bytes:
  """Returns content that ends with a whole line, to which rows can be added."""
  whole, newline, torn = content.rpartition(b"\n")
  if not torn:
    return content
  if any(True for _ in parse_rows(torn)):
    return content + b"\n"  # written by hand, or cut right before its end
  return whole + newline


def _cut_torn_line(path: pathlib.Path) -> None:
  """Removes the last line of a file if a kill cut it off."""
  if not path.exists():
    return
  with open(path, "rb+") as file:
    # Not the whole file: it may be large, and lines are short.
    size = file.seek(0, os.SEEK_END)
    tail, start = b"", size
    while start and b"\n" not in tail:
      start = max(0, start - 2**16)
      file.seek(start)
      tail = file.read()
    mended = _without_torn_line(tail)
    if len(mended) > len(tail):
      file.write(b"\n")  # at the end, where reading has left off
    else:
      file.truncate(start + len(mended))


def _line(row: Mapping[str, Any]) -> bytes:
  """Returns the JSON text of a row, with the end of its line."""
  plain = {key: _plain(value) for key, value in row.items()}
  return (json.dumps(plain, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
  """Returns a value that JSON can express.

  Strings and not null, which would not tell the three apart.
  """
  if not isinstance(value, float) or math.isfinite(value):
    return value
  if math.isnan(value):
    return "NaN"
  return "Infinity" if value > 0 else "-Infinity"
