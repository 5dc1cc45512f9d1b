"""The training loop.

The order is a contract: restore (or initialise), then for each step get a
batch, take the step, write metrics, save a checkpoint if it is due. A
checkpoint holds the position in the data, so the run that continues sees the
batches that the interrupted one would have seen.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hourjax.data.dataset import Dataset
from hourjax.data.pipeline import batches
from hourjax.data.plan import RowPlan
from hourjax.data.records import Skipped
from hourjax.errors import UserError
from hourjax.training.checkpoint import Checkpoints
from hourjax.training.experiment import Experiment
from hourjax.training.feed import Feed, UnreadLedger
from hourjax.training.initial import initial_params
from hourjax.training.metrics import Metrics
from hourjax.training.optimizer import make_optimizer, split_params
from hourjax.training.source import open_dataset, row_plan
from hourjax.training.step import TrainState, jit_train_step


def train(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Trains to the last step, from the newest checkpoint in `workdir` if any.

  Leaves config.json, plan.json, metrics.jsonl, skipped.json, checkpoints/ and,
  if samples could not be read, unread.jsonl.

  Raises:
    UserError: for anything wrong with data, weights or configuration.
    FloatingPointError: if the loss stops being finite.
  """
  dataset = open_dataset(experiment)
  plan = row_plan(experiment, dataset)
  rows = epoch_rows(plan, workdir)
  steps = total_steps(experiment, rows["rows"])
  state, optimizer = fresh_state(experiment, dataset, steps)
  checkpoints = Checkpoints(workdir, keep=experiment.keep_checkpoints)
  with contextlib.closing(checkpoints):
    position = 0
    if checkpoints.latest() is not None:
      state, position = checkpoints.restore(state, plan=rows["plan"])
    _write_about(experiment, rows, dataset.skipped, workdir)
    start = int(state.step)
    print(_summary(experiment, dataset, rows, state, steps), file=sys.stderr)
    if start < steps:
      _run(experiment, dataset, plan, state, optimizer, position, steps,
           checkpoints, workdir)  # fmt: skip
    else:
      print(f"already trained: step {start} of {steps}", file=sys.stderr)
  report_skipped(dataset.skipped)


def _run(
  experiment,
  dataset,
  plan,
  state,
  optimizer,
  position,
  steps,
  checkpoints,
  workdir,
):
  start = int(state.step)
  step_fn = jit_train_step(experiment.model, optimizer)
  metrics = Metrics(workdir, steps=steps, start=start)
  unread = UnreadLedger(
    workdir, start=start, max_share=experiment.data.max_skipped
  )
  feed = Feed(
    batches(
      dataset,
      plan,
      experiment.row_spec,
      rows=experiment.step_rows,
      start=position,
      options=experiment.read,
    ),
    accumulate=experiment.accumulate,
    rows=experiment.batch_rows,
  )
  config = dataclasses.asdict(experiment)
  clock = _Clock(feed, start)
  with contextlib.closing(metrics), contextlib.closing(feed):
    for step in range(start + 1, steps + 1):
      batch, delivered = next(feed)
      unread.add(step, delivered)
      state, scalars = step_fn(state, batch)
      # Waits for the step. Meanwhile the feed prepares the next batch; more
      # steps in flight would hold a batch each.
      scalars = jax.device_get(scalars)
      _check_finite(scalars, step, position, experiment, plan, dataset)
      if step % experiment.log_every == 0 or step in (1, steps):
        counts = {f"unread_{kind}": n for kind, n in unread.counts.items()}
        metrics.write(step, {**scalars, **clock.read(step), **counts})
      position = delivered.position
      if step % experiment.checkpoint_every == 0 or step == steps:
        checkpoints.save(state, position, plan.fingerprint(), config)


class _Clock:
  """Seconds a step, and the share of them that waited for data."""

  def __init__(self, feed: Feed, step: int):
    self._feed, self._last = feed, (step, time.monotonic(), feed.waited)

  def read(self, step: int) -> dict[str, float]:
    """Since the last reading."""
    before, began, waited = self._last
    self._last = (step, time.monotonic(), self._feed.waited)
    took = self._last[1] - began
    return {
      "step_seconds": took / (step - before),
      "data_wait": (self._last[2] - waited) / max(took, 1e-9),
    }


def report_skipped(skipped: list[Skipped]) -> None:
  """Lists skipped records on stderr, at most 20 by name."""
  if not skipped:
    return
  lines = [f"{len(skipped)} records were skipped:"]
  lines += [f"  {item.id}: {item.reason}" for item in skipped[:20]]
  if len(skipped) > 20:
    lines.append("  ... all of them are in skipped.json")
  print("\n".join(lines), file=sys.stderr)


def epoch_rows(plan: RowPlan, workdir: pathlib.Path) -> dict[str, Any]:
  """Rows in the first epoch: {"plan": fingerprint, "rows": number}.

  Counting them packs the whole epoch, seconds for a million samples; a run
  that goes on finds the number in its plan.json.
  """
  path, fingerprint = workdir / "plan.json", plan.fingerprint()
  with contextlib.suppress(OSError, ValueError, KeyError):
    known = json.loads(path.read_text())
    if known["plan"] == fingerprint:
      return known
  return {"plan": fingerprint, "rows": plan.rows_in_epoch(0)}


def total_steps(experiment: Experiment, rows: int) -> int:
  """Steps of the run: as configured, or enough for the epochs of `rows`."""
  if experiment.steps:
    return experiment.steps
  return math.ceil(rows * experiment.epochs / experiment.step_rows)


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


def _check_finite(scalars, step, position, experiment, plan, dataset):
  if np.isfinite(scalars["loss"]) and np.isfinite(scalars["grad_norm"]):
    return
  rows = {}
  for k in range(experiment.step_rows):
    at = plan.advance(position, k)
    groups = plan.row(at)[1]
    rows[at] = [dataset.record(i).id for group in groups for i in group]
  raise FloatingPointError(
    f"step {step}: loss {scalars['loss']}, gradient norm"
    f" {scalars['grad_norm']}; rows and records: {rows}"
  )


def _write_about(experiment, rows, skipped, workdir):
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "plan.json").write_text(json.dumps(rows) + "\n")
  config = json.dumps(dataclasses.asdict(experiment), indent=2)
  (workdir / "config.json").write_text(config + "\n")
  listed = [dataclasses.asdict(item) for item in skipped]
  (workdir / "skipped.json").write_text(json.dumps(listed, indent=2) + "\n")


def _summary(experiment, dataset, rows, state, steps):
  trained = sum(x.size for x in state.trained.values())
  frozen = sum(x.size for x in state.frozen.values())
  return (
    f"{len(dataset)} samples in {rows['rows']} rows an epoch; {trained:,}"
    f" parameters trained, {frozen:,} frozen; {steps} steps of"
    f" {experiment.step_rows} rows, from step"
    f" {int(state.step)}; {jax.devices()[0].platform} x {jax.device_count()}"
  )
