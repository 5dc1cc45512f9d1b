"""What the rows of a step ask of the model: seconds of video, operations."""
# MERGED hourjax.training.hbm:
# Memory of the accelerators.
# MERGED hourjax.training.goodput:
# Which share of a run's time went into steps that count.
#
# Goodput is the time of the steps that were kept, divided by the wall-clock ti
# since the run first started. The time in which no process ran lies between, a
# so do steps that a later start took again.

import contextlib
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import pydantic

from hourjax import schema
from hourjax.data.dataset import Dataset
from hourjax.data.row_plan import RowPlan
from hourjax.data.sample_sizes import FIELDS
from hourjax.jsonl import Ledger, read_rows
from hourjax.models.flops import count_flops, sample_work
from hourjax.training.config import Experiment
from hourjax.training.optimizer import COMPONENTS


class Work(NamedTuple):
  """Of some rows.

  Attributes:
    video_seconds: of the videos in them; one that several conversations of a
      row share counts once.
    flops: useful ones (`models.flops`), of the numerator of MFU.
  """

  video_seconds: float
  flops: float


class RowWork:
  """The work of rows, from the plan alone: the same on every host.

  Samples that could not be read are counted; they are few, or the run stops.
  """

  def __init__(self, experiment: Experiment, dataset: Dataset, plan: RowPlan):
    self._config, self._plan, self._dataset = experiment.model, plan, dataset
    self._frame_tokens = experiment.model.pool_side**2 + 1
    self._trained = {
      name for name in COMPONENTS if experiment.optimizer.rate(name) > 0
    }

  def of(self, position: int, rows: int) -> Work:
    """Of `rows` rows from `position` on."""
    groups = [
      group
      for k in range(rows)
      for group in self._plan.row(self._plan.advance(position, k))[1]
    ]
    if not groups:
      return Work(0.0, 0.0)
    samples = np.concatenate([np.asarray(group, int) for group in groups])
    # The first of a group brings the memory that the others read, too.
    starts = np.cumsum([0, *map(len, groups[:-1])])
    first = np.zeros(len(samples), bool)
    first[starts] = True
    work = sample_work(self._config, self._dataset.sizes[samples])
    work = work._replace(
      **{
        name: getattr(work, name) * first
        for name in ("images", "stored", "encoded", "memory", "untrained")
      }
    )
    parts = count_flops(self._config, work, self._trained)
    flops = sum(part.total.sum() for part in parts.values())
    return Work(float(self._seconds(samples[first]).sum()), float(flops))

  def _seconds(self, samples):
    """Where a duration is not known a frame is taken for a second."""
    columns = self._dataset.columns
    video = columns.video[samples]
    memory = self._dataset.sizes[samples][:, FIELDS.index("memory")]
    if not len(columns.videos):
      return np.zeros(len(samples))
    known = columns.duration[np.maximum(video, 0)]
    seconds = np.where(np.isnan(known), memory / self._frame_tokens, known)
    return np.where(video >= 0, seconds, 0.0)


def row_records(
  dataset: Dataset, plan: RowPlan, position: int, rows: int
) -> dict[int, list[str]]:
  """Ids of the records in each of `rows` rows, by their position."""
  found = {}
  for k in range(rows):
    at = plan.advance(position, k)
    groups = plan.row(at)[1]
    found[at] = [dataset.record(i).id for group in groups for i in group]
  return found


_GIB = 2**30


def hbm(devices: Iterable[Any]) -> dict[str, float]:
  """Memory in use and its peak since the process began.

  Args:
    devices: of this host, e.g. jax.local_devices().

  Returns:
    hbm_gib and hbm_peak_gib of the fullest device; a value that no device
    knows (CPUs know none) is left out.
  """
  stats = [_stats(device) for device in devices]
  names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
  found = {
    name: [s[key] / _GIB for s in stats if key in s]
    for name, key in names.items()
  }
  return {name: max(values) for name, values in found.items() if values}


def _stats(device) -> dict[str, int]:
  try:
    return device.memory_stats() or {}
  except (NotImplementedError, jax.errors.JaxRuntimeError):
    return {}  # a backend that keeps no account


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
