"""metrics.jsonl and the loss curve."""

import os
import pathlib
from collections.abc import Mapping
from typing import Literal

import pydantic

from hourjax import schema
from hourjax.errors import UserError
from hourjax.training.ledger import Ledger, read_rows

_NAME = "metrics.jsonl"


class _Row(schema.Schema):
  """A line: the step, and a number of any name."""

  model_config = pydantic.ConfigDict(extra="allow")
  __pydantic_extra__: dict[str, float | Literal["NaN", "Infinity", "-Infinity"]]

  step: int


class MetricsFile:
  """Appends to WORKDIR/metrics.jsonl, a line a logged step.

  Numbers that are not finite stand in it as "NaN", "Infinity", "-Infinity", as
  JSON has none; `read_metrics` gives them back as floats.
  """

  def __init__(self, workdir: str | os.PathLike, *, start: int):
    """Drops the lines after `start`: those steps will be taken again."""
    path = pathlib.Path(workdir) / _NAME
    rows = read_rows(path, {"step": _Row}) if path.exists() else []
    kept = [row for row in rows if row["step"] <= start]
    self._ledger = Ledger(path, kept)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._ledger.add({"step": step, **values})

  def close(self) -> None:
    self._ledger.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """The lines of metrics.jsonl; a half-written one is left out."""
  return [
    {k: float(v) if isinstance(v, str) else v for k, v in row.items()}
    for row in read_rows(pathlib.Path(workdir) / _NAME, {"step": _Row})
  ]


def read_curve(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Metrics of a run, after those of the runs it was initialised from.

  Raises:
    UserError: a file cannot be read, or a run was initialised from itself.
  """
  runs, folder = [], pathlib.Path(workdir)
  while not runs or (folder / _NAME).exists():
    if folder.resolve() in [run.resolve() for run in runs]:
      raise UserError(
        f"{runs[-1]}/config.json says that the run began with the weights of"
        f" {folder}, which began with its own; correct 'init' there"
      )
    runs.append(folder)
    remedy = "give the workdir of a training run"
    config = schema.read_schema(_Start, folder / "config.json", remedy=remedy)
    if not config.init:
      break
    folder = pathlib.Path(config.init)
  curve: list[dict[str, float]] = []
  for run in reversed(runs):
    done = curve[-1]["step"] if curve else 0
    curve += [{**row, "step": row["step"] + done} for row in read_metrics(run)]
  return curve


class _Start(schema.Schema):
  """What is read here of a run's configuration."""

  init: str
