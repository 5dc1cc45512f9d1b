"""Which share of a run's time went into steps that count.

Goodput is the time of the steps that were kept, divided by the wall-clock time
since the run first started. The time in which no process ran lies between, and
so do steps that a later start took again.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Callable

import pydantic

from hourjax import schema
from hourjax.training.ledger import Ledger, read_rows

# Seconds since 1970 that never step backwards within a process.
_OFFSET = time.time() - time.monotonic()


class _Began(schema.Schema):
  """The first line, which sums up earlier starts."""

  began: float
  at: float
  lost: dict[str, float] = pydantic.Field(default_factory=dict)


class _Step(schema.Schema):
  step: int
  at: float
  kept: float


class _Lost(schema.Schema):
  lost: str
  seconds: float
  at: float


_KINDS = {"began": _Began, "kept": _Step, "seconds": _Lost}


def wall_clock() -> float:
  """Seconds since 1970; does not follow corrections of the clock."""
  return _OFFSET + time.monotonic()


class Goodput:
  """Adds up a run's time over all its starts, in WORKDIR/goodput.jsonl.

  A step's time runs until the next one begins, less what is reported as lost
  meanwhile; it includes waiting for data, which the metrics show on their own.
  A run of steps 1 to 4, killed in step 4 and started again from step 2:

      1 [compile] 1 2 2 3 3 4 | down | [restore] 3 3 4 4
      kept: 1 2 and the second 3 4; lost: everything else

  The file has a line when the run began, one a step and one for each loss. A
  kill takes at most the time of the step at hand.

  Attributes:
    lost_seconds: by reason, over all starts; "down" is the time between a
      process's last sign of life and the next one's begin, "recomputed" that
      of steps after the checkpoint.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start: int,
    began: float | None = None,
    clock: Callable[[], float] = wall_clock,
  ):
    """Reads what earlier starts took.

    Args:
      workdir: of the run.
      start: step of the checkpoint that it goes on from, 0 if there is none.
      began: when this process began, seconds since 1970; default: now.
      clock: seconds since 1970.
    """
    path = pathlib.Path(workdir) / "goodput.jsonl"
    began = clock() if began is None else began
    rows = read_rows(path, _KINDS) if path.exists() else []
    first = rows[0] if rows and "began" in rows[0] else {"began": began}
    taken = [row for row in rows if "kept" in row]
    kept = [row for row in taken if row["step"] <= start]
    self._clock, self._began = clock, first["began"]
    self._kept = kept[-1]["kept"] if kept else 0.0
    self.lost_seconds: dict[str, float] = dict(first.get("lost", {}))
    for row in rows:
      if "seconds" in row:
        self._add(row["lost"], row["seconds"])
    if taken:
      self._add("recomputed", taken[-1]["kept"] - self._kept)
    seen = max((row["at"] for row in rows if "at" in row), default=began)
    self._add("down", began - seen)
    head = {"began": self._began, "at": began, "lost": self.lost_seconds}
    self._ledger = Ledger(path, [head, *kept])
    self._step: int | None = None
    self._opened = self._away = 0.0

  def step_begins(self, step: int) -> None:
    """Ends the step before, if any."""
    ended, now = self._step, self._clock()
    self._kept += self._open_seconds(now)
    self._step, self._opened, self._away = step, now, 0.0
    self._note(ended, now)

  def lost(self, seconds: float, why: str) -> None:
    """Time until now that is not progress, though perhaps within a step."""
    self._add(why, seconds)
    self._away += seconds
    now = self._clock()
    self._ledger.add({"lost": why, "seconds": seconds, "at": now})
    # Saving is reported so: what was saved shall not lack its own time.
    self._note(self._step, now)

  def share(self) -> float:
    """Goodput up to now, 0 to 1."""
    now = self._clock()
    whole = now - self._began
    return min((self._kept + self._open_seconds(now)) / max(whole, 1e-9), 1.0)

  def close(self) -> None:
    with contextlib.closing(self._ledger):
      self._note(self._step, self._clock())

  def _note(self, step: int | None, now: float) -> None:
    """Writes what the run will have kept if `step` turns out to be."""
    if step is not None:
      kept = self._kept + self._open_seconds(now)
      self._ledger.add({"step": step, "at": now, "kept": kept})

  def _open_seconds(self, now: float) -> float:
    if self._step is None:
      return 0.0
    return max(now - self._opened - self._away, 0.0)

  def _add(self, why: str, seconds: float) -> None:
    if seconds > 0:
      self.lost_seconds[why] = self.lost_seconds.get(why, 0.0) + seconds
