"""The folder of an evaluation: what was asked, answered and left out.

    OUT/run.json              what the answers depend on
    OUT/answers-00000.jsonl   a worker's records, one a question
    OUT/missing-00000.jsonl   what a worker could not ask, and why

A worker writes files of its own and reads everyone's, so any number of them
may share a folder, at a time or one after the other.
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
# A new parser reads the old answers: nobody is asked again. Videos that were
# missing may come, and with them some of sparse features.
_MAY_CHANGE = frozenset({"parser", "sparse"})
_RUN = "run.json"
_MOST_BYTES = 2**30  # of one worker's records


class _Answer(schema.Schema):
  """What is read back of an answer's record."""

  id: str
  answer: str
  finished: bool = True
  seconds: float = pydantic.Field(0.0, ge=0)


class _Missing(schema.Schema):
  """What is read back of a question that could not be asked."""

  id: str
  reason: str
  workers: int | None = None


class Records:
  """Reads all records of a folder; writes those of one worker."""

  def __init__(
    self,
    out: str | os.PathLike,
    worker: int = 0,
    workers: int | None = None,
  ):
    """Touches nothing.

    Args:
      out: folder of the evaluation; all workers see the same one.
      worker: number of this process among those that write.
      workers: how many there are; None if none ask. What a run of another
        number of them could not ask is not believed: it is tried again.
    """
    self.folder = pathlib.Path(out)
    self._workers = workers
    self._answers = JsonlWriter.at(self.folder / f"answers-{worker:05d}.jsonl")
    missing = self.folder / f"missing-{worker:05d}.jsonl"
    self._missing_path, self._missing = missing, JsonlWriter.at(missing)

  def claim(self, about: Mapping[str, Any]) -> None:
    """Makes the folder that of one run, or makes sure that it is.

    This worker's list of what is missing starts anew: it will be tried again.

    Args:
      about: what the answers depend on, JSON values only.

    Raises:
      UserError: the folder holds another run, with each difference, or cannot
        be written to.
    """
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._claim(dict(about))
      self._missing_path.unlink(missing_ok=True)
      for path in self.folder.glob("missing-*.jsonl"):
        if self._workers and path.name >= f"missing-{self._workers:05d}":
          path.unlink(missing_ok=True)  # of a run of more workers
    except OSError as error:
      raise UserError(_not_writable(self.folder, error)) from None

  def check(self, about: Mapping[str, Any]) -> None:
    """As `claim`, of what is known so far, and touches nothing.

    Raises:
      UserError: the folder holds another run, with each difference, or cannot
        be written to.
    """
    there = self.folder.absolute()
    while not there.exists():
      there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
      reason = f"{there} is no folder that may be written to"
      raise UserError(_not_writable(self.folder, reason))
    if (self.folder / _RUN).exists():
      old = self.about()
      both = old.keys() & about.keys()
      self._compare(*({name: of[name] for name in both} for of in (old, about)))

  def about(self) -> Row:
    """What the run's answers depend on, as `claim` wrote it.

    Raises:
      UserError: there is none, or it cannot be read.
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
    """Records of all workers by the question's id; the first one counts."""
    rows: dict[str, Row] = {}
    for row in self._rows("answers-*.jsonl", _Answer):
      rows.setdefault(row["id"], row)
    return rows

  def left_out(self) -> dict[str, Row]:
    """What could not be asked by any worker, by the question's id."""
    answered = self.answered()
    return {
      row["id"]: row
      for row in self._rows("missing-*.jsonl", _Missing)
      if row["id"] not in answered
      and self._workers in (None, row.get("workers"))
    }

  def add(self, rows: Sequence[Row]) -> None:
    """Appends records in one write: a kill leaves all of them or none.

    Raises:
      OSError: they cannot be written whole, e.g. the disk is full.
    """
    self._answers.add(*rows)

  def leave_out(self, rows: Iterable[Row]) -> None:
    """Appends what could not be asked: {"id", "video", "reason"}."""
    self._missing.add(*({**row, "workers": self._workers} for row in rows))

  def _claim(self, about: Row) -> None:
    path = self.folder / _RUN
    if not path.exists():
      if any(self.folder.glob("answers-*.jsonl")):
        raise UserError(
          f"{self.folder} holds answers, but no {_RUN} that says whose; choose"
          " another --out"
        )
      # Workers that start together write the same.
      write_file(path, _text(about), several_writers=True)
    old = self.about()
    self._compare(old, about)
    if old != about:
      write_file(path, _text(about), several_writers=True)

  def _compare(self, old: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    names = sorted((old.keys() | about.keys()) - _MAY_CHANGE)
    differences = [
      f"{name} is {_shown(old, name)} there and {_shown(about, name)} here"
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
    """Objects of all workers; half a line, as a kill leaves it, is none.

    Nor is what is not of this kind: its question is asked again.
    """
    for path in sorted(self.folder.glob(pattern)):
      remedy = "bring it back from a copy, or choose another --out"
      content = schema.read_bytes(path, remedy=remedy, most=_MOST_BYTES)
      for _, row in parse_rows(content):
        try:
          kind.model_validate(row)
        except (ValueError, RecursionError):  # pydantic's among them
          continue
        yield row


def _text(about: Row) -> str:
  return json.dumps(about, indent=2) + "\n"


def _not_writable(folder: pathlib.Path, reason: Any) -> str:
  return (
    f"{folder} cannot be written to ({reason}); make room, or choose another"
    " --out, of a compared model a copy or link of its folder"
  )


def _shown(about: Row, name: str) -> str:
  return repr(about[name]) if name in about else "not told"
