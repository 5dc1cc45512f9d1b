"""Early stopping: a run ends when it no longer gets better on held-out data.

With `config.patience` above 0 each evaluation has a line in
WORKDIR/evaluations.jsonl:

    {"step": 20, "answer_loss": 0.71}
    {"step": 40, "answer_loss": 0.62}     the best
    {"step": 60, "answer_loss": 0.65}
    {"step": 80, "answer_loss": 0.64}     patience 2: the run ends here

The checkpoint of the best step is saved and kept, and is what is read when the
run's weights are used later (`restore_params`). A run that goes on from step N
drops the lines after N and has them again, so a run that was killed ends at
the same step with the same best. A line is written before its checkpoint: of a
step whose line lacks there is no checkpoint that could be the best.
"""

import contextlib
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hourjax import schema
from hourjax.errors import UserError
from hourjax.jsonl import JsonlWriter, read_valid_rows

LOSS = "eval/answer_loss"  # the metric that decides
_NAME = "evaluations.jsonl"
# Share by which a loss must have risen to be called over-fitting: evaluations
# of one model on other steps differ by about a hundredth.
_RISE = 0.02


class _Line(schema.Schema):
  """Describes a line of evaluations.jsonl."""

  step: int
  answer_loss: float | Literal["NaN", "Infinity", "-Infinity"]


class EarlyStopping:
  """Says which step is the best, and whether the run must end.

  All processes of a run make the same calls; the first one writes the file.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start: int,
    patience: int,
    primary: bool = True,
  ):
    """Drops the lines after step `start`, since those steps are taken again.

    Args:
      workdir: of the run.
      start: step of the checkpoint that the run goes on from, 0 for a new run.
      patience: evaluations in a row without a lower loss after which the run
        ends; 0 never ends it, and then nothing is written.
      primary: whether this process writes the file and prints.

    Raises:
      UserError: a line of the file is of another kind.
    """
    self._patience, self._primary = patience, primary
    self._losses = read_losses(workdir) if patience else {}
    self._losses = {k: v for k, v in self._losses.items() if k <= start}
    self._writer = JsonlWriter.at(
      pathlib.Path(workdir) / _NAME,
      [{"step": k, "answer_loss": v} for k, v in self._losses.items()],
    )

  @property
  def best(self) -> int | None:
    """Returns the step of the lowest loss, None before there is one."""
    return best_of(self._losses)

  @property
  def due(self) -> bool:
    """Returns whether the run must end."""
    if not self._patience:
      return False
    steps = list(self._losses)
    best = self.best
    since = steps if best is None else steps[steps.index(best) + 1 :]
    return len(since) >= self._patience

  def add(self, step: int, metrics: Mapping[str, float]) -> bool:
    """Notes an evaluation, and returns whether it is the best so far.

    Args:
      step: that was taken; its loss and gradient were finite.
      metrics: of the evaluation; {} where there was none.
    """
    if not self._patience or LOSS not in metrics:
      return False
    self._losses[step] = float(metrics[LOSS])
    if self._primary:
      # A full disk does not end a run. The writer keeps the line for later.
      with contextlib.suppress(OSError):
        self._writer.add({"step": step, "answer_loss": self._losses[step]})
    return self.best == step

  def report(
    self, step: int, steps: int, rows: Sequence[Mapping[str, Any]]
  ) -> None:
    """Prints which step is the best, and whether the run over-fits.

    Args:
      step: that was taken last.
      steps: that the run would have without early stopping.
      rows: of metrics.jsonl.
    """
    if not self._primary:
      return
    best = self.best
    if best is not None:
      ended = (
        f"stopped early after step {step} of {steps}: {self._patience}"
        " evaluations in a row without a lower held-out loss; "
        if self.due
        else ""
      )
      print(
        f"{ended}step {best} has the lowest held-out loss,"
        f" {self._losses[best]:.3f}, and is the one that is used from now on",
        file=sys.stderr,
      )
    if text := overfitting(rows):
      print(f"WARNING: {text}", file=sys.stderr)

  def close(self) -> None:
    """Closes the file."""
    with contextlib.suppress(OSError):
      self._writer.close()


def read_losses(workdir: str | os.PathLike) -> dict[int, float]:
  """Returns the held-out loss of each evaluated step; {} without patience.

  Raises:
    UserError: the file cannot be read, or a line is of another kind.
  """
  path = pathlib.Path(workdir) / _NAME
  if not path.exists():
    return {}
  rows = read_valid_rows(path, {"step": _Line})
  return {row["step"]: float(row["answer_loss"]) for row in rows}


def best_of(losses: Mapping[int, float]) -> int | None:
  """Returns the step of the lowest finite loss, the first of equal ones."""
  finite = [step for step, loss in losses.items() if math.isfinite(loss)]
  return min(finite, key=lambda step: (losses[step], step), default=None)


def best_step(workdir: str | os.PathLike, steps: Sequence[int]) -> int | None:
  """Returns the step of a run's best checkpoint; None if it has no best one.

  Args:
    workdir: of the run; one without `patience` has no best one.
    steps: of the checkpoints that are there.
  """
  with contextlib.suppress(UserError):
    losses = read_losses(workdir)
    return best_of({k: v for k, v in losses.items() if k in steps})
  return None


def overfitting(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns a sentence if held-out loss rose while training loss fell.

  Compared are the best evaluation and the last one, with the means of the
  training losses that were logged since the evaluation before each of them.

  Args:
    rows: of metrics.jsonl.

  Returns:
    The sentence; "" if there is nothing to warn of.
  """
  evaluated = {row["step"]: row[LOSS] for row in rows if LOSS in row}
  best, steps = best_of(evaluated), list(evaluated)
  if best is None or not evaluated[steps[-1]] > (1 + _RISE) * evaluated[best]:
    return ""
  last = steps[-1]
  before, after = (
    _training_loss(rows, max((s for s in steps if s < step), default=0), step)
    for step in (best, last)
  )
  if not after < before:
    return ""
  return (
    f"over-fitting: from step {best} to step {last} the loss of held-out"
    f" answers rose from {evaluated[best]:.3f} to {evaluated[last]:.3f}, while"
    f" that of training fell from {before:.3f} to {after:.3f}; more or more"
    " varied data helps, or fewer steps and lower learning rates"
  )


def _training_loss(
  rows: Sequence[Mapping[str, Any]], after: int, until: int
) -> float:
  """Returns the mean of the losses logged after one step, up to another."""
  found = [
    r["loss"] for r in rows if after < r["step"] <= until and "loss" in r
  ]
  return sum(found) / len(found) if found else math.nan
