"""The training loop, whose order is a contract.

Before the first step
  1. refuse a workdir that holds the run of another configuration,
  2. open the dataset, plan its rows, and check that the mesh can share them,
  3. restore the newest checkpoint, or initialise,
  4. let the objective prepare what it needs, such as a reference.

Every step
  1. get its micro-batches from the data loader, and take the step,
  2. wait for its loss, and list samples that could not be read,
  3. note whether loss and gradient are finite,
  4. evaluate on held-out data, if that is due,
  5. write metrics, if they are due or there was an evaluation,
  6. stop with an error after too many steps in a row that are not finite,
  7. finish a save that has ended; save a checkpoint, if one is due or a signal
     has come, or the evaluation was the best so far (`faults`), but
     none amid steps that are not finite,
  8. exit if a signal has come, or `config.patience` has run out.

A checkpoint holds the position in the data, so the run that continues sees the
batches that the interrupted one would have seen. All processes of a run go
through the same order; the first one writes the files.
"""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from hourjax import progress
from hourjax.data.dataset import Dataset
from hourjax.data.packing.row_plan import RowPlan
from hourjax.data.pipeline import batches, check_memory
from hourjax.data.records.record import Skipped
from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.parallel import hosts
from hourjax.parallel.gpus import peak_flops
from hourjax.parallel.mesh import make_mesh
from hourjax.training.adapters import first_adapters, load_base
from hourjax.training.batch_sharding import BatchSharding, check_rows
from hourjax.training.checkpoint import Checkpoints
from hourjax.training.config import Experiment
from hourjax.training.data_loader import (
  DataLoader,
  MicroBatches,
  UnreadSampleLog,
  open_dataset,
  question_embedder,
  row_plan,
)
from hourjax.training.faults import EarlyStopping, NonFiniteSteps, Preemption
from hourjax.training.holdout import HoldoutEvaluation
from hourjax.training.metric_writer import (
  IntervalMetrics,
  MetricWriter,
  read_metrics,
)
from hourjax.training.throughput import ThroughputCounter, record_ids
from hourjax.training.train_state import (
  TrainState,
  abstract_state,
  fresh_state,
  state_shardings,
)
from hourjax.training.train_step import LossFunction, TrainStep, dropout_of
from hourjax.training.workdir import (
  check_workdir,
  count_epoch,
  run_summary,
  total_steps,
  write_run_files,
)


class Objective:
  """What is optimised: here the answers' cross entropy, as `sft`.

  `hourjax.objectives` has the others. The loop calls the methods in the order
  in which they stand.

  Attributes:
    loss: of a micro-batch; None for the weighted cross entropy.
    means: names of what it returns beside, see `train_step.LossSum`.
  """

  loss: LossFunction | None = None
  means: tuple[str, ...] = ()

  def __init__(self, experiment: Experiment):
    """Opens nothing yet."""
    self.experiment = experiment

  def open_dataset(self) -> Dataset:
    """Opens the dataset; its sizes are what a sample takes of a row."""
    return open_dataset(self.experiment)

  def start(
    self,
    dataset: Dataset,
    plan: RowPlan,
    sharding: BatchSharding,
    state: TrainState,
    workdir: pathlib.Path,
  ) -> None:
    """Prepares what the steps need, once the state is there."""

  def data_loader(
    self,
    dataset: Dataset,
    plan: RowPlan,
    sharding: BatchSharding,
    position: int,
  ) -> DataLoader:
    """Starts to read this process's rows, from a position in the data on."""
    delivered = batches(
      dataset,
      plan,
      self.experiment.row_spec,
      rows=self.experiment.batch_rows,
      mine=sharding.local_rows,
      start=position,
      options=self.experiment.read,
    )
    return DataLoader(delivered, sharding)


def train(
  experiment: Experiment,
  workdir: pathlib.Path,
  objective: Objective | None = None,
) -> int | None:
  """Trains to the last step, from the newest checkpoint in `workdir` if any.

  Leaves in the workdir what the README of this folder lists.

  Args:
    experiment: what to train, on which data, and how.
    workdir: folder of the run; is made if it is not there.
    objective: what is optimised; None for supervised fine-tuning.

  Returns:
    The number of the signal that ended the run early, None otherwise.

  Raises:
    UserError: something is wrong with data, weights or configuration.
  """
  if objective is None:
    name = experiment.objective.name
    if name != "sft":
      raise ValueError(f"{name} needs its Objective, see hourjax.objectives")
    objective = Objective(experiment)
  with contextlib.closing(Preemption()) as preemption:
    _train(experiment, workdir, preemption, objective)
  return preemption.signal


def _train(
  experiment: Experiment,
  workdir: pathlib.Path,
  preemption: Preemption,
  objective: Objective,
) -> None:
  """Does what comes before the first step, and then takes the steps."""
  began = time.time()
  check_workdir(experiment, workdir)
  with hosts.together():
    with progress.step("opening the dataset and planning its rows"):
      dataset = objective.open_dataset()
      _check_vocabulary(experiment, dataset)
      plan = row_plan(experiment, dataset)
      counts = count_epoch(experiment, plan, workdir)
    mesh = make_mesh(experiment.mesh)
    sharding = BatchSharding(mesh, experiment.row_spec, experiment.batch_rows)
    for spec in experiment.row_specs.values():
      check_rows(
        mesh.shape, spec, experiment.batch_rows,
        experiment.accumulate, experiment.batch_samples,
      )  # fmt: skip
      check_memory(spec, len(sharding.local_rows), experiment.read)
    steps = total_steps(experiment, counts)
    holdout = HoldoutEvaluation(experiment, dataset, sharding, steps)
    like, optimizer = abstract_state(experiment, mesh, steps)
    base = load_base(experiment, like)
  checkpoints = Checkpoints(
    workdir,
    keep=experiment.keep_checkpoints,
    on_error=experiment.on_save_error,
    base=base,
  )
  with contextlib.closing(checkpoints):
    position, restoring = 0, time.monotonic()
    if checkpoints.latest() is None:
      with progress.step("making the weights and the optimizer's state"):
        begin = first_adapters(experiment, like, base)
        state = fresh_state(experiment, like, optimizer, begin)
    else:
      with progress.step(f"restoring step {checkpoints.latest()}"):
        state, position = checkpoints.restore(like, plan=counts.plan)
      _check_position(plan, position, workdir)
    restoring = time.monotonic() - restoring
    with hosts.together():
      if hosts.is_primary():
        write_run_files(experiment, counts, dataset.skipped, workdir)
        summary = run_summary(experiment, dataset, counts, state, steps)
        print(summary, file=sys.stderr)
        holdout.report()
    if experiment.forgetting.needs_question:
      dataset.embedder = question_embedder(state, experiment.model, workdir)
    start = int(state.step)
    with hosts.together():
      stopping = EarlyStopping(
        workdir,
        start=start,
        patience=experiment.patience,
        primary=hosts.is_primary(),
      )
    if preemption.should_stop_at_once():
      print(f"left before step {start + 1}; nothing is lost", file=sys.stderr)
    elif start < steps and not stopping.due:
      objective.start(dataset, plan, sharding, state, workdir)
      run = _Run(
        experiment,
        objective,
        dataset,
        plan,
        sharding,
        holdout,
        stopping,
        checkpoints,
        preemption,
        workdir,
        steps,
      )
      own: dict[str, Any] = {}
      if objective.loss is not None:
        own = {"loss": objective.loss, "means": objective.means}
      step = TrainStep(
        experiment.model,
        optimizer,
        state_shardings(like),
        dropout_of(experiment),
        **own,
      )
      run.take_steps(step, state, position, began=began, restoring=restoring)
    elif hosts.is_primary():
      print(f"already trained: step {start} of {steps}", file=sys.stderr)
      stopping.report(start, steps, [])
  if hosts.is_primary():
    report_skipped(dataset.skipped)


@dataclasses.dataclass
class _Run:
  """Holds what stays the same from step to step, and takes the steps."""

  experiment: Experiment
  objective: Objective
  dataset: Dataset
  plan: RowPlan
  sharding: BatchSharding
  holdout: HoldoutEvaluation
  early: EarlyStopping
  checkpoints: Checkpoints
  preemption: Preemption
  workdir: pathlib.Path
  steps: int

  def take_steps(
    self,
    train_step: TrainStep,
    state: TrainState,
    position: int,
    *,
    began: float,
    restoring: float,
  ) -> None:
    """Takes the steps that are left; the order is that of the file's head.

    Args:
      train_step: compiled on its first call.
      state: to start from; its memory is reused.
      position: in the data, of the next row.
      began: when the process did, in seconds since 1970.
      restoring: seconds that it took to get the state.
    """
    experiment, start = self.experiment, int(state.step)
    config = dataclasses.asdict(experiment)
    fingerprint = self.plan.fingerprint()
    step, stopping = start, False
    self.checkpoints.best = self.early.best
    compiled: set[Size] = set()
    with contextlib.ExitStack() as stack:
      # Closed in the opposite order, whatever ends the run.
      metrics = self._metric_writer(config, start, began)
      stack.enter_context(contextlib.closing(metrics))
      stack.enter_context(contextlib.closing(self.early))
      nonfinite = self._nonfinite_steps(start)
      stack.enter_context(contextlib.closing(nonfinite))
      unread = self._unread_samples(start)
      stack.enter_context(contextlib.closing(unread))
      loader = self.objective.data_loader(
        self.dataset, self.plan, self.sharding, position
      )
      stack.enter_context(contextlib.closing(loader))
      interval = IntervalMetrics(
        metrics,
        experiment,
        ThroughputCounter(experiment, self.dataset, self.plan),
        loader,
        self.steps,
      )
      metrics.add_lost(restoring, "restore")
      for step in range(start + 1, self.steps + 1):
        metrics.begin_step(step)
        loader.begin_step(step, state)
        micro = MicroBatches(loader, experiment.micro_batches)
        if micro.capacity not in compiled:
          compiled.add(micro.capacity)
          state, scalars = self._compile_and_step(
            train_step, state, micro, loader, metrics
          )
        else:
          state, scalars = train_step(state, micro)
        # Waits for the step. Meanwhile the data loader prepares the next
        # micro-batch; a second step in flight would hold one more batch.
        scalars = jax.device_get(scalars)
        for delivered in micro.delivered:
          unread.add(step, delivered)
        finite = nonfinite.check(step, scalars, self._record_ids(position))
        interval.add(position, scalars, len(micro.delivered))
        evaluated = self.holdout.evaluate(step, state, metrics, unread)
        improved = finite and self.early.add(step, evaluated)
        self.checkpoints.best = self.early.best
        due = step % experiment.log_every == 0 or step in (1, self.steps)
        if due or evaluated:
          counts = {f"unread_{kind}": n for kind, n in unread.counts.items()}
          counts["skipped_steps"] = nonfinite.skipped
          interval.write(step, scalars | loader.metrics | evaluated, counts)
        position = micro.delivered[-1].position
        if nonfinite.too_many:
          self.checkpoints.wait_for_save()
          raise nonfinite.error(step, self.checkpoints.latest())
        saving = time.monotonic()
        self.checkpoints.poll()
        stopping = self.preemption.should_stop(step)
        ending = step == self.steps or self.early.due
        due = step % experiment.checkpoint_every == 0 or stopping or improved
        if (due and finite) or ending:
          self.checkpoints.save(state, position, fingerprint, config)
          metrics.add_lost(time.monotonic() - saving, "save")
        if stopping or ending:
          break
      with progress.step("writing the last checkpoint"):
        self.checkpoints.finish()
    if (step == self.steps or self.early.due) and hosts.is_primary():
      self.early.report(step, self.steps, read_metrics(self.workdir))
    elif stopping and hosts.is_primary():
      newest = self.checkpoints.latest()
      print(
        f"left after step {step} of {self.steps}; the same command goes on"
        f" from step {newest or 0}",
        file=sys.stderr,
      )

  def _compile_and_step(
    self,
    train_step: TrainStep,
    state: TrainState,
    micro: MicroBatches,
    loader: DataLoader,
    metrics: MetricWriter,
  ) -> tuple[TrainState, dict[str, Any]]:
    """Takes a step that must be compiled, and reports how long that took."""
    called, waited = time.monotonic(), loader.waited
    with progress.step("compiling the train step"):
      # Returns when everything is compiled and queued.
      state, scalars = train_step(state, micro)
    took = time.monotonic() - called - (loader.waited - waited)
    metrics.add_lost(max(took, 0.0), "compile")
    return state, scalars

  def _metric_writer(
    self, config: Mapping[str, Any], start: int, began: float
  ) -> MetricWriter:
    """Opens the run's metrics."""
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    return MetricWriter(
      self.workdir,
      self.experiment.metrics,
      run_config=config,
      steps=self.steps,
      start=start,
      flops_per_second=peak and peak * jax.device_count(),
      primary=hosts.is_primary(),
      began=began,
    )

  def _nonfinite_steps(self, start: int) -> NonFiniteSteps:
    """Opens the run's list of steps that are not finite."""
    return NonFiniteSteps(
      self.workdir,
      start=start,
      max_in_a_row=self.experiment.max_nonfinite,
      primary=hosts.is_primary(),
    )

  def _unread_samples(self, start: int) -> UnreadSampleLog:
    """Opens this process's list of samples that could not be read."""
    return UnreadSampleLog(
      self.workdir,
      start=start,
      max_share=self.experiment.data.max_skipped,
      process=hosts.index(),
    )

  def _record_ids(self, position: int) -> Callable[[], dict[int, list[str]]]:
    """Returns a function that looks up the records of a step's rows."""
    rows = self.experiment.step_rows
    return lambda: record_ids(self.dataset, self.plan, position, rows)


def report_skipped(skipped: list[Skipped]) -> None:
  """Lists skipped records on stderr, at most 20 by name."""
  if not skipped:
    return
  lines = [f"{len(skipped)} records were skipped:"]
  lines += [f"  {item.id}: {item.reason}" for item in skipped[:20]]
  if len(skipped) > 20:
    lines.append("  ... all of them are in skipped.json")
  print("\n".join(lines), file=sys.stderr)


def _check_position(
  plan: RowPlan, position: int, workdir: pathlib.Path
) -> None:
  """Raises a UserError if the plan has no row at a position."""
  try:
    plan.row(position)
  except IndexError as error:
    raise UserError(
      f"the newest checkpoint of {workdir} goes on where the data has no row"
      f" ({error}); start another workdir with config.init set to this one"
    ) from None


def _check_vocabulary(experiment: Experiment, dataset: Dataset) -> None:
  """Raises a UserError if the tokenizer has more ids than the decoder."""
  vocab = experiment.model.decoder.vocab
  if dataset.vocab_size > vocab:
    raise UserError(
      f"the tokenizer has {dataset.vocab_size} ids, the decoder"
      f" {vocab} embeddings; use the model's own tokenizer or raise"
      " config.model.decoder.vocab"
    )
