"""The train step: one pure function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hourjax.batch import Batch
from hourjax.models.config import ModelConfig
from hourjax.models.params import with_params
from hourjax.training.loss import loss_sums

Params = dict[str, jax.Array]


class TrainState(NamedTuple):
  """Everything that a checkpoint holds, but for the data position."""

  step: jax.Array
  trained: Params
  frozen: Params
  opt_state: Any


def train_step(
  state: TrainState,
  batches: Batch,
  *,
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one optimizer step over A micro-batches of B rows.

  Gradients of summed losses are added up and divided once by all label
  tokens, so accumulation and packing change nothing but rounding. Gradients
  are taken with respect to `state.trained` only.

  Args:
    state: before the step.
    batches: a Batch whose arrays have leading axes [A, B].
    config: of the model.
    optimizer: as built for `state.trained`.

  Returns:
    The next state and scalar metrics: loss (mean over label tokens),
    grad_norm (before clipping), tokens.
  """

  def summed_loss(trained, batch):
    model = with_params(config, {**state.frozen, **trained})
    return loss_sums(model, batch)

  def accumulate(total, batch):
    (loss, tokens), grads = jax.value_and_grad(summed_loss, has_aux=True)(
      state.trained, batch
    )
    return jax.tree.map(jnp.add, total, (loss, tokens, grads)), None

  start = (
    jnp.zeros((), jnp.float32),
    jnp.zeros((), jnp.int32),
    jax.tree.map(jnp.zeros_like, state.trained),
  )
  (loss, tokens, grads), _ = jax.lax.scan(accumulate, start, batches)
  # A batch without any label has zero gradients; it must not make NaNs.
  count = jnp.maximum(tokens, 1)
  grads = jax.tree.map(lambda g: g / count, grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
  trained = optax.apply_updates(state.trained, updates)
  metrics = {
    "loss": loss / count,
    "grad_norm": optax.global_norm(grads),
    "tokens": tokens,
  }
  return TrainState(state.step + 1, trained, state.frozen, opt_state), metrics


def jit_train_step(
  config: ModelConfig, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """`train_step` compiled; the old state's memory is reused."""
  step = functools.partial(train_step, config=config, optimizer=optimizer)
  return jax.jit(step, donate_argnums=0)
