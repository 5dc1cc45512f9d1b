"""The state of a run on a mesh: where each array lies, and its first value."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hourjax.models.params import param_axes, param_shapes
from hourjax.parallel.rules import param_shardings
from hourjax.training.experiment import Experiment
from hourjax.training.initial import initial_params
from hourjax.training.optimizer import make_optimizer, split_params
from hourjax.training.step import TrainState


def abstract_state(
  experiment: Experiment, mesh: Mesh, steps: int
) -> tuple[TrainState, optax.GradientTransformation]:
  """Shapes, dtypes and shardings of the state, and its optimizer.

  Args:
    experiment: of the run.
    mesh: that holds the state.
    steps: of the whole run, for the schedule.

  Raises:
    UserError: a dimension that the mesh does not divide; nothing is trained.
  """
  shapes = param_shapes(experiment.model)
  shardings = param_shardings(mesh, shapes, param_axes(experiment.model))
  params = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[path])
    for path, shape in shapes.items()
  }
  trained, frozen = split_params(params, experiment.optimizer)
  optimizer = make_optimizer(experiment.optimizer, steps, trained)
  whole = NamedSharding(mesh, PartitionSpec())
  opt_state = jax.tree_util.tree_map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=_beside(path, x, params, whole)
    ),
    jax.eval_shape(optimizer.init, trained),
  )
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  return TrainState(step, trained, frozen, opt_state), optimizer


def fresh_state(
  experiment: Experiment, like: TrainState, optimizer: Any
) -> TrainState:
  """The state at step 0, as `abstract_state` describes it."""
  shapes = like.trained | like.frozen
  params = initial_params(
    experiment, {path: x.sharding for path, x in shapes.items()}
  )
  trained = {path: params[path] for path in like.trained}
  shardings = state_shardings(like)
  init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
  return TrainState(
    jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
    trained,
    {path: params[path] for path in like.frozen},
    init(trained),
  )


def state_shardings(like: TrainState) -> TrainState:
  """Of each array of a state."""
  return jax.tree.map(lambda x: x.sharding, like)


def _beside(path, x, params, whole):
  """Moments lie where their parameters do; what else there is, everywhere."""
  keys = {getattr(entry, "key", None) for entry in path}
  own = [params[key] for key in keys & set(params)]
  if own and own[0].shape == x.shape:
    return own[0].sharding
  return whole
