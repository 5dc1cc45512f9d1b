"""Cross entropy over label tokens."""
# MERGED hourjax.training.step:
# The train step: pure functions, and their compiled pair on a mesh.

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hourjax.batch import IGNORE, Batch
from hourjax.models.config import ModelConfig
from hourjax.models.hourllava import HourLLaVA
from hourjax.models.params import with_params
from hourjax.parallel import vocabulary
from hourjax.training.optimizer import COMPONENTS, component


def loss_sums(
  model: HourLLaVA, batch: Batch
) -> tuple[Float[Array, ""], Int[Array, ""]]:
  """Summed cross entropy of a batch and the number of label tokens.

  Sums, not means: gradients of several micro-batches can then be added and
  divided once, so every label token weighs the same wherever it was packed.
  """
  hidden = model(batch)
  loss = vocabulary.cross_entropy(hidden, model.words, batch.target)
  return loss, (batch.target != IGNORE).sum()


def token_losses(
  model: HourLLaVA, hidden: Float[Array, "B L D"], target: Int[Array, "B L"]
) -> Float[Array, "B L"]:
  """Cross entropy of each position, 0 where nothing is trained; float32."""
  return vocabulary.token_losses(hidden, model.words, target)


Params = dict[str, jax.Array]
Scalars = dict[str, jax.Array]


class TrainState(NamedTuple):
  """Everything that a checkpoint holds, but for the data position."""

  step: jax.Array
  trained: Params
  frozen: Params
  opt_state: Any


class Sums(NamedTuple):
  """What micro-batches are added up to.

  Attributes:
    loss: summed over label tokens, float32.
    tokens: number of label tokens, int32.
    grads: of the summed loss, by path of the trained parameters, float32.
  """

  loss: jax.Array
  tokens: jax.Array
  grads: Params


def train_step(
  state: TrainState,
  batches: Iterable[Batch],
  *,
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Scalars]:
  """Takes one optimizer step over micro-batches.

  Gradients of summed losses are added up and divided once by all label
  tokens, so accumulation and packing change nothing but rounding. Gradients
  are taken with respect to `state.trained` only.
  """
  sums = no_sums(state.trained)
  for batch in batches:
    sums = accumulate(sums, state.trained, state.frozen, batch, config=config)
  return update(state, sums, optimizer=optimizer)


def no_sums(trained: Params) -> Sums:
  """Sums of no micro-batch."""
  return Sums(
    jnp.zeros((), jnp.float32),
    jnp.zeros((), jnp.int32),
    {path: jnp.zeros_like(value) for path, value in trained.items()},
  )


def accumulate(
  sums: Sums,
  trained: Params,
  frozen: Params,
  batch: Batch,
  *,
  config: ModelConfig,
) -> Sums:
  """Adds the summed loss of one micro-batch, its labels and gradients."""

  def summed_loss(trained):
    return loss_sums(with_params(config, {**frozen, **trained}), batch)

  (loss, tokens), grads = jax.value_and_grad(summed_loss, has_aux=True)(trained)
  return jax.tree.map(jnp.add, sums, Sums(loss, tokens, grads))


def update(
  state: TrainState, sums: Sums, *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Scalars]:
  """Takes the optimizer's step on accumulated gradients.

  Where the loss or the gradient norm is not finite, parameters and moments
  stay as they are; only the step is counted.

  Returns:
    The next state and scalar metrics: loss (mean over label tokens),
    grad_norm (before clipping) and grad_norm/COMPONENT, tokens, and finite: 1
    or, where the step was left out, 0.
  """
  # A batch without any label has zero gradients; it must not make NaNs.
  count = jnp.maximum(sums.tokens, 1)
  grads = jax.tree.map(lambda g: g / count, sums.grads)
  norms = gradient_norms(grads)
  loss = sums.loss / count
  finite = jnp.isfinite(loss) & jnp.isfinite(norms["grad_norm"])
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
  trained = optax.apply_updates(state.trained, updates)
  trained, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (trained, opt_state),
    (state.trained, state.opt_state),
  )
  scalars = {"loss": loss, "tokens": sums.tokens, "finite": finite, **norms}
  return TrainState(state.step + 1, trained, state.frozen, opt_state), scalars


def gradient_norms(grads: Params) -> Scalars:
  """The global norm and that of each component that is trained."""
  squares = dict.fromkeys(COMPONENTS, None)
  for path, grad in grads.items():
    name = component(path)
    square = jnp.square(grad).sum()
    squares[name] = square if squares[name] is None else squares[name] + square
  there = {name: x for name, x in squares.items() if x is not None}
  norms = {f"grad_norm/{name}": jnp.sqrt(x) for name, x in there.items()}
  return {"grad_norm": jnp.sqrt(sum(there.values())), **norms}


class Step:
  """`train_step` compiled for a mesh, one micro-batch at a time.

  A step is as many calls of one program as there are micro-batches, and one of
  another: only the micro-batches at hand are on the devices, and the optimizer
  is in memory once.

  Attributes:
    mesh: that everything is compiled for.
    programs: the two jitted functions by name.
  """

  def __init__(
    self,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
  ):
    """Compiles nothing yet.

    Args:
      config: of the model.
      optimizer: as built for the trained parameters.
      shardings: of each array of the state.
    """
    self.mesh = shardings.step.mesh
    whole = shardings.step  # a scalar: not split
    sums = Sums(whole, whole, shardings.trained)
    self._none = jax.jit(no_sums, out_shardings=sums)
    self.programs = {
      "accumulate": jax.jit(
        functools.partial(accumulate, config=config),
        donate_argnums=0,
        out_shardings=sums,
      ),
      "update": jax.jit(
        functools.partial(update, optimizer=optimizer),
        donate_argnums=0,
        out_shardings=(shardings, whole),
      ),
    }

  def __call__(
    self, state: TrainState, batches: Iterable[Batch]
  ) -> tuple[TrainState, Scalars]:
    """See `train_step`. The old state's memory is reused."""
    with jax.set_mesh(self.mesh):
      sums = self._none(state.trained)
      for batch in batches:
        sums = self.programs["accumulate"](
          sums, state.trained, state.frozen, batch
        )
      return self.programs["update"](state, sums)
