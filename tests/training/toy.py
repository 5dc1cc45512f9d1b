"""A train step that costs nothing: for tests of what happens around it.

State, optimizer, data, checkpoints and metrics of a training are the real ones;
only loss and gradients of a micro-batch are replaced, by those of the projector
alone. They depend on the features, labels and parameters, so that a run that
loses or repeats a row has other losses. Trainings with the real model are
tested in `test_loop` and `test_train_processes`.
"""

import time

import jax
import jax.numpy as jnp

from hourjax.batch import IGNORE
from hourjax.training import train_step

SECONDS = 0.06  # of a step, so that tests can meet a run in the middle


def install() -> None:
  """Replaces the loss of trainings in this process."""
  take_step = train_step.TrainStep.__call__

  def slow(self, state, batches):
    time.sleep(SECONDS)
    return take_step(self, state, batches)

  train_step.TrainStep.__call__ = slow
  train_step.accumulate = _accumulate


def _accumulate(sums, trained, frozen, batch, *, config):
  labels = batch.target != IGNORE
  total = batch.target_weight.sum()
  weight = 1 + jnp.where(labels, batch.target, 0).sum() % 997 / 997

  def summed_loss(trained):
    hidden = batch.features.astype(jnp.float32)
    for layer in ("fc1", "fc2"):
      kernel = trained[f"projector/{layer}/kernel"]
      hidden = jnp.tanh(hidden @ kernel + trained[f"projector/{layer}/bias"])
    # tanh would hide features that are far too large.
    large = jnp.abs(batch.features.astype(jnp.float32)).max() > 1e30
    bad = jnp.where(large, jnp.nan, 0.0)
    return (jnp.square(hidden - weight).mean() + bad) * total

  loss, grads = jax.value_and_grad(summed_loss)(trained)
  own = train_step.Sums(loss, total, labels.sum(), grads)
  return jax.tree.map(jnp.add, sums, own)
