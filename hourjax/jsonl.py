"""JSON lines that outlive a kill: the index and the ledgers of a store."""
# MERGED hourjax.training.ledger:
# Files of JSON lines that a run appends to and that outlive its end.

import json
import math
import os
import pathlib
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from hourjax import schema
from hourjax.data.store.storage import Bucket, Folder
from hourjax.errors import UserError


class Lines:
  """A growing object of JSON lines with one writing process; thread-safe.

  A file is appended to, one `write` a line, so a kill can tear only the line
  in hand. An object of a bucket cannot grow and is written whole each time;
  lines that arrive during a write share the next one.
  """

  def __init__(
    self, storage: Folder | Bucket, key: str, rows: Iterable[dict] = ()
  ):
    """Nothing is written before the first `add`.

    Args:
      storage: where the object is.
      key: its name.
      rows: what it holds so far.
    """
    self._storage, self._key = storage, key
    self._rows, self._lines = list(rows), []  # rows until one is added
    self._written = 0
    self._appends = False
    self._lock, self._writing = threading.Lock(), threading.Lock()

  def add(self, row: dict) -> None:
    """Writes one row; it is in the object when this returns."""
    with self._lock:
      self._encode()
      self._lines.append(_line(row))
      mine = len(self._lines)
    with self._writing:
      if self._written < mine:
        self._write()

  def reset(self) -> None:
    """Writes the object as it is known here, e.g. empty."""
    with self._writing:
      self._appends = False
      self._write()

  def _encode(self):
    # Not at once: most stores are opened to read, with many lines.
    self._lines += map(_line, self._rows)
    self._rows = []

  def _write(self):
    with self._lock:
      self._encode()
      lines = list(self._lines)
    # The first write of a process is whole: it mends a torn last line. So is
    # the one after a failure.
    appends, self._appends = self._appends, False
    new = b"".join(lines[self._written :])
    if not (appends and self._storage.append(self._key, new)):
      self._storage.write(self._key, b"".join(lines))
    self._written, self._appends = len(lines), True


def read_lines(storage: Folder | Bucket, key: str) -> list[dict]:
  """Rows of an object of JSON lines.

  A last line without its end is what a killed process left: it is dropped
  unless it can be read.

  Raises:
    UserError: missing, or a line that is no JSON object.
  """
  where = storage.location(key)
  try:
    lines = storage.read(key).split(b"\n")
  except OSError as error:
    raise UserError(
      f"{where} cannot be read ({error}); bring it back from a copy, or delete"
      " it and extract again"
    ) from None
  schema.check_pointer(where, lines[0])
  torn, rows = lines.pop(), []
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
  try:
    last = json.loads(torn)
  except (ValueError, RecursionError):
    return rows
  return [*rows, last] if isinstance(last, dict) else rows


def _line(row: dict) -> bytes:
  return (json.dumps(row) + "\n").encode()


_MOST_BYTES = 2**30  # millions of lines


class Ledger:
  """Appends objects to a file, one a line, each written through at once."""

  def __init__(
    self, path: str | os.PathLike, rows: Iterable[Mapping[str, Any]] = ()
  ):
    """Replaces the file by `rows`, whole or not at all."""
    path = pathlib.Path(path)
    beside = path.with_name(f"{path.name}.new")
    with open(beside, "w") as file:
      file.writelines(map(_line_ledger, rows))
    os.replace(beside, path)
    self._file = open(path, "a")  # noqa: SIM115 (see close)

  def add(self, row: Mapping[str, Any]) -> None:
    """Writes one line.

    After an error, e.g. a full disk, what is left of the line waits in memory
    for the next one.
    """
    self._file.write(_line_ledger(row))
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def read_rows(
  path: str | os.PathLike, kinds: Mapping[str, type[schema.Schema]]
) -> list[dict[str, Any]]:
  """Objects of a ledger; a line that a kill left half-written is skipped.

  Args:
    path: of the file.
    kinds: what an object with a key looks like, by the key; the first one that
      it has counts. Objects with none of them are left out.

  Raises:
    UserError: missing or unreadable, or an object with values of other types.
  """
  remedy = "bring it back from a copy, or delete it"
  content = schema.read_bytes(path, remedy=remedy, most=_MOST_BYTES)
  rows = []
  for number, line in enumerate(content.split(b"\n"), start=1):
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if not isinstance(row, dict):
      continue
    for kind in [kinds[key] for key in kinds if key in row][:1]:
      where = f"{path}, line {number}"
      schema.validate(kind, row, where, remedy="delete the line")
      rows.append(row)
  return rows


def _line_ledger(row: Mapping[str, Any]) -> str:
  plain = {key: _plain(value) for key, value in row.items()}
  return json.dumps(plain, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
  """JSON has no numbers that are not finite: "NaN", "Infinity", "-Infinity".

  Strings, for null would not tell them apart; Python's float() reads them.
  """
  if not isinstance(value, float) or math.isfinite(value):
    return value
  if math.isnan(value):
    return "NaN"
  return "Infinity" if value > 0 else "-Infinity"
