"""From steps to what `MetricWriter` writes down of them."""
# MERGED hourjax.training.loop:
# The training loop.
#
# The order is a contract. Before the first step: refuse a workdir of another
# configuration, open the data, restore (or initialise). For each step: get its
# batches, take it, look whether the loss is finite, write metrics, see to a sa
# that has ended, save a checkpoint if one is due; and where a signal has asked
# for it, save and leave. Nothing is saved in a series of steps that are not
# finite.
#
# A checkpoint holds the position in the data, so the run that continues sees t
# batches that the interrupted one would have seen. Every process of a run goes
# through the same order; the first one writes the files.

import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from hourjax import progress
from hourjax.data.dataset import Dataset
from hourjax.data.media.frame_rules import sparse_note
from hourjax.data.pipeline import batches, check_memory
from hourjax.data.records.record import Skipped
from hourjax.data.row_plan import RowPlan
from hourjax.errors import UserError
from hourjax.parallel import hosts
from hourjax.parallel.chips import peak_flops
from hourjax.parallel.mesh import make_mesh
from hourjax.training.batch_sharding import Placing, check_rows
from hourjax.training.checkpoint import Checkpoints
from hourjax.training.config import Experiment
from hourjax.training.data_loader import (
  Feed,
  UnreadLedger,
  open_dataset,
  row_plan,
)
from hourjax.training.faults import Leave, NonFinite
from hourjax.training.metric_writer import MetricWriter
from hourjax.training.optimizer import COMPONENTS, schedule
from hourjax.training.throughput import RowWork, row_records
from hourjax.training.train_state import (
  abstract_state,
  fresh_state,
  state_shardings,
)
from hourjax.training.train_step import Step, TrainState
from hourjax.training.workdir import check_workdir, epoch_rows, write_about


class Report:
  """Adds up steps between two that are logged."""

  def __init__(
    self,
    watch: MetricWriter,
    experiment: Experiment,
    work: RowWork,
    feed: Feed,
    steps: int,
  ):
    self._watch, self._work, self._feed = watch, work, feed
    self._rows = experiment.step_rows
    optimizer = experiment.optimizer
    self._rates = {
      name: schedule(optimizer.rate(name), steps, optimizer.warmup)
      for name in COMPONENTS
      if optimizer.rate(name) > 0
    }
    self._waited = feed.waited
    self._clear()

  def add(self, position: int, scalars: Mapping[str, Any]) -> None:
    """Counts a step whose first row is at `position`."""
    work = self._work.of(position, self._rows)
    self._tokens += int(scalars["tokens"])
    self._seconds += work.video_seconds
    self._flops += work.flops

  def write(
    self, step: int, scalars: Mapping[str, Any], counts: Mapping[str, int]
  ) -> None:
    """Writes a step down, with what was added up since the last one."""
    # A skipped step leaves the optimizer's own count of steps as it was.
    done = step - 1 - counts["skipped_steps"]
    waited, self._waited = self._feed.waited - self._waited, self._feed.waited
    self._watch.wrote(
      step,
      {key: value for key, value in scalars.items() if key != "finite"},
      tokens=self._tokens,
      video_seconds=self._seconds,
      model_flops=self._flops,
      data_wait=waited,
      learning_rates={
        name: float(rate(max(done, 0))) for name, rate in self._rates.items()
      },
      counts=counts,
    )
    self._clear()

  def _clear(self):
    self._tokens, self._seconds, self._flops = 0, 0.0, 0.0


def train(experiment: Experiment, workdir: pathlib.Path) -> int | None:
  """Trains to the last step, from the newest checkpoint in `workdir` if any.

  Leaves config.json, plan.json, metrics.jsonl, skipped.json, checkpoints/ and,
  if samples could not be read, unread.jsonl, and if steps were skipped,
  nonfinite.jsonl.

  Returns:
    The number of the signal that ended the run early, None otherwise.

  Raises:
    UserError: for anything wrong with data, weights or configuration.
  """
  with contextlib.closing(Leave()) as leave:
    _train(experiment, workdir, leave)
  return leave.signal


def _train(experiment: Experiment, workdir: pathlib.Path, leave: Leave) -> None:
  began = time.time()
  check_workdir(experiment, workdir)
  with hosts.together():
    with progress.step("opening the dataset and planning its rows"):
      dataset = open_dataset(experiment)
      _check_vocabulary(experiment, dataset)
      plan = row_plan(experiment, dataset)
      rows = epoch_rows(plan, workdir)
    mesh = make_mesh(experiment.mesh)
    check_rows(
      mesh.shape, experiment.row_spec, experiment.batch_rows,
      experiment.accumulate,
    )  # fmt: skip
    placing = Placing(mesh, experiment.row_spec, experiment.batch_rows)
    check_memory(experiment.row_spec, len(placing.mine), experiment.read)
    steps = total_steps(experiment, rows["rows"])
    like, optimizer = abstract_state(experiment, mesh, steps)
  checkpoints = Checkpoints(
    workdir,
    keep=experiment.keep_checkpoints,
    on_error=experiment.on_save_error,
  )
  with contextlib.closing(checkpoints):
    position, restoring = 0, time.monotonic()
    if checkpoints.latest() is None:
      with progress.step("making the weights and the optimizer's state"):
        state = fresh_state(experiment, like, optimizer)
    else:
      with progress.step(f"restoring step {checkpoints.latest()}"):
        state, position = checkpoints.restore(like, plan=rows["plan"])
      _check_position(plan, position, workdir)
    restoring = time.monotonic() - restoring
    with hosts.together():
      if hosts.is_primary():
        write_about(experiment, rows, dataset.skipped, workdir)
        print(
          _summary(experiment, dataset, rows, state, steps), file=sys.stderr
        )
    start = int(state.step)
    if leave.at_once():
      print(f"left before step {start + 1}; nothing is lost", file=sys.stderr)
    elif start < steps:
      run = _Run(
        experiment, dataset, plan, placing, checkpoints, leave, workdir, steps
      )
      step = Step(experiment.model, optimizer, state_shardings(like))
      run.go(step, state, position, began=began, restoring=restoring)
    elif hosts.is_primary():
      print(f"already trained: step {start} of {steps}", file=sys.stderr)
  if hosts.is_primary():
    report_skipped(dataset.skipped)


@dataclasses.dataclass
class _Run:
  """What stays the same from step to step."""

  experiment: Experiment
  dataset: Dataset
  plan: RowPlan
  placing: Placing
  checkpoints: Checkpoints
  leave: Leave
  workdir: pathlib.Path
  steps: int

  def go(
    self,
    take_step: Step,
    state: TrainState,
    position: int,
    *,
    began: float,
    restoring: float,
  ) -> None:
    """Takes the steps that are left.

    Args:
      take_step: compiled on its first call.
      state: to start from; its memory is reused.
      position: in the data, of the next row.
      began: seconds since 1970 when the process did.
      restoring: seconds that it took to get the state.
    """
    experiment, start = self.experiment, int(state.step)
    config = dataclasses.asdict(experiment)
    fingerprint = self.plan.fingerprint()
    with contextlib.ExitStack() as stack:
      watch = stack.enter_context(
        contextlib.closing(self._watch(config, start, began))
      )
      nonfinite = stack.enter_context(
        contextlib.closing(self._nonfinite(start))
      )
      unread = UnreadLedger(
        self.workdir,
        start=start,
        max_share=experiment.data.max_skipped,
        process=hosts.index(),
      )
      feed = stack.enter_context(contextlib.closing(self._feed(position)))
      work = RowWork(experiment, self.dataset, self.plan)
      report = Report(watch, experiment, work, feed, self.steps)
      watch.lost(restoring, "restore")
      for step in range(start + 1, self.steps + 1):
        watch.step_begins(step)
        micro = _MicroBatches(feed, experiment.accumulate)
        called = time.monotonic()
        if step == start + 1:
          with progress.step("compiling the train step"):
            state, scalars = take_step(state, micro)
        else:
          state, scalars = take_step(state, micro)
        if step == start + 1:
          # The call returns when all is compiled and queued.
          took = time.monotonic() - called - feed.waited
          watch.lost(max(took, 0.0), "compile")
        # Waits for the step. Meanwhile the feed prepares the next batch; more
        # steps in flight would hold a batch each.
        scalars = jax.device_get(scalars)
        for delivered in micro.delivered:
          unread.add(step, delivered)
        finite = nonfinite.check(step, scalars, self._records(position))
        report.add(position, scalars)
        if step % experiment.log_every == 0 or step in (1, self.steps):
          counts = {f"unread_{kind}": n for kind, n in unread.counts.items()}
          counts["skipped_steps"] = nonfinite.skipped
          report.write(step, scalars, counts)
        position = micro.delivered[-1].position
        if nonfinite.too_many:
          self.checkpoints.settle()
          raise nonfinite.error(step, self.checkpoints.latest())
        saving = time.monotonic()
        self.checkpoints.poll()
        asked = self.leave.reached(step)
        due = step % experiment.checkpoint_every == 0 or asked
        if (due and finite) or step == self.steps:
          self.checkpoints.save(state, position, fingerprint, config)
          watch.lost(time.monotonic() - saving, "save")
        if asked:
          break
      with progress.step("writing the last checkpoint"):
        self.checkpoints.finish()
    if asked and hosts.is_primary():
      newest = self.checkpoints.latest()
      print(
        f"left after step {step} of {self.steps}; the same command goes on"
        f" from step {newest or 0}",
        file=sys.stderr,
      )

  def _watch(self, config, start, began):
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    return MetricWriter(
      self.workdir,
      self.experiment.watch,
      run_config=config,
      steps=self.steps,
      start=start,
      flops_per_second=peak and peak * jax.device_count(),
      primary=hosts.is_primary(),
      began=began,
    )

  def _nonfinite(self, start):
    return NonFinite(
      self.workdir,
      start=start,
      max_in_a_row=self.experiment.max_nonfinite,
      primary=hosts.is_primary(),
    )

  def _feed(self, position):
    delivered = batches(
      self.dataset,
      self.plan,
      self.experiment.row_spec,
      rows=self.experiment.batch_rows,
      mine=self.placing.mine,
      start=position,
      options=self.experiment.read,
    )
    return Feed(delivered, self.placing)

  def _records(self, position):
    rows = self.experiment.step_rows
    return lambda: row_records(self.dataset, self.plan, position, rows)


class _MicroBatches:
  """Iterates over one step's micro-batches on the devices.

  Attributes:
    delivered: what came with each of them.
  """

  def __init__(self, feed: Feed, count: int):
    self._feed, self._left = feed, count
    self.delivered = []

  def __iter__(self):
    return self

  def __next__(self):
    if not self._left:
      raise StopIteration
    self._left -= 1
    batch, delivered = next(self._feed)
    self.delivered.append(delivered)
    return batch


def report_skipped(skipped: list[Skipped]) -> None:
  """Lists skipped records on stderr, at most 20 by name."""
  if not skipped:
    return
  lines = [f"{len(skipped)} records were skipped:"]
  lines += [f"  {item.id}: {item.reason}" for item in skipped[:20]]
  if len(skipped) > 20:
    lines.append("  ... all of them are in skipped.json")
  print("\n".join(lines), file=sys.stderr)


def total_steps(experiment: Experiment, rows: int) -> int:
  """Steps of the run: as configured, or enough for the epochs of `rows`."""
  if experiment.steps:
    return experiment.steps
  return math.ceil(rows * experiment.epochs / experiment.step_rows)


def _check_position(plan: RowPlan, position: int, workdir) -> None:
  try:
    plan.row(position)
  except IndexError as error:
    raise UserError(
      f"the newest checkpoint of {workdir} goes on where the data has no row"
      f" ({error}); start another workdir with config.init set to this one"
    ) from None


def _check_vocabulary(experiment: Experiment, dataset: Dataset) -> None:
  vocab = experiment.model.decoder.vocab
  if dataset.vocab_size > vocab:
    raise UserError(
      f"the tokenizer has {dataset.vocab_size} ids, the decoder"
      f" {vocab} embeddings; use the model's own tokenizer or raise"
      " config.model.decoder.vocab"
    )


def _summary(experiment, dataset, rows, state, steps):
  trained = sum(x.size for x in state.trained.values())
  frozen = sum(x.size for x in state.frozen.values())
  note = sparse_note(len(dataset.sparse))
  return (
    f"{len(dataset)} samples in {rows['rows']} rows an epoch; {trained:,}"
    f" parameters trained, {frozen:,} frozen; {steps} steps of"
    f" {experiment.step_rows} rows, from step"
    f" {int(state.step)}; {jax.devices()[0].platform} x {jax.device_count()}"
  ) + (f"\nnote: {note}" if note else "")
