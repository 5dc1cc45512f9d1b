"""The train step: loss, gradients over micro-batches, one optimizer update.

`train_step` is the definition, a pure function. `TrainStep` is the same,
compiled for a mesh as two programs: "accumulate", called once for each
micro-batch, and "update". `lower_programs` lowers them without any array, for
planning and for looking at what the compiler makes of them.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from hourjax.batch import IGNORE, Batch
from hourjax.models.config import ModelConfig
from hourjax.models.hourllava import HourLLaVA
from hourjax.models.linear import adapter_dropout
from hourjax.models.params import param_axes, param_shapes, with_params
from hourjax.parallel import fsdp, vocabulary
from hourjax.parallel.mesh import AXES
from hourjax.parallel.rules import param_shardings
from hourjax.training.batch_sharding import abstract_batch, check_rows
from hourjax.training.config import Experiment
from hourjax.training.optimizer import COMPONENTS, component
from hourjax.training.train_state import (
  Params,
  TrainState,
  abstract_state,
  state_shardings,
)

Scalars = dict[str, jax.Array]


class LossSum(NamedTuple):
  """Holds an objective's loss of one micro-batch.

  Attributes:
    total: summed over what the objective counts: labels, pairs or answers.
    weight: how many, or the sum of their weights.
    means: further sums that are divided by `weight` and logged, by name.
  """

  total: jax.Array
  weight: jax.Array
  means: Mapping[str, jax.Array] = types.MappingProxyType({})


# Of the model and a micro-batch, which is a `Batch` or holds one.
LossFunction = Callable[[HourLLaVA, Any], LossSum]


class Sums(NamedTuple):
  """Holds what is added up over the micro-batches of a step.

  Attributes:
    loss: weight x cross entropy, summed over label tokens, float32 []; or the
      total of another `LossSum`.
    weight: sum of these weights, float32 [].
    tokens: number of label tokens, int32 [].
    grads: gradients of the summed loss, by path of the trained parameters,
      float32.
    means: of `LossSum`; nothing in supervised fine-tuning.
  """

  loss: jax.Array
  weight: jax.Array
  tokens: jax.Array
  grads: Params
  means: Scalars = {}  # noqa: RUF012  never changed; a tuple has its fields


def train_step(
  state: TrainState,
  batches: Iterable[Batch],
  *,
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Scalars]:
  """Takes one optimizer step over micro-batches.

  Weighted losses and gradients are summed over all micro-batches and divided
  once by the sum of all weights (`config.loss` says which). So a label weighs
  the same wherever it stands, and accumulation and packing change nothing but
  rounding.

  Args:
    state: before the step.
    batches: the step's micro-batches.
    config: of the model.
    optimizer: of the trained parameters.

  Returns:
    The next state, and the scalars that `update` describes.
  """
  sums = zero_sums(state.trained)
  for batch in batches:
    sums = accumulate(sums, state.trained, state.frozen, batch, config=config)
  return update(state, sums, optimizer=optimizer)


def zero_sums(trained: Params, means: Collection[str] = ()) -> Sums:
  """Returns the sums over no micro-batch.

  Args:
    trained: parameters by path.
    means: names of the objective's further sums.
  """
  return Sums(
    jnp.zeros((), jnp.float32),
    jnp.zeros((), jnp.float32),
    jnp.zeros((), jnp.int32),
    {path: jnp.zeros_like(value) for path, value in trained.items()},
    {name: jnp.zeros((), jnp.float32) for name in means},
  )


def accumulate(
  sums: Sums,
  trained: Params,
  frozen: Params,
  batch: Any,
  key: jax.Array | None = None,
  *,
  config: ModelConfig,
  dropout: float = 0.0,
  loss: LossFunction | None = None,
) -> Sums:
  """Adds one micro-batch's summed loss, weights, label tokens and gradients.

  Gradients are taken with respect to `trained` only.

  Args:
    sums: over the micro-batches before.
    trained: parameters by path.
    frozen: the other parameters.
    batch: a `Batch`, or what the loss takes; `batch.target` are its labels.
    key: of the adapters' dropout; None for none.
    config: of the model.
    dropout: share of the adapters' inputs that are set to 0.
    loss: of the objective; None for the weighted cross entropy.
  """

  def summed_loss(trained: Params) -> tuple[jax.Array, tuple]:
    model = with_params(config, {**frozen, **trained})
    if loss is None:
      return loss_sum(model, batch), (batch.target_weight.sum(), {})
    found = loss(model, batch)
    return found.total, (found.weight, dict(found.means))

  with contextlib.ExitStack() as stack:
    stack.enter_context(fsdp.gradients_summed_in(config.gradient_dtype))
    if key is not None:
      stack.enter_context(adapter_dropout(dropout, key))
    (total, (weight, means)), grads = jax.value_and_grad(
      summed_loss, has_aux=True
    )(trained)
  tokens = (batch.target != IGNORE).sum()
  own = Sums(total, weight, tokens, grads, means)
  return jax.tree.map(jnp.add, sums, own)


def update(
  state: TrainState, sums: Sums, *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Scalars]:
  """Applies the optimizer to accumulated gradients.

  Where the loss or the gradient norm is not finite, parameters and optimizer
  state stay as they are; only the step is counted.

  Returns:
    The next state, and scalars: "loss" (weighted mean over label tokens),
    "grad_norm" (before clipping), "grad_norm/COMPONENT", "tokens", and
    "finite", which is False where the update was left out. Those of
    `sums.means`, divided by the weight, are beside them.
  """
  # A batch without any label has zero gradients; it must not make NaNs.
  weight = jnp.where(sums.weight > 0, sums.weight, 1)
  loss = sums.loss / weight
  grads = jax.tree.map(lambda g: g / weight, sums.grads)
  norms = gradient_norms(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norms["grad_norm"])

  updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
  trained = optax.apply_updates(state.trained, updates)
  trained, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (trained, opt_state),
    (state.trained, state.opt_state),
  )

  scalars = {"loss": loss, "tokens": sums.tokens, "finite": finite, **norms}
  scalars |= {name: x / weight for name, x in sums.means.items()}
  return TrainState(state.step + 1, trained, state.frozen, opt_state), scalars


def loss_sum(model: HourLLaVA, batch: Batch) -> Float[Array, ""]:
  """Returns a batch's cross entropy, weighted and summed over its labels.

  A sum and not a mean, so that those of micro-batches with different labels
  can be added.
  """
  hidden = model(batch)
  with jax.named_scope("lm_head"):
    return vocabulary.cross_entropy(
      hidden, model.output_embedding, batch.target, batch.target_weight
    )


def token_losses(
  model: HourLLaVA, hidden: Float[Array, "B L D"], target: Int[Array, "B L"]
) -> Float[Array, "B L"]:
  """Returns each position's cross entropy, float32; 0 where there is no label.

  Args:
    model: whose vocabulary head is used.
    hidden: outputs of the decoder.
    target: id of the token to predict, or IGNORE.
  """
  return vocabulary.token_losses(hidden, model.output_embedding, target)


def gradient_norms(grads: Params) -> Scalars:
  """Returns the global gradient norm and the norm of each trained component.

  Returns:
    "grad_norm", and "grad_norm/COMPONENT" such as "grad_norm/memaug".
  """
  squares: dict[str, jax.Array] = {}
  for path, grad in grads.items():
    name, square = component(path), jnp.square(grad).sum()
    squares[name] = squares[name] + square if name in squares else square
  # The order of this sum is fixed, since it decides the last bit.
  squares = {name: squares[name] for name in COMPONENTS if name in squares}
  norms = {f"grad_norm/{name}": jnp.sqrt(x) for name, x in squares.items()}
  return {"grad_norm": jnp.sqrt(sum(squares.values())), **norms}


class Dropout(NamedTuple):
  """Says how adapters drop inputs, see `models.lora`.

  Attributes:
    rate: share of the inputs that are set to 0.
    seed: of the random choice.
  """

  rate: float
  seed: int

  def key(self, step: jax.Array, micro_batch: int) -> jax.Array:
    """Returns the random key of a micro-batch of the step after `step`."""
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    return jax.random.fold_in(key, micro_batch)


def dropout_of(experiment: Experiment) -> Dropout | None:
  """Returns the dropout of a run's adapters, None without any."""
  config = experiment.lora
  if not (config.rank and config.dropout):
    return None
  return Dropout(config.dropout, experiment.seed)


class TrainStep:
  """Runs `train_step`, compiled for a mesh, one micro-batch at a time.

  Only the micro-batch at hand is on the devices, and the optimizer's program
  exists once, however many micro-batches a step has.

  Attributes:
    mesh: the mesh that both programs are compiled for.
    programs: the jitted functions "accumulate" and "update".
  """

  def __init__(
    self,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    dropout: Dropout | None = None,
    loss: LossFunction | None = None,
    means: Collection[str] = (),
  ):
    """Makes the jitted programs; they are compiled at their first call.

    Args:
      config: of the model.
      optimizer: of the trained parameters.
      shardings: of each array of the state, as `state_shardings` returns them.
      dropout: of adapters.
      loss: of the objective, as for `accumulate`.
      means: names of the further sums that it returns.
    """
    self._dropout = dropout
    self.mesh = shardings.step.mesh
    replicated = shardings.step
    others = dict.fromkeys(means, replicated)
    sums = Sums(replicated, replicated, replicated, shardings.trained, others)
    self._zero_sums = jax.jit(
      functools.partial(zero_sums, means=tuple(means)), out_shardings=sums
    )
    own: dict[str, Any] = {} if loss is None else {"loss": loss}
    if dropout is not None:
      own["dropout"] = dropout.rate
    self.programs: dict[str, Any] = {
      "accumulate": jax.jit(
        functools.partial(accumulate, config=config, **own),
        donate_argnums=0,
        out_shardings=sums,
      ),
      "update": jax.jit(
        functools.partial(update, optimizer=optimizer),
        donate_argnums=0,
        out_shardings=(shardings, replicated),
      ),
    }

  def __call__(
    self, state: TrainState, batches: Iterable[Any]
  ) -> tuple[TrainState, Scalars]:
    """Takes a step, see `train_step`; the old state's memory is reused."""
    with jax.set_mesh(self.mesh):
      sums = self._zero_sums(state.trained)
      for number, batch in enumerate(batches):
        key = ()
        if self._dropout is not None:
          key = (self._dropout.key(state.step, number),)
        sums = self.programs["accumulate"](
          sums, state.trained, state.frozen, batch, *key
        )
      return self.programs["update"](state, sums)


# Steps of the learning-rate schedule in programs that are only lowered; the
# number makes no difference to them.
_STEPS = 1000


def check_mesh(experiment: Experiment, devices: int, slices: int = 1) -> None:
  """Checks that an experiment can be split over so many devices.

  Only numbers are compared; no device is needed.

  Args:
    experiment: with its mesh.
    devices: how many there are.
    slices: how many TPU slices they belong to.

  Raises:
    UserError: the mesh does not use all devices, or does not divide the rows
      or parameters; names both values and what to give instead.
  """
  sizes = experiment.mesh.sizes(devices, slices)
  _check_split(experiment, AbstractMesh(sizes, AXES))


def lower_programs(
  experiment: Experiment, mesh: Mesh, streams: Collection[str] | None = None
) -> dict[str, jax.stages.Lowered]:
  """Lowers the programs of a train step, without any array.

  One optimizer step is a call of "accumulate" for each of its micro-batches
  and one of "update". Streams whose rows have another capacity have an
  "accumulate/STREAM" of their own.

  Args:
    experiment: of the run.
    mesh: of real devices, or of the devices of a topology.
    streams: names in `experiment.row_specs`; None for all of them.

  Raises:
    UserError: rows or parameters cannot be split over the mesh.
  """
  _check_split(experiment, mesh)
  state, optimizer = abstract_state(experiment, mesh, _STEPS)
  dropout = dropout_of(experiment)
  step = TrainStep(experiment.model, optimizer, state_shardings(state), dropout)
  key = [jax.eval_shape(lambda: jax.random.key(0))] if dropout else []

  def scalar(dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((), dtype, sharding=state.step.sharding)

  total, count = scalar(jnp.float32), scalar(jnp.int32)
  sums = Sums(total, total, count, state.trained)
  with jax.set_mesh(mesh):
    lowered = {
      accumulate_name(stream): step.programs["accumulate"].lower(
        sums,
        state.trained,
        state.frozen,
        abstract_batch(spec, experiment.batch_rows, mesh),
        *key,
      )
      for stream, spec in experiment.row_specs.items()
      if streams is None or stream in streams
    }
    return lowered | {"update": step.programs["update"].lower(state, sums)}


def accumulate_name(stream: str) -> str:
  """Returns the name of the program that adds up a stream's micro-batches."""
  return f"accumulate/{stream}" if stream else "accumulate"


def _check_split(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
  """Raises a UserError if a mesh does not divide rows or parameters."""
  for spec in experiment.row_specs.values():
    check_rows(
      mesh.shape,
      spec,
      experiment.batch_rows,
      experiment.accumulate,
      experiment.batch_samples,
    )
  model = experiment.model
  param_shardings(mesh, param_shapes(model), param_axes(model))
