"""Metrics of a run: metrics.jsonl, TensorBoard, W&B, the terminal, goodput.

`MetricWriter` is what the training loop calls. `read_metrics` and `read_curve`
read metrics.jsonl, of which a line that a kill cut off is dropped.
"""

import collections
import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, SupportsFloat

import jax
import numpy as np
import pydantic

from hourjax import schema
from hourjax.errors import UserError
from hourjax.jsonl import JsonlWriter, read_valid_rows
from hourjax.progress import ProgressBar
from hourjax.training.config import Experiment, MetricsConfig, parse_steps
from hourjax.training.data_loader import DataLoader
from hourjax.training.optimizer import COMPONENTS, schedule
from hourjax.training.throughput import (
  Goodput,
  ThroughputCounter,
  hbm_usage,
  wall_clock,
)
from hourjax.training.trackers import (
  Profiler,
  TensorBoardWriter,
  WandbWriter,
  require_wandb,
)

_NAME = "metrics.jsonl"


class _Row(schema.Schema):
  """Describes a line of metrics.jsonl: the step, and numbers of any name."""

  model_config = pydantic.ConfigDict(extra="allow")
  # The type of all other keys, as pydantic asks for it.
  __pydantic_extra__: dict[  # pyrefly: ignore[bad-override]  pydantic's own way
    str, float | Literal["NaN", "Infinity", "-Infinity"]
  ]

  step: int


class MetricsFile:
  """Appends a line for each logged step to WORKDIR/metrics.jsonl.

  JSON has no numbers that are not finite: they are written as "NaN",
  "Infinity" and "-Infinity", and `read_metrics` returns them as floats.
  """

  def __init__(self, workdir: str | os.PathLike, *, start: int):
    """Drops the lines after step `start`, since those steps are taken again.

    Args:
      workdir: of the run.
      start: step of the checkpoint that the run goes on from, 0 for a new run.

    Raises:
      UserError: a line is of another kind.
    """
    path = pathlib.Path(workdir) / _NAME
    rows = read_valid_rows(path, {"step": _Row}) if path.exists() else []
    kept = [row for row in rows if row["step"] <= start]
    self._writer = JsonlWriter.at(path, kept)
    self._writer.open()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the line of a step.

    Args:
      step: that was taken.
      values: metrics by name.
    """
    self._writer.add({"step": step, **values})

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Reads the lines of metrics.jsonl; one that is half written is left out.

  Returns:
    Metrics by name, with "step", of each logged step.

  Raises:
    UserError: the file is missing, or a line is of another kind.
  """
  return [
    {k: float(v) if isinstance(v, str) else v for k, v in row.items()}
    for row in read_valid_rows(pathlib.Path(workdir) / _NAME, {"step": _Row})
  ]


def read_curve(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Returns the metrics of a run, after those of the runs it began from.

  Steps are counted on from run to run.

  Raises:
    UserError: a file cannot be read, or a run began from itself.
  """
  runs, folder = [], pathlib.Path(workdir)
  while not runs or (folder / _NAME).exists():
    if folder.resolve() in [run.resolve() for run in runs]:
      raise UserError(
        f"{runs[-1]}/config.json says that the run began with the weights of"
        f" {folder}, which began with its own; correct 'init' there"
      )
    runs.append(folder)
    remedy = "give the workdir of a training run"
    config = schema.read_schema(_Start, folder / "config.json", remedy=remedy)
    if not config.init:
      break
    folder = pathlib.Path(config.init)
  curve: list[dict[str, float]] = []
  for run in reversed(runs):
    done = curve[-1]["step"] if curve else 0
    curve += [{**row, "step": row["step"] + done} for row in read_metrics(run)]
  return curve


class _Start(schema.Schema):
  """Describes the key of a run's configuration that is read here."""

  init: str


# Reasons of lost time that come again and again. Time lost for other reasons is
# not expected again, so the estimate of the time left does not count it.
_RECURRING = ("save", "evaluate")


class MetricWriter:
  """Writes the metrics of a run to all places, and keeps its times.

  On hosts other than the first, all methods do nothing. If something cannot be
  written during the run, for instance to a full disk, this is printed once and
  training goes on.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    config: MetricsConfig,
    *,
    run_config: Mapping[str, Any],
    steps: int,
    start: int,
    flops_per_second: float | None,
    primary: bool = True,
    began: float | None = None,
    clock: Callable[[], float] = wall_clock,
  ):
    """Opens all files; existing ones lose their lines after step `start`.

    Args:
      workdir: of the run; must exist.
      config: says what to write.
      run_config: configuration of the whole run as plain data, to be shown.
      steps: of the run.
      start: step of the checkpoint that it goes on from, 0 for a new run.
      flops_per_second: bf16 peak of all devices together, for MFU; None if it
        is not known.
      primary: whether this is the first host.
      began: when this process began, in seconds since 1970; now if None.
      clock: returns seconds since 1970.

    Raises:
      UserError: steps are to be traced that the run does not have, or W&B was
        asked for and is not installed or refuses.
    """
    # All hosts must raise these errors: if only the first one did, the others
    # would wait for it.
    traced = _traced(config, steps)
    if config.wandb:
      require_wandb(config.wandb)
    self._open, self._failed = primary, set[str]()
    if not primary:
      return
    workdir = pathlib.Path(workdir)
    self._clock, self._peak = clock, flops_per_second
    self._steps, self._start, self._last = steps, start, start
    self._mark, self._away, self._once = clock(), 0.0, 0.0
    self._first: float | None = None  # when the first step began
    self._goodput = Goodput(workdir, start=start, began=began, clock=clock)
    self._metrics = MetricsFile(workdir, start=start)
    self._profiler = Profiler(workdir, _coming(traced, start))
    self._writers: dict[str, TensorBoardWriter | WandbWriter] = {}
    if config.tensorboard:
      self._writers["TensorBoard's events"] = TensorBoardWriter(
        workdir / "tensorboard", start=start, config=run_config
      )
    if config.wandb:
      self._writers["W&B"] = WandbWriter(config.wandb, workdir, run_config)
    self._progress = ProgressBar(steps=steps, start=start)

  def begin_step(self, step: int) -> None:
    """Notes that a step begins; to be called before its data is asked for."""
    if not self._open:
      return
    with self._continue_on_error("goodput.jsonl"):
      self._goodput.begin_step(step)
    if self._first is None:
      self._first = self._mark = self._clock()
      self._away = self._once = 0.0
    self._progress.update(step - 1)
    if took := self._profiler.begin_step(step):
      self.add_lost(took, "profile")

  def write(
    self,
    step: int,
    scalars: Mapping[str, SupportsFloat],
    *,
    sums: Mapping[str, float],
    data_wait: float,
    learning_rates: Mapping[str, float],
    counts: Mapping[str, int],
  ) -> None:
    """Writes the metrics of a step to all places.

    Args:
      step: that was taken; the devices must be done with it.
      scalars: of this step, as the train step returns them: "loss",
        "grad_norm", "grad_norm/COMPONENT" and so on; and those of an evaluation
        after it, as "eval/NAME".
      sums: over the steps since the last call: "steps", how many they are;
        "samples", "rows", "micro_batches" and label "tokens"; "video_seconds";
        and "flops", as MFU counts them.
      data_wait: seconds waited for data since the last call.
      learning_rates: by component.
      counts: of events since the run began, by key, such as "unread_damaged".
    """
    if not self._open:
      return
    now = self._clock()
    took = max(now - self._mark - self._away, 1e-9)
    lost = self._goodput.lost_seconds
    speed = {
      "step_seconds": took / max(step - self._last, 1),
      "tokens_per_second": sums["tokens"] / took,
      "video_hours_per_second": sums["video_seconds"] / 3600 / took,
    }
    if self._peak is not None:
      speed["mfu"] = sums["flops"] / took / self._peak
    steps, hours = max(sums["steps"], 1), sums["video_seconds"] / 3600
    a_step = {
      f"{name}_per_step": sums[name] / steps
      for name in ("samples", "rows", "micro_batches", "tokens")
    } | {"video_hours_per_step": hours / steps}
    groups: dict[str, Mapping[str, Any]] = {
      "train": {"tokens": sums["tokens"], **scalars},
      "step": a_step,
      "learning_rate": _named("learning_rate", learning_rates),
      "speed": speed,
      "time": {
        "data_wait": min(data_wait / took, 1.0),
        "goodput": self._goodput.share(),
      },
      "lost_seconds": _named("lost_seconds", lost),
      "memory": hbm_usage(jax.local_devices()),
      "skipped": counts,
    }
    self._last, self._mark, self._away = step, now, 0.0
    self._write(step, groups)

  def add_lost(self, seconds: float, why: str) -> None:
    """Counts time that ends now as lost.

    It lowers goodput. Within a step it does not count as that step's time.

    Args:
      seconds: that were lost.
      why: "restore", "compile", "save", "evaluate" and so on.
    """
    if not self._open:
      return
    with self._continue_on_error("goodput.jsonl"):
      self._goodput.add_lost(seconds, why)
    self._away += seconds
    if why not in _RECURRING:
      self._once += seconds

  def close(self) -> None:
    """Closes everything; a second call does nothing."""
    if not self._open:
      return
    self._open = False
    self._progress.close()
    files = {"goodput.jsonl": self._goodput, "metrics.jsonl": self._metrics}
    for name, each in [*files.items(), *self._writers.items()]:
      with self._continue_on_error(name):
        each.close()
    with self._continue_on_error("the trace"):
      self._profiler.close()

  def _write(
    self, step: int, groups: Mapping[str, Mapping[str, SupportsFloat]]
  ) -> None:
    """Writes metrics, by group and name; only trackers show the groups."""
    values = {
      (group, key): float(value)
      for group, of_group in groups.items()
      for key, value in of_group.items()
    }
    row = {key: value for (_, key), value in values.items()}
    with self._continue_on_error("metrics.jsonl"):
      self._metrics.write(step, row)
    tags = {
      key if "/" in key else f"{group}/{key}": value
      for (group, key), value in values.items()
    }
    for name, writer in self._writers.items():
      with self._continue_on_error(name):
        writer.write(step, tags)
    self._progress.show(step, row, self._left(step))

  def _left(self, step: int) -> float:
    """Returns the seconds to the end of the run, at the speed so far."""
    first = self._mark if self._first is None else self._first
    took = max(self._mark - first - self._once, 0.0)
    return took / max(step - self._start, 1) * (self._steps - step)

  @contextlib.contextmanager
  def _continue_on_error(self, name: str) -> Iterator[None]:
    """Prints, once for each name, that something could not be written."""
    try:
      yield
    except OSError as error:
      if name not in self._failed:
        print(
          f"warning: {name} could not be written ({error}); training goes on",
          file=sys.stderr,
        )
      self._failed.add(name)


class IntervalMetrics:
  """Adds up what is logged as a sum over the steps between two that are."""

  def __init__(
    self,
    writer: MetricWriter,
    experiment: Experiment,
    throughput: ThroughputCounter,
    loader: DataLoader,
    steps: int,
  ):
    """Starts with no step.

    Args:
      writer: that gets them.
      experiment: of the run.
      throughput: counts what is in a step's rows.
      loader: of the micro-batches.
      steps: of the run.
    """
    self._writer, self._throughput = writer, throughput
    self._loader, self._rows = loader, experiment.step_rows
    optimizer = experiment.optimizer
    self._rates = {
      name: schedule(optimizer.rate(name), steps, optimizer.warmup)
      for name in COMPONENTS
      if optimizer.rate(name) > 0
    }
    self._waited = loader.waited
    self._sums = collections.defaultdict[str, float](float)

  def add(
    self, position: int, scalars: Mapping[str, Any], micro_batches: int
  ) -> None:
    """Counts a step whose first row is at `position`."""
    totals = self._throughput.count(position, self._rows)
    step = {
      **totals._asdict(),
      "tokens": int(scalars["tokens"]),
      "micro_batches": micro_batches,
      "steps": 1,
    }
    for name, value in step.items():
      self._sums[name] += value

  def write(
    self, step: int, scalars: Mapping[str, Any], counts: Mapping[str, int]
  ) -> None:
    """Writes a step's metrics, and the sums since the last call.

    Args:
      step: that was taken.
      scalars: of it, as the train step returns them, and of an evaluation.
      counts: since the run began, by key; with "skipped_steps".
    """
    # A skipped step leaves the optimizer's count of steps as it was.
    updates = max(step - 1 - counts["skipped_steps"], 0)
    waited = self._loader.waited - self._waited
    self._waited += waited
    self._writer.write(
      step,
      {key: value for key, value in scalars.items() if key != "finite"},
      sums=self._sums,
      data_wait=waited,
      learning_rates={
        name: float(np.asarray(rate(updates)))
        for name, rate in self._rates.items()
      },
      counts=counts,
    )
    self._sums.clear()


def _named(of: str, values: Mapping[str, float]) -> dict[str, float]:
  """Returns values under "GROUP/NAME"."""
  return {f"{of}/{name}": value for name, value in values.items()}


def _traced(config: MetricsConfig, steps: int) -> range:
  """Returns the steps to trace; raises a UserError if the run has no such."""
  asked = parse_steps(config.profile_steps)
  if asked and asked[-1] > steps:
    raise UserError(
      f"config.metrics.profile_steps is {config.profile_steps}, which asks for"
      f" step {asked[-1]}, but the run ends with step {steps}; choose steps of"
      " the run"
    )
  return asked


def _coming(asked: range, start: int) -> range:
  """Returns those of the steps that are still to be taken.

  There may be none: a run that was interrupted is started again with the same
  options.
  """
  coming = range(max(asked.start, start + 1), asked.stop)
  if asked and not coming:
    print(
      f"no trace: the steps {asked.start} to {asked[-1]} of"
      f" config.metrics.profile_steps lie before step {start + 1}, with which"
      " this run goes on",
      file=sys.stderr,
    )
  return coming
