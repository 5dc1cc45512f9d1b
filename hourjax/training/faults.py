"""Being asked to leave: by SIGTERM (preemption, `stop`) or Ctrl-C."""
# MERGED hourjax.training.nonfinite:
# Steps whose loss or gradient is not finite: named, counted, and when to stop.
#
# The compiled step leaves parameters and optimizer as they were (see `step`),
# one bad video does not end a run. Many in a row mean that the run itself is
# broken, and then the newest checkpoint must be from before the first of them.

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
from hourjax.jsonl import Ledger, read_rows


class Leave:
  """Tells after which step to save and leave; the same one on all processes.

  The first signal asks, the second ends the process at once. Of several
  processes any one may be asked, with SIGTERM: jax passes it on and finds the
  next step that none has taken. Ctrl-C becomes SIGTERM there.

  Attributes:
    signal: that asked, None before.
  """

  def __init__(self):
    """Takes over the signals until `close`."""
    self.signal: int | None = None
    self._several = jax.process_count() > 1
    self._before = {}
    if threading.current_thread() is not threading.main_thread():
      return  # in a notebook's thread signals belong to the notebook
    # Of several processes SIGTERM is jax's, since `jax.distributed` started.
    asked = [signal.SIGINT] + [signal.SIGTERM] * (not self._several)
    for number in asked:
      self._before[number] = signal.signal(number, self._on_signal)

  def at_once(self) -> bool:
    """Whether a process alone is to leave before it has taken a step.

    Several can agree on a step only once they take some.
    """
    return self.signal is not None and not self._several

  def reached(self, step: int) -> bool:
    """Whether to leave after `step`. Every process asks after every step."""
    if not self._several:
      return self.signal is not None
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    self.signal = self.signal or signal.SIGTERM
    return True

  def close(self) -> None:
    """Gives the signals back."""
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    if self.signal is not None:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
      return
    self.signal = number
    # Not print: the signal may have come in the middle of one.
    name = signal.Signals(number).name
    os.write(
      sys.__stderr__.fileno(),
      f"\n{name}: saving after this step, then leaving; once more to leave at"
      " once\n".encode(),
    )
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)


_SHOWN_ROWS, _SHOWN_RECORDS = 8, 4


class _Step(schema.Schema):
  """What is read back of a line."""

  step: int


class NonFinite:
  """WORKDIR/nonfinite.jsonl: one line a skipped step.

  Attributes:
    skipped: such steps since the run began.
    in_a_row: of them, up to now. While it is not 0 no checkpoint is due.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start: int,
    max_in_a_row: int,
    primary: bool = True,
  ):
    """Drops the lines after step `start`; later steps are taken again.

    Args:
      workdir: of the run.
      start: step of the checkpoint that the run goes on from.
      max_in_a_row: at so many the run stops.
      primary: whether this process writes; all of them count.
    """
    self._path = pathlib.Path(workdir) / "nonfinite.jsonl"
    self._max, self._primary = max_in_a_row, primary
    there = self._path.exists()
    rows = read_rows(self._path, {"step": _Step}) if there else []
    self._kept = [row for row in rows if row["step"] <= start]
    self._ledger: Ledger | None = None
    if primary and len(self._kept) < len(rows):
      self._ledger = Ledger(self._path, self._kept)
    self.skipped = len(self._kept)
    self.in_a_row = 0

  def check(
    self,
    step: int,
    scalars: Mapping[str, Any],
    rows: Callable[[], dict[int, list[str]]],
  ) -> bool:
    """Whether a step's loss and gradient are finite; notes it if not.

    Args:
      step: that was taken.
      scalars: with its loss and grad_norm.
      rows: gives the step's rows: ids of their records by position.
    """
    loss, norm = float(scalars["loss"]), float(scalars["grad_norm"])
    if math.isfinite(loss) and math.isfinite(norm):
      self.in_a_row = 0
      return True
    self.skipped += 1
    self.in_a_row += 1
    if self._primary:
      self._note(step, loss, norm, rows())
    return False

  @property
  def too_many(self) -> bool:
    """Whether the run is to stop."""
    return self.in_a_row >= self._max

  def error(self, step: int, newest: int | None) -> UserError:
    """What to raise then.

    Args:
      step: that was taken last.
      newest: step of the newest checkpoint.
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
    if self._ledger is not None:
      self._ledger.close()

  def _note(self, step, loss, norm, rows):
    line = {"step": step, "loss": loss, "grad_norm": norm, "rows": rows}
    with contextlib.suppress(OSError):  # a full disk; it is printed as well
      if self._ledger is None:
        self._ledger = Ledger(self._path, self._kept)
      self._ledger.add(line)
    named = "; ".join(
      f"row {at}: {json.dumps(ids[:_SHOWN_RECORDS])}"
      for at, ids in list(rows.items())[:_SHOWN_ROWS]
    )
    print(
      f"WARNING: step {step} is skipped: loss {loss}, gradient norm {norm}"
      f" ({self.in_a_row} in a row); records: {named}; all are in {self._path}",
      file=sys.stderr,
      flush=True,
    )
