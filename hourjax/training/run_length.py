"""How long a run is: rows, samples and steps of an epoch, and steps in all."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from hourjax import schema
from hourjax.data.row_plan import RowPlan
from hourjax.errors import UserError
from hourjax.training.config import Experiment

# Samples of a step in the published runs; the second in stage 3 of 7B.
PUBLISHED = (128, 256)


@dataclasses.dataclass(frozen=True)
class EpochCounts:
  """Holds what the first epoch of a run has.

  Attributes:
    plan: fingerprint of the row plan.
    rows: number of rows.
    streams: number of samples by stream.
    step_rows: rows of a step -> how many steps have so many; empty where a step
      is a number of rows.
  """

  plan: str
  rows: int
  streams: Mapping[int, int]
  step_rows: Mapping[int, int] = dataclasses.field(default_factory=dict)

  @property
  def samples(self) -> int:
    """Returns the number of samples."""
    return sum(self.streams.values())

  def saved(self) -> dict[str, Any]:
    """Returns what plan.json holds: all that takes seconds to count."""
    steps = {str(rows): n for rows, n in sorted(self.step_rows.items())}
    return {"plan": self.plan, "rows": self.rows} | (
      {"step_rows": steps} if steps else {}
    )


class _Saved(schema.Schema):
  """Describes plan.json."""

  plan: str
  rows: int = pydantic.Field(gt=0)
  step_rows: dict[str, int] = pydantic.Field(default_factory=dict)


def count_epoch(
  experiment: Experiment, plan: RowPlan, workdir: pathlib.Path
) -> EpochCounts:
  """Counts the rows of the first epoch, in all and by step.

  To count them the whole epoch is packed, which takes seconds for a million
  samples; a run that goes on finds the numbers in its plan.json.

  Args:
    experiment: of the run.
    plan: of its rows.
    workdir: of the run; may not be there.
  """
  path, fingerprint = workdir / "plan.json", plan.fingerprint()
  streams = plan.samples_by_stream(0)
  # One that cannot be read is counted again.
  with contextlib.suppress(UserError, ValueError):
    known = schema.read_schema(_Saved, path, remedy="")
    steps = {int(rows): n for rows, n in known.step_rows.items()}
    whole = sum(rows * n for rows, n in steps.items())
    wanted = known.rows if experiment.batch_samples else 0
    if known.plan == fingerprint and whole == wanted:
      return EpochCounts(fingerprint, known.rows, streams, steps)
  windows = plan.rows_by_window(0)
  found: dict[int, int] = {}
  if experiment.batch_samples:
    for rows in windows:
      found[rows] = found.get(rows, 0) + 1
  return EpochCounts(fingerprint, sum(windows), streams, found)


def epoch_steps(experiment: Experiment, counts: EpochCounts) -> int:
  """Returns the number of steps of the first epoch."""
  if experiment.batch_samples:
    return sum(counts.step_rows.values())
  return math.ceil(counts.rows / experiment.step_rows)


def total_steps(experiment: Experiment, counts: EpochCounts) -> int:
  """Returns the number of steps of the run.

  In batches of samples an epoch has the whole batches of each stream, as that
  of the official data loader, and where `drop_last` is False what is left of
  each; times the epochs, rounded up. Every epoch counts as the first. (The
  schedule of the official run does not count by stream, so that it may be
  longer by a step or two.)

  Args:
    experiment: with `steps`, or with `epochs` if that is 0.
    counts: of an epoch.
  """
  if experiment.steps:
    return experiment.steps
  if experiment.batch_samples:
    steps = epoch_steps(experiment, counts)
    return max(1, math.ceil(experiment.epochs * steps))
  return math.ceil(counts.rows * experiment.epochs / experiment.step_rows)


def describe_steps(experiment: Experiment, counts: EpochCounts) -> str:
  """Returns what a step is, and how many an epoch has, for the first line.

  Args:
    experiment: of the run.
    counts: of an epoch.
  """
  epoch, rows = epoch_steps(experiment, counts), experiment.batch_rows
  if not experiment.batch_samples:
    mean = counts.samples / counts.rows * experiment.step_rows
    published = " and ".join(
      f"{math.ceil(counts.samples / samples):,} of {samples}"
      for samples in PUBLISHED
    )
    return (
      f"{experiment.step_rows} rows, {mean:,.1f} samples on average"
      f" ({epoch:,} steps an epoch; in batches of samples, as published, it has"
      f" {published})"
    )
  micro = sum(-(-n // rows) * k for n, k in counts.step_rows.items())
  return (
    f"{experiment.batch_samples} samples of one stream, in"
    f" {counts.rows / epoch:,.1f} rows on average ({micro / epoch:.2f}"
    f" micro-batches of {rows} rows, {1 - counts.rows / (micro * rows):.0%} of"
    f" them empty; {epoch:,} steps an epoch)"
  )


def left_out(
  experiment: Experiment, counts: EpochCounts, names: Sequence[str]
) -> list[str]:
  """Returns a sentence for each stream of which no sample is trained on.

  Args:
    experiment: of the run.
    counts: of an epoch.
    names: of the streams.
  """
  if not experiment.drop_last:
    return []
  samples = experiment.batch_samples
  return [
    f"stream {names[stream]} has {count} samples an epoch, fewer than"
    f" config.batch_samples={samples}, so config.drop_last leaves it out; set"
    " config.drop_last=False to train on it"
    for stream, count in counts.streams.items()
    if count < samples
  ]
