"""metrics.jsonl and the loss curve."""

import json
import os
import pathlib
from collections.abc import Mapping

from hourjax.training.ledger import Ledger, read_rows

_NAME = "metrics.jsonl"


class MetricsFile:
  """Appends to WORKDIR/metrics.jsonl, a line a logged step.

  Numbers that are not finite stand in it as "NaN", "Infinity", "-Infinity", as
  JSON has none; `read_metrics` gives them back as floats.
  """

  def __init__(self, workdir: str | os.PathLike, *, start: int):
    """Drops the lines after `start`: those steps will be taken again."""
    path = pathlib.Path(workdir) / _NAME
    rows = read_rows(path) if path.exists() else []
    kept = [row for row in rows if row.get("step", start + 1) <= start]
    self._ledger = Ledger(path, kept)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._ledger.add({"step": step, **values})

  def close(self) -> None:
    self._ledger.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """The lines of metrics.jsonl; a half-written one is left out."""
  return [
    {k: float(v) if isinstance(v, str) else v for k, v in row.items()}
    for row in read_rows(pathlib.Path(workdir) / _NAME)
  ]


def read_curve(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Metrics of a run, after those of the runs it was initialised from."""
  folder = pathlib.Path(workdir)
  config = json.loads((folder / "config.json").read_text())
  before = pathlib.Path(config["init"]) if config["init"] else None
  earlier = []
  if before is not None and (before / _NAME).exists():
    earlier = read_curve(before)
  done = earlier[-1]["step"] if earlier else 0
  later = [{**row, "step": row["step"] + done} for row in read_metrics(folder)]
  return earlier + later
