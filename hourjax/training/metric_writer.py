"""metrics.jsonl and the loss curve."""
# MERGED hourjax.training.watch:
# What is written down about a run while it trains.

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, SupportsFloat

import jax
import pydantic

from hourjax import schema
from hourjax.errors import UserError
from hourjax.jsonl import Ledger, read_rows
from hourjax.training.config import MetricsConfig
from hourjax.training.profiling import Profiler, parse_steps
from hourjax.training.progress_bar import Screen
from hourjax.training.throughput import Goodput, hbm, wall_clock
from hourjax.training.trackers import Events, WandbRun, require_wandb

_NAME = "metrics.jsonl"


class _Row(schema.Schema):
  """A line: the step, and a number of any name."""

  model_config = pydantic.ConfigDict(extra="allow")
  __pydantic_extra__: dict[str, float | Literal["NaN", "Infinity", "-Infinity"]]

  step: int


class MetricsFile:
  """Appends to WORKDIR/metrics.jsonl, a line a logged step.

  Numbers that are not finite stand in it as "NaN", "Infinity", "-Infinity", as
  JSON has none; `read_metrics` gives them back as floats.
  """

  def __init__(self, workdir: str | os.PathLike, *, start: int):
    """Drops the lines after `start`: those steps will be taken again."""
    path = pathlib.Path(workdir) / _NAME
    rows = read_rows(path, {"step": _Row}) if path.exists() else []
    kept = [row for row in rows if row["step"] <= start]
    self._ledger = Ledger(path, kept)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._ledger.add({"step": step, **values})

  def close(self) -> None:
    self._ledger.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """The lines of metrics.jsonl; a half-written one is left out."""
  return [
    {k: float(v) if isinstance(v, str) else v for k, v in row.items()}
    for row in read_rows(pathlib.Path(workdir) / _NAME, {"step": _Row})
  ]


def read_curve(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Metrics of a run, after those of the runs it was initialised from.

  Raises:
    UserError: a file cannot be read, or a run was initialised from itself.
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
  """What is read here of a run's configuration."""

  init: str


# Losses that come again and again; the others are left out of the time left.
_RECURRING = ("save",)


class MetricWriter:
  """Metrics, TensorBoard, W&B, progress, goodput and traces of a run.

  On hosts other than the first, all methods do nothing. What cannot be written
  during the run, e.g. to a full disk, is said once and does not stop it.
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
    """Opens all files; lines after `start` are dropped from those that exist.

    Args:
      workdir: exists.
      config: what to write.
      run_config: of the whole run, as plain data, to show.
      steps: of the run.
      start: step of the checkpoint that it goes on from, 0 for a new run.
      flops_per_second: bf16 peak of all devices together; None if not known,
        then there is no MFU.
      primary: whether this is the first host.
      began: when this process began, seconds since 1970; default: now.
      clock: seconds since 1970.

    Raises:
      UserError: steps to trace that the run does not have; W&B asked for, but
        not installed or not willing.
    """
    # Before hosts differ: one that raises alone leaves the others waiting.
    traced = _traced(config, steps)
    if config.wandb:
      require_wandb(config.wandb)
    self._open, self._failed = primary, set[str]()
    if not primary:
      return
    workdir = pathlib.Path(workdir)
    self._clock, self._peak = clock, flops_per_second
    self._steps, self._start, self._last = steps, start, start
    self._mark, self._first, self._away, self._once = clock(), None, 0.0, 0.0
    self._goodput = Goodput(workdir, start=start, began=began, clock=clock)
    self._metrics = MetricsFile(workdir, start=start)
    self._profiler = Profiler(workdir, _coming(traced, start))
    self._writers: dict[str, Events | WandbRun] = {}
    if config.tensorboard:
      self._writers["TensorBoard's events"] = Events(
        workdir / "tensorboard", start=start, config=run_config
      )
    if config.wandb:
      self._writers["W&B"] = WandbRun(config.wandb, workdir, run_config)
    self._screen = Screen(steps=steps, start=start)

  def step_begins(self, step: int) -> None:
    """To be called before a step's data is asked for."""
    if not self._open:
      return
    with self._going_on("goodput.jsonl"):
      self._goodput.step_begins(step)
    if self._first is None:
      self._first = self._mark = self._clock()
      self._away = self._once = 0.0
    self._screen.step(step - 1)
    if took := self._profiler.step_begins(step):
      self.lost(took, "profile")

  def wrote(
    self,
    step: int,
    scalars: Mapping[str, SupportsFloat],
    *,
    tokens: int,
    video_seconds: float,
    model_flops: float,
    data_wait: float,
    learning_rates: Mapping[str, float],
    counts: Mapping[str, int],
  ) -> None:
    """Writes a step down.

    Args:
      step: that was taken; its devices are done.
      scalars: of this step, as the train step returns them: loss, grad_norm,
        grad_norm/PART, ...
      tokens, video_seconds, model_flops: sums over the steps since the last
        call.
      data_wait: seconds waited for data since the last call.
      learning_rates: by component.
      counts: since the run began, e.g. unread_damaged; their names become
        keys.
    """
    if not self._open:
      return
    now = self._clock()
    took = max(now - self._mark - self._away, 1e-9)
    lost = self._goodput.lost_seconds
    groups = {
      "train": {"tokens": tokens, **scalars},
      "learning_rate": _named("learning_rate", learning_rates),
      "speed": {
        "step_seconds": took / max(step - self._last, 1),
        "tokens_per_second": tokens / took,
        "video_hours_per_second": video_seconds / 3600 / took,
      },
      "time": {
        "data_wait": min(data_wait / took, 1.0),
        "goodput": self._goodput.share(),
      },
      "lost_seconds": _named("lost_seconds", lost),
      "memory": hbm(jax.local_devices()),
      "skipped": counts,
    }
    if self._peak is not None:
      groups["speed"]["mfu"] = model_flops / took / self._peak
    self._last, self._mark, self._away = step, now, 0.0
    self._write(step, groups)

  def lost(self, seconds: float, why: str) -> None:
    """Tells of time until now that is not progress.

    It counts against goodput and, within a step, not as that step's time.

    Args:
      seconds: that it took.
      why: "restore", "compile", "save", ...
    """
    if not self._open:
      return
    with self._going_on("goodput.jsonl"):
      self._goodput.lost(seconds, why)
    self._away += seconds
    if why not in _RECURRING:
      self._once += seconds

  def close(self) -> None:
    """Ends everything; a second call does nothing."""
    if not self._open:
      return
    self._open = False
    self._screen.close()
    files = {"goodput.jsonl": self._goodput, "metrics.jsonl": self._metrics}
    for name, thing in {**files, **self._writers}.items():
      with self._going_on(name):
        thing.close()
    with self._going_on("the trace"):
      self._profiler.close()

  def _write(self, step, groups):
    values = {
      (group, key): float(value)
      for group, of_group in groups.items()
      for key, value in of_group.items()
    }
    row = {key: value for (_, key), value in values.items()}
    with self._going_on("metrics.jsonl"):
      self._metrics.write(step, row)
    tags = {
      key if "/" in key else f"{group}/{key}": value
      for (group, key), value in values.items()
    }
    for name, writer in self._writers.items():
      with self._going_on(name):
        writer.write(step, tags)
    self._screen.show(step, row, self._left(step))

  def _left(self, step: int) -> float:
    """Seconds to the end, if steps go on as since this start."""
    first = self._mark if self._first is None else self._first
    took = max(self._mark - first - self._once, 0.0)
    return took / max(step - self._start, 1) * (self._steps - step)

  @contextlib.contextmanager
  def _going_on(self, name: str):
    """A run is worth more than what is written about it."""
    try:
      yield
    except OSError as error:
      if name not in self._failed:
        print(
          f"warning: {name} could not be written ({error}); training goes on",
          file=sys.stderr,
        )
      self._failed.add(name)


def _named(of: str, values: Mapping[str, float]) -> dict[str, float]:
  return {f"{of}/{name}": value for name, value in values.items()}


def _traced(config: MetricsConfig, steps: int) -> range:
  asked = parse_steps(config.profile_steps)
  if asked and asked[-1] > steps:
    raise UserError(
      f"config.watch.profile_steps is {config.profile_steps}, which asks for"
      f" step {asked[-1]}, but the run ends with step {steps}; choose steps of"
      " the run"
    )
  return asked


def _coming(asked: range, start: int) -> range:
  """Those that are still to be taken.

  None is no mistake: what was interrupted starts with the same options.
  """
  coming = range(max(asked.start, start + 1), asked.stop)
  if asked and not coming:
    print(
      f"no trace: the steps {asked.start} to {asked[-1]} of"
      f" config.watch.profile_steps lie before step {start + 1}, with which"
      " this run goes on",
      file=sys.stderr,
    )
  return coming
