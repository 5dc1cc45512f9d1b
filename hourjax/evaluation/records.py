"""The folder of an evaluation: what was asked, answered and left out.

    OUT/run.json              what the answers depend on
    OUT/answers-00000.jsonl   a worker's answers, one record a question
    OUT/missing-00000.jsonl   questions that a worker could not ask, and why

A worker writes files of its own and reads those of all workers. So any number
of workers may use one folder, at the same time or one after the other.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pydantic

from hourjax import schema
from hourjax.atomic_file import write_file
from hourjax.errors import UserError
from hourjax.jsonl import JsonlWriter, parse_rows

Row = dict[str, Any]
# These may differ when a run goes on: a new parser reads the old answers again,
# and videos that were missing before may have sparse features.
_MAY_CHANGE = frozenset({"parser", "sparse"})
_RUN = "run.json"
_MOST_BYTES = 2**30  # of one worker's file


class _Answer(schema.Schema):
  """Describes the fields of an answer's record that are read again."""

  id: str
  answer: str
  finished: bool = True
  seconds: float = pydantic.Field(0.0, ge=0)


class _Missing(schema.Schema):
  """Describes the record of a question that could not be asked."""

  id: str
  reason: str
  workers: int | None = None


class Records:
  """Reads the records of all workers in a folder, writes those of one."""

  def __init__(
    self,
    out: str | os.PathLike,
    worker: int = 0,
    workers: int | None = None,
  ):
    """Opens a folder without touching it.

    Args:
      out: folder of the evaluation; all workers use the same one.
      worker: index of this process among those that write.
      workers: number of workers; None if none is asking. Questions that could
        not be asked by a run of another number of workers are asked again.
    """
    self.folder = pathlib.Path(out)
    self._workers = workers
    self._answers = JsonlWriter.at(self.folder / f"answers-{worker:05d}.jsonl")
    missing = self.folder / f"missing-{worker:05d}.jsonl"
    self._missing_path, self._missing = missing, JsonlWriter.at(missing)

  def claim(self, about: Mapping[str, Any]) -> None:
    """Makes the folder that of one run, or checks that it is.

    This worker's list of missing questions is emptied, because they are asked
    again.

    Args:
      about: what the answers depend on, as JSON values.

    Raises:
      UserError: the folder holds another run (the message names each
        difference), or cannot be written to.
    """
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._claim(dict(about))
      self._missing_path.unlink(missing_ok=True)
      for path in self.folder.glob("missing-*.jsonl"):
        if self._workers and path.name >= f"missing-{self._workers:05d}":
          # Left by a run of more workers; no worker of this run replaces it.
          path.unlink(missing_ok=True)
    except OSError as error:
      raise UserError(_not_writable(self.folder, error)) from None

  def check(self, about: Mapping[str, Any]) -> None:
    """Checks what `claim` checks, as far as it is known, and writes nothing.

    Args:
      about: what the answers depend on, as far as it is known.

    Raises:
      UserError: as `claim`.
    """
    # The nearest folder that exists is the one in which ours would be made.
    parent = self.folder.absolute()
    while not parent.exists():
      parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
      reason = f"{parent} is no folder that may be written to"
      raise UserError(_not_writable(self.folder, reason))
    if (self.folder / _RUN).exists():
      old = self.about()
      both = old.keys() & about.keys()
      self._compare(*({name: of[name] for name in both} for of in (old, about)))

  def about(self) -> Row:
    """Reads what the run's answers depend on, as `claim` wrote it.

    Raises:
      UserError: there is no run.json, or it cannot be read.
    """
    path, remedy = self.folder / _RUN, "choose another --out"
    try:
      about = schema.read_json(path, remedy=remedy)
    except UserError as error:
      if error.kind == "missing":
        raise UserError(
          f"{path} does not exist: {self.folder} is no folder of an evaluation;"
          " correct it"
        ) from None
      raise UserError(f"{path} cannot be read ({error})") from None
    if not isinstance(about, dict):
      raise UserError(f"{path} is no JSON object; {remedy}")
    return about

  def answered(self) -> dict[str, Row]:
    """Returns question id -> record of its answer, from all workers.

    If a question has several records, the first one counts.
    """
    rows: dict[str, Row] = {}
    for row in self._rows("answers-*.jsonl", _Answer):
      rows.setdefault(row["id"], row)
    return rows

  def left_out(self) -> dict[str, Row]:
    """Returns question id -> record of what no worker could ask."""
    answered = self.answered()
    return {
      row["id"]: row
      for row in self._rows("missing-*.jsonl", _Missing)
      if row["id"] not in answered
      and self._workers in (None, row.get("workers"))
    }

  def add(self, rows: Sequence[Row]) -> None:
    """Appends records of answers in a single write.

    A kill leaves all of them, or cuts off the last line.

    Args:
      rows: the records.

    Raises:
      OSError: they cannot be written whole, e.g. because the disk is full.
    """
    self._answers.add(*rows)

  def leave_out(self, rows: Iterable[Row]) -> None:
    """Appends records of questions that could not be asked.

    Args:
      rows: {"id", "video", "reason"} of each.
    """
    self._missing.add(*({**row, "workers": self._workers} for row in rows))

  def _claim(self, about: Row) -> None:
    """Writes run.json, or compares it if it exists."""
    path = self.folder / _RUN
    if not path.exists():
      if any(self.folder.glob("answers-*.jsonl")):
        raise UserError(
          f"{self.folder} holds answers, but no {_RUN} that says whose; choose"
          " another --out"
        )
      # Workers that start together write the same bytes.
      write_file(path, _text(about), several_writers=True)
    old = self.about()
    self._compare(old, about)
    if old != about:
      write_file(path, _text(about), several_writers=True)

  def _compare(self, old: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raises a UserError that names each difference between two runs."""
    names = sorted((old.keys() | about.keys()) - _MAY_CHANGE)
    differences = [
      f"{name} is {_value(old, name)} there and {_value(about, name)} here"
      for name in names
      if old.get(name) != about.get(name)
    ]
    if differences:
      raise UserError(
        f"{self.folder} holds the answers of another run:"
        f" {'; '.join(differences)}; delete its run.json and answers-*.jsonl,"
        " or choose another --out"
      )

  def _rows(self, pattern: str, kind: type[schema.Schema]) -> Iterable[Row]:
    """Yields the valid records of all workers.

    A line that a kill cut off, or that is of another kind, is skipped; its
    question is asked again.
    """
    for path in sorted(self.folder.glob(pattern)):
      remedy = "bring it back from a copy, or choose another --out"
      content = schema.read_bytes(path, remedy=remedy, most=_MOST_BYTES)
      for _, row in parse_rows(content):
        try:
          kind.model_validate(row)
        # pydantic's ValidationError is a ValueError.
        except (ValueError, RecursionError):
          continue
        yield row


def _text(about: Row) -> str:
  return json.dumps(about, indent=2) + "\n"


def _not_writable(folder: pathlib.Path, reason: str | OSError) -> str:
  """Returns the message about a folder that cannot be written to."""
  return (
    f"{folder} cannot be written to ({reason}); make room, or choose another"
    " --out, of a compared model a copy or link of its folder"
  )


def _value(about: Mapping[str, Any], name: str) -> str:
  """Returns a value for a message."""
  return repr(about[name]) if name in about else "not told"
