"""The training loop.

The order is a contract: restore (or initialise), then for each step get a
batch, take the step, write metrics, save a checkpoint if it is due. A
checkpoint holds the number of rows consumed, so the run that continues sees
the batches that the interrupted one would have seen.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hourjax.batch import Batch
from hourjax.data.dataset import Dataset
from hourjax.data.features import FeatureStore
from hourjax.data.pipeline import batches
from hourjax.data.plan import RowPlan
from hourjax.data.records import Record, Skipped, check_media, read_records
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.training.checkpoint import Checkpoints
from hourjax.training.experiment import DataConfig, Experiment
from hourjax.training.initial import initial_params
from hourjax.training.metrics import Metrics
from hourjax.training.optimizer import make_optimizer, split_params
from hourjax.training.step import TrainState, jit_train_step


def train(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Trains to the last step, from the newest checkpoint in `workdir` if any.

  Leaves config.json, metrics.jsonl, skipped.json and checkpoints/.

  Raises:
    UserError: for anything wrong with data, weights or configuration.
    FloatingPointError: if the loss stops being finite.
  """
  dataset, skipped = open_dataset(experiment)
  plan = RowPlan(dataset.sizes, experiment.rows, seed=experiment.seed)
  steps = total_steps(experiment, plan)
  state, optimizer = fresh_state(experiment, dataset, steps)
  checkpoints = Checkpoints(workdir, keep=experiment.keep_checkpoints)
  row = 0
  if checkpoints.latest() is not None:
    state, row = checkpoints.restore(state)
  _write_about(experiment, skipped, workdir)
  start = int(state.step)
  print(_summary(experiment, dataset, plan, state, steps), file=sys.stderr)
  if start < steps:
    metrics = Metrics(workdir, steps=steps, start=start)
    with contextlib.closing(checkpoints), contextlib.closing(metrics):
      _run(experiment, dataset, plan, state, optimizer, row, steps,
           checkpoints, metrics)  # fmt: skip
  else:
    checkpoints.close()
    print(f"already trained: step {start} of {steps}", file=sys.stderr)
  report_skipped(skipped)


def _run(
  experiment, dataset, plan, state, optimizer, row, steps, checkpoints, metrics
):
  step_rows = experiment.batch_rows * experiment.accumulate
  step_fn = jit_train_step(experiment.model, optimizer)
  stream = batches(
    dataset,
    plan,
    experiment.row_spec,
    rows=step_rows,
    start=row,
    options=experiment.read,
  )
  config = dataclasses.asdict(experiment)
  for step in range(int(state.step) + 1, steps + 1):
    batch = next(stream)
    state, scalars = step_fn(state, _device_batch(batch, experiment))
    row += step_rows
    if step % experiment.log_every == 0 or step in (1, steps):
      scalars = jax.device_get(scalars)
      _check_finite(scalars, step, row - step_rows, row, plan, dataset)
      metrics.write(step, scalars)
    if step % experiment.checkpoint_every == 0 or step == steps:
      checkpoints.save(state, row, config)


def open_dataset(
  experiment: Experiment,
) -> tuple[Dataset, list[Skipped]]:
  """The training data, and every record that had to be left out.

  Raises:
    UserError: if more than `data.max_skipped` of the records are bad.
  """
  data = experiment.data
  records, skipped = read_records(data.records)
  records, lost = check_read(records, data)
  skipped += lost
  dataset = Dataset(
    records,
    tokenizer=Tokenizer.from_folder(data.tokenizer),
    spec=experiment.row_spec,
    options=experiment.sample_options,
    media_root=data.media,
    features=FeatureStore(data.features) if data.features else None,
  )
  skipped += dataset.skipped
  total = len(dataset) + len(skipped)
  if not len(dataset) or len(skipped) > data.max_skipped * total:
    reasons = "\n  ".join(item.reason for item in skipped[:20])
    raise UserError(
      f"{len(skipped)} of {total} records of {data.records} cannot be used,"
      f" more than config.data.max_skipped={data.max_skipped}:\n  {reasons}"
    )
  return dataset, skipped


def check_read(
  records: list[Record], data: DataConfig
) -> tuple[list[Record], list[Skipped]]:
  """Keeps records whose files are there; stored videos need no file."""
  opened = {
    id(record)
    for record in records
    if record.media and not (data.features and record.modality == "video")
  }
  if not opened:
    return records, []
  found, lost = check_media(
    [record for record in records if id(record) in opened], data.media
  )
  there = {id(record) for record in found}
  kept = [r for r in records if id(r) not in opened or id(r) in there]
  return kept, lost


def report_skipped(skipped: list[Skipped]) -> None:
  """Lists skipped records on stderr, at most 20 by name."""
  if not skipped:
    return
  lines = [f"{len(skipped)} records were skipped:"]
  lines += [f"  {item.id}: {item.reason}" for item in skipped[:20]]
  if len(skipped) > 20:
    lines.append("  ... all of them are in skipped.json")
  print("\n".join(lines), file=sys.stderr)


def total_steps(experiment: Experiment, plan: RowPlan) -> int:
  """Steps of the run: as configured, or enough for the epochs."""
  if experiment.steps:
    return experiment.steps
  rows = plan.rows_in_epoch(0) * experiment.epochs
  return math.ceil(rows / (experiment.batch_rows * experiment.accumulate))


def fresh_state(
  experiment: Experiment, dataset: Dataset, steps: int
) -> tuple[TrainState, Any]:
  """State at step 0 and its optimizer; frozen parameters get no moments."""
  params = initial_params(experiment)
  vocab = experiment.model.decoder.vocab
  if dataset.vocab_size > vocab:
    raise UserError(
      f"the tokenizer has {dataset.vocab_size} ids, the decoder"
      f" {vocab} embeddings; use the model's own tokenizer or raise"
      " config.model.decoder.vocab"
    )
  trained, frozen = split_params(params, experiment.optimizer)
  optimizer = make_optimizer(experiment.optimizer, steps, trained)
  step = jnp.zeros((), jnp.int32)
  return TrainState(step, trained, frozen, optimizer.init(trained)), optimizer


def _device_batch(batch: Batch, experiment: Experiment) -> Batch:
  """[A * B, ...] on the host to [A, B, ...] on the device."""
  split = (experiment.accumulate, experiment.batch_rows)
  arrays = (x.reshape(*split, *x.shape[1:]) for x in batch)
  return jax.device_put(Batch(*arrays))


def _check_finite(scalars, step, first, last, plan, dataset):
  if np.isfinite(scalars["loss"]) and np.isfinite(scalars["grad_norm"]):
    return
  rows = {
    k: [dataset.record(i).id for i in plan.row(k)[1]]
    for k in range(first, last)
  }
  raise FloatingPointError(
    f"step {step}: loss {scalars['loss']}, gradient norm"
    f" {scalars['grad_norm']}; rows and records: {rows}"
  )


def _write_about(experiment, skipped, workdir):
  workdir.mkdir(parents=True, exist_ok=True)
  config = json.dumps(dataclasses.asdict(experiment), indent=2)
  (workdir / "config.json").write_text(config + "\n")
  listed = [dataclasses.asdict(item) for item in skipped]
  (workdir / "skipped.json").write_text(json.dumps(listed, indent=2) + "\n")


def _summary(experiment, dataset, plan, state, steps):
  trained = sum(x.size for x in state.trained.values())
  frozen = sum(x.size for x in state.frozen.values())
  rows = plan.rows_in_epoch(0)
  return (
    f"{len(dataset)} samples in {rows} rows an epoch; {trained:,} parameters"
    f" trained, {frozen:,} frozen; {steps} steps of"
    f" {experiment.batch_rows * experiment.accumulate} rows, from step"
    f" {int(state.step)}; {jax.devices()[0].platform} x {jax.device_count()}"
  )
