"""Files of JSON lines that a run appends to and that outlive its end."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from hourjax import schema

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
      file.writelines(map(_line, rows))
    os.replace(beside, path)
    self._file = open(path, "a")  # noqa: SIM115 (see close)

  def add(self, row: Mapping[str, Any]) -> None:
    """Writes one line.

    After an error, e.g. a full disk, what is left of the line waits in memory
    for the next one.
    """
    self._file.write(_line(row))
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


def _line(row: Mapping[str, Any]) -> str:
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
