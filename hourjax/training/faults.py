"""What ends a run before its last step: signals, faults, no further gain.

`Preemption` handles signals: SIGTERM, which a preempted machine and `stop`
send, and Ctrl-C. `NonFiniteSteps` lists and counts steps whose loss or gradient
is not finite. The compiled step leaves parameters and optimizer as they were
(see `train_step`), so one bad video does not end a run. Many such steps in a
row mean that the run itself is broken; then the newest checkpoint must be from
before the first of them.

`EarlyStopping` ends a run that no longer gets better on held-out data. With
`config.patience` above 0 each evaluation has a line in
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
import json
import math
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from hourjax import schema
from hourjax.errors import UserError
from hourjax.jsonl import JsonlWriter, read_valid_rows


class Preemption:
  """Says after which step to save and exit, the same on all processes.

  The first signal asks for it, the second one ends the process at once. Of
  several processes any one may get SIGTERM: jax passes it on and finds the next
  step that no process has taken yet. There Ctrl-C is turned into SIGTERM.

  Attributes:
    signal: number of the first signal, None before.
  """

  def __init__(self) -> None:
    """Handles the signals until `close`."""
    self.signal: int | None = None
    self._several = jax.process_count() > 1
    self._before: dict[int, Any] = {}
    if threading.current_thread() is not threading.main_thread():
      # Only the main thread can handle signals; in a notebook's other thread
      # they are the notebook's.
      return
    # Among several processes `jax.distributed` handles SIGTERM.
    asked = [signal.SIGINT] + [signal.SIGTERM] * (not self._several)
    for number in asked:
      self._before[number] = signal.signal(number, self._on_signal)

  def should_stop_at_once(self) -> bool:
    """Returns whether to exit before the first step.

    Several processes can agree on a step only while they take steps, so for
    them this is False.
    """
    return self.signal is not None and not self._several

  def should_stop(self, step: int) -> bool:
    """Returns whether to exit after a step.

    Every process must ask after every step.

    Args:
      step: that was taken.
    """
    if not self._several:
      return self.signal is not None
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    self.signal = self.signal or signal.SIGTERM
    return True

  def close(self) -> None:
    """Restores the signal handlers that were there before."""
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    """Notes the first signal; lets the second one end the process."""
    if self.signal is not None:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
      return
    self.signal = number
    # Not print: the signal may have come in the middle of one.
    name = signal.Signals(number).name
    os.write(
      2,
      f"\n{name}: saving after this step, then leaving; once more to leave at"
      " once\n".encode(),
    )
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)


_PRINTED_ROWS, _PRINTED_RECORDS = 8, 4


class _Line(schema.Schema):
  """Describes what is read back of a line of nonfinite.jsonl."""

  step: int


class NonFiniteSteps:
  """Counts steps whose update was skipped, and lists them in a file.

  Each has a line in WORKDIR/nonfinite.jsonl, with the records of its rows.

  Attributes:
    skipped: number of such steps since the run began.
    in_a_row: how many steps up to the last one were skipped one after the
      other. While this is not 0, no checkpoint is saved.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start: int,
    max_in_a_row: int,
    primary: bool = True,
  ):
    """Drops the lines after step `start`, since those steps are taken again.

    Args:
      workdir: of the run.
      start: step of the checkpoint that the run goes on from, 0 for a new run.
      max_in_a_row: the run stops after so many such steps in a row.
      primary: whether this process writes the file; all processes count.

    Raises:
      UserError: a line is of another kind.
    """
    self._path = pathlib.Path(workdir) / "nonfinite.jsonl"
    self._max, self._primary = max_in_a_row, primary
    lines: list[dict[str, Any]] = []
    if self._path.exists():
      lines = read_valid_rows(self._path, {"step": _Line})
    kept = [line for line in lines if line["step"] <= start]
    self._writer = JsonlWriter.at(self._path, kept)
    if primary and len(kept) < len(lines):
      self._writer.open()
    self.skipped = len(kept)
    self.in_a_row = 0

  def check(
    self,
    step: int,
    scalars: Mapping[str, Any],
    rows: Callable[[], dict[int, list[str]]],
  ) -> bool:
    """Returns whether a step's loss and gradient norm are finite.

    If they are not, the step is counted, listed and printed.

    Args:
      step: that was taken.
      scalars: with its "loss" and "grad_norm".
      rows: returns the ids of the records in each row of the step, by the row's
        position in the data.
    """
    loss, norm = float(scalars["loss"]), float(scalars["grad_norm"])
    if math.isfinite(loss) and math.isfinite(norm):
      self.in_a_row = 0
      return True
    self.skipped += 1
    self.in_a_row += 1
    if self._primary:
      self._report(step, loss, norm, rows())
    return False

  @property
  def too_many(self) -> bool:
    """Returns whether the run must stop."""
    return self.in_a_row >= self._max

  def error(self, step: int, newest: int | None) -> UserError:
    """Returns the error to raise when there are too many.

    Args:
      step: that was taken last.
      newest: step of the newest checkpoint, None if there is none.
    """
    return UserError(
      f"step {step}: loss or gradient was not finite in {self.in_a_row} steps"
      f" in a row (config.max_nonfinite={self._max}); their rows and records"
      f" are in {self._path}. "
      + (
        "There is no checkpoint yet"
        if newest is None
        else f"The newest checkpoint, of step {newest}, is from before them"
      )
      + "; mend or remove these records, or lower the learning rates in another"
      " workdir"
    )

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()

  def _report(
    self, step: int, loss: float, norm: float, rows: Mapping[int, list[str]]
  ) -> None:
    """Lists and prints a step that was skipped."""
    line = {"step": step, "loss": loss, "grad_norm": norm, "rows": rows}
    with contextlib.suppress(OSError):  # a full disk; it is printed as well
      self._writer.add(line)
    named = "; ".join(
      f"row {at}: {json.dumps(ids[:_PRINTED_RECORDS])}"
      for at, ids in list(rows.items())[:_PRINTED_ROWS]
    )
    print(
      f"WARNING: step {step} is skipped: loss {loss}, gradient norm {norm}"
      f" ({self.in_a_row} in a row); records: {named}; all are in {self._path}",
      file=sys.stderr,
      flush=True,
    )


LOSS = "eval/answer_loss"  # the metric that decides
_EVALUATIONS = "evaluations.jsonl"
# Share by which a loss must have risen to be called over-fitting: evaluations
# of one model on other steps differ by about a hundredth.
_RISE = 0.02


class _Evaluation(schema.Schema):
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
      pathlib.Path(workdir) / _EVALUATIONS,
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
  path = pathlib.Path(workdir) / _EVALUATIONS
  if not path.exists():
    return {}
  rows = read_valid_rows(path, {"step": _Evaluation})
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
