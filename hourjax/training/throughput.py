"""How fast a run is: FLOPs and seconds of video, device memory, goodput.

Goodput is the share of the time since the run first started that went into
steps that were kept. Time in which no process ran counts as lost, and so do
steps that a later start had to take again.
"""

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
from hourjax.data.packing.row_plan import RowPlan
from hourjax.data.sample_sizes import FIELDS
from hourjax.jsonl import JsonlWriter, read_valid_rows
from hourjax.models.flops import count_flops, sample_work
from hourjax.training.config import Experiment


class RowTotals(NamedTuple):
  """Holds what the rows of a step hold together.

  Attributes:
    rows: how many rows these are.
    samples: how many samples are in them.
    video_seconds: duration of their videos; one that several conversations of a
      row share counts once.
    flops: floating-point operations of a step that the model needs (see
      `models.flops`): the numerator of MFU.
  """

  rows: int
  samples: int
  video_seconds: float
  flops: float


class ThroughputCounter:
  """Computes FLOPs and seconds of video of rows from the plan alone.

  So the numbers are the same on every host. Samples that could not be read are
  counted too: they are few, or the run stops.
  """

  def __init__(self, experiment: Experiment, dataset: Dataset, plan: RowPlan):
    self._config, self._plan, self._dataset = experiment.model, plan, dataset
    self._frame_tokens = experiment.model.pool_side**2 + 1
    self._trained = experiment.trained_components

  def count(self, position: int, rows: int) -> RowTotals:
    """Returns the totals of a step's rows.

    Args:
      position: in the data, of the first row.
      rows: how many there are; where a step is a number of samples, at most.
    """
    positions, _ = self._plan.take(position, rows)
    groups = [group for at in positions for group in self._plan.row(at)[1]]
    if not groups:
      return RowTotals(len(positions), 0, 0.0, 0.0)
    samples = np.concatenate([np.asarray(group, int) for group in groups])
    # Samples of a group share a memory. It is encoded for the first one, and
    # the others only read it.
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
    flops = sum(np.sum(part.total) for part in parts.values())
    return RowTotals(
      len(positions),
      len(samples),
      float(self._seconds(samples[first]).sum()),
      float(flops),
    )

  def _seconds(self, samples: np.ndarray) -> np.ndarray:
    """Returns each sample's seconds of video, float [samples].

    Where a duration is not known, each frame counts as a second.
    """
    columns = self._dataset.columns
    video = columns.video[samples]
    memory = self._dataset.sizes[samples][:, FIELDS.index("memory")]
    if not len(columns.videos):
      return np.zeros(len(samples))
    known = columns.duration[np.maximum(video, 0)]
    seconds = np.where(np.isnan(known), memory / self._frame_tokens, known)
    return np.where(video >= 0, seconds, 0.0)


def record_ids(
  dataset: Dataset, plan: RowPlan, position: int, rows: int
) -> dict[int, list[str]]:
  """Returns the ids of the records in a step's rows, by the row's position.

  Args:
    dataset: with the records.
    plan: which samples share a row.
    position: in the data, of the first row.
    rows: how many there are; where a step is a number of samples, at most.
  """
  found: dict[int, list[str]] = {}
  for at in plan.take(position, rows)[0]:
    groups = plan.row(at)[1]
    found[at] = [dataset.record(i).id for group in groups for i in group]
  return found


_GIB = 2**30


def hbm_usage(devices: Iterable[Any]) -> dict[str, float]:
  """Returns device memory in use, and its peak since the process began.

  Args:
    devices: of this host, e.g. jax.local_devices().

  Returns:
    "hbm_gib" and "hbm_peak_gib" of the fullest device, in GiB; a value that no
    device reports (CPUs report none) is left out.
  """
  stats = [_stats(device) for device in devices]
  names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
  found = {
    name: [s[key] / _GIB for s in stats if key in s]
    for name, key in names.items()
  }
  return {name: max(values) for name, values in found.items() if values}


def _stats(device: Any) -> dict[str, int]:
  """Returns the memory statistics of a device, in bytes."""
  try:
    return device.memory_stats() or {}
  except (NotImplementedError, jax.errors.JaxRuntimeError):
    return {}  # a backend without statistics


# Turns the monotonic clock into seconds since 1970.
_OFFSET = time.time() - time.monotonic()


class _BeganLine(schema.Schema):
  """Describes the first line, which sums up earlier starts."""

  began: float
  at: float
  lost: dict[str, float] = pydantic.Field(default_factory=dict)


class _StepLine(schema.Schema):
  """Describes the line of a step: when it ended, and time kept so far."""

  step: int
  at: float
  kept: float


class _LostLine(schema.Schema):
  """Describes the line of lost time: why, how long, and when it ended."""

  lost: str
  seconds: float
  at: float


_KINDS = {"began": _BeganLine, "kept": _StepLine, "seconds": _LostLine}


def wall_clock() -> float:
  """Returns seconds since 1970; corrections of the clock do not change it."""
  return _OFFSET + time.monotonic()


class Goodput:
  """Adds up a run's time over all its starts, in WORKDIR/goodput.jsonl.

  The time of a step ends when the next step begins, without what was reported
  as lost in between. It includes waiting for data, which the metrics show
  separately. Example: a run of four steps that was killed in step 4, and
  started again from the checkpoint of step 2:

      step 1, compile, step 2, step 3, step 4 | down | restore, step 3, step 4

  Steps 1 and 2 and the second steps 3 and 4 are kept, everything else is lost.

  The file has one line of when the run began, one for each step and one for
  each loss. A kill loses at most the time of the step at hand.

  Attributes:
    lost_seconds: by reason, over all starts. "down" is the time between the
      last line of one process and the start of the next, "recomputed" that of
      steps after the checkpoint.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start: int,
    began: float | None = None,
    clock: Callable[[], float] = wall_clock,
  ):
    """Reads the times of earlier starts.

    Args:
      workdir: of the run.
      start: step of the checkpoint that the run goes on from, 0 for a new run.
      began: when this process began, in seconds since 1970; now if None.
      clock: returns seconds since 1970.

    Raises:
      UserError: a line of the file is of another kind.
    """
    path = pathlib.Path(workdir) / "goodput.jsonl"
    began = clock() if began is None else began
    rows = read_valid_rows(path, _KINDS) if path.exists() else []
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
    self._writer = JsonlWriter.at(path, [head, *kept])
    self._writer.open()
    self._step: int | None = None
    self._opened = self._away = 0.0

  def begin_step(self, step: int) -> None:
    """Ends the step before, if any, and begins the next."""
    ended, now = self._step, self._clock()
    self._kept += self._open_seconds(now)
    self._step, self._opened, self._away = step, now, 0.0
    self._note(ended, now)

  def add_lost(self, seconds: float, why: str) -> None:
    """Counts time that ends now as lost; it may lie within a step.

    Args:
      seconds: that were lost.
      why: key of `lost_seconds`.
    """
    self._add(why, seconds)
    self._away += seconds
    now = self._clock()
    self._writer.add({"lost": why, "seconds": seconds, "at": now})
    # Saving is reported this way, and the step that was saved shall be written
    # with its own time, too.
    self._note(self._step, now)

  def share(self) -> float:
    """Returns the goodput up to now, from 0 to 1."""
    now = self._clock()
    whole = now - self._began
    return min((self._kept + self._open_seconds(now)) / max(whole, 1e-9), 1.0)

  def close(self) -> None:
    """Ends the last step and closes the file."""
    with contextlib.closing(self._writer):
      self._note(self._step, self._clock())

  def _note(self, step: int | None, now: float) -> None:
    """Writes the time that is kept if this step is."""
    if step is not None:
      kept = self._kept + self._open_seconds(now)
      self._writer.add({"step": step, "at": now, "kept": kept})

  def _open_seconds(self, now: float) -> float:
    """Returns the time of the step at hand, without what was lost in it."""
    if self._step is None:
      return 0.0
    return max(now - self._opened - self._away, 0.0)

  def _add(self, why: str, seconds: float) -> None:
    """Adds to `lost_seconds`."""
    if seconds > 0:
      self.lost_seconds[why] = self.lost_seconds.get(why, 0.0) + seconds
