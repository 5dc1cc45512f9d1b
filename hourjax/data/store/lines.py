"""JSON lines that outlive a kill: the index and the ledgers of a store."""

import json
import threading
from collections.abc import Iterable

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
