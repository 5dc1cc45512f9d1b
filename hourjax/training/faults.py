"""What a run does on a signal to stop, or if its loss is not finite.

`Preemption` handles signals: SIGTERM, which a preempted machine and `stop`
send, and Ctrl-C. `NonFiniteSteps` lists and counts steps whose loss or gradient
is not finite. The compiled step leaves parameters and optimizer as they were
(see `train_step`), so one bad video does not end a run. Many such steps in a
row mean that the run itself is broken; then the newest checkpoint must be from
before the first of them.
"""

import contextlib
import json
import math
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

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
