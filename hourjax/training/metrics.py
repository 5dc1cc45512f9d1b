"""metrics.jsonl and the loss curve."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

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


class Metrics:
  """Appends scalars to WORKDIR/metrics.jsonl and keeps one line on screen."""

  def __init__(self, workdir: str | os.PathLike, *, steps: int, start: int):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._drop_after(start)
    self._file = open(self._path, "a")  # noqa: SIM115 (see close)
    self._steps, self._start = steps, start
    self._began = time.monotonic()

  def write(self, step: int, values: dict[str, Any]) -> None:
    """One line: step and float values, written through at once."""
    row = {"step": step, **{k: float(v) for k, v in values.items()}}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    self._progress(step, row)

  def close(self) -> None:
    self._file.close()
    print(file=sys.stderr)

  def _progress(self, step: int, row: dict[str, Any]) -> None:
    took = time.monotonic() - self._began
    left = took / max(step - self._start, 1) * (self._steps - step)
    line = (
      f"step {step}/{self._steps}  loss {row['loss']:.3f}"
      f"  grad norm {row['grad_norm']:.2f}"
      f"  {took / max(step - self._start, 1):.2f} s/step  {left:.0f} s left"
    )
    end = "" if sys.stderr.isatty() else "\n"
    print(f"\r{line:<78}", end=end, file=sys.stderr, flush=True)

  def _drop_after(self, start: int) -> None:
    """Steps after the checkpoint will be taken again; so will their lines."""
    if not self._path.exists():
      return
    rows = read_metrics(self._path.parent)
    kept = [json.dumps(row) for row in rows if row["step"] <= start]
    self._path.write_text("".join(f"{line}\n" for line in kept))


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
