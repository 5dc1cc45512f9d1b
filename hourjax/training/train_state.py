"""The train state: what it holds, where it lies on a mesh, how it begins."""

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from hourjax import hub, progress
from hourjax.errors import UserError
from hourjax.models.params import init_params, param_axes, param_shapes
from hourjax.parallel.rules import check_attention, param_shardings
from hourjax.training.checkpoint import restore_params
from hourjax.training.config import Experiment
from hourjax.training.optimizer import (
  COMPONENTS,
  component,
  make_optimizer,
  split_params,
)
from hourjax.weights.checkpoint import load_params
from hourjax.weights.config import check_start

Params = dict[str, jax.Array]  # by path, such as "decoder/norm/scale"
AbstractParams = dict[str, jax.ShapeDtypeStruct]


class TrainState(NamedTuple):
  """Holds everything that a checkpoint holds, except the data position.

  Attributes:
    step: number of steps taken, int32 [].
    trained: parameters that receive gradients, float32, by path.
    frozen: parameters that do not, float32, by path.
    opt_state: of the optimizer, for `trained`.
  """

  step: Any
  trained: dict[str, Any]
  frozen: dict[str, Any]
  opt_state: Any


def abstract_state(
  experiment: Experiment, mesh: Mesh, steps: int
) -> tuple[TrainState, optax.GradientTransformation]:
  """Returns the state's shapes, dtypes and shardings, and its optimizer.

  No array is created; the mesh may be of devices that are not there.

  Args:
    experiment: of the run.
    mesh: that holds the state.
    steps: number of steps of the whole run, for the learning rate schedule.

  Returns:
    A state of ShapeDtypeStructs, and the optimizer of its trained parameters.

  Raises:
    UserError: the mesh does not divide a dimension of a parameter, its devices
      do not run the attention that is asked for, or nothing is trained.
  """
  model = experiment.model
  check_attention(
    mesh, model.attention.implementation, model.dtype, model.decoder.head_size
  )
  shapes = param_shapes(model)
  shardings = param_shardings(mesh, shapes, param_axes(model))
  params = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[path])
    for path, shape in shapes.items()
  }
  trained, frozen = split_params(params, experiment.optimizer)
  optimizer = make_optimizer(experiment.optimizer, steps, trained)
  replicated = NamedSharding(mesh, PartitionSpec())
  opt_state = jax.tree_util.tree_map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=_moment_sharding(path, x, params, replicated)
    ),
    jax.eval_shape(optimizer.init, trained),
  )
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  return TrainState(step, trained, frozen, opt_state), optimizer


def fresh_state(
  experiment: Experiment,
  like: TrainState,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """Returns the state at step 0.

  Args:
    experiment: of the run; its `init` says where the parameters come from.
    like: shapes and shardings, as `abstract_state` returns them.
    optimizer: that `abstract_state` returned with it.

  Raises:
    UserError: `init` cannot be read or does not fit the model.
  """
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
  """Returns the sharding of each array of a state."""
  return jax.tree.map(lambda x: x.sharding, like)


def initial_params(
  experiment: Experiment, shardings: Mapping[str, Sharding] | None = None
) -> Params:
  """Returns the parameters that a run begins with, float32, by path.

  They are drawn, imported from a folder of published weights, or taken from
  the best or newest checkpoint of another run, as `Experiment.init` says.

  Args:
    experiment: of the run.
    shardings: of each parameter, by path; all on the default device if None.

  Raises:
    UserError: `init` cannot be read, or its parameters are not those of the
      model, apart from components that `draw_missing` allows to be missing.
  """
  config = experiment.model
  if not experiment.init:
    return _drawn(experiment, shardings)
  folder = hub.local_folder(experiment.init)
  draw = tuple(filter(None, experiment.draw_missing.split(",")))
  if set(draw) - set(COMPONENTS):
    raise UserError(
      f"config.draw_missing is {experiment.draw_missing!r}; choose from"
      f" {', '.join(COMPONENTS)}"
    )
  shapes = param_shapes(config)
  if (folder / "checkpoints").is_dir():

    def place(path: str, value: jax.Array) -> Any:
      # One of another shape is reported below, with all others.
      fits = tuple(value.shape) == shapes.get(path)
      return _placed(value, shardings, path) if fits else value

    params = restore_params(folder, each=place).params
  else:
    check_start(folder, config)
    optional = {path for path in shapes if component(path) in draw}
    where = shardings
    if where is None:
      here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      where = dict.fromkeys(shapes, here)
    params = load_params(
      folder, config, shapes, optional=optional, shardings=where
    )
  missing = {p for p in shapes if p not in params}
  _check_shapes(params, shapes, draw, missing, folder)
  if missing:
    fresh = _drawn(experiment, shardings)
    params |= {path: fresh[path] for path in missing}
  return params


def _drawn(
  experiment: Experiment, shardings: Mapping[str, Sharding] | None
) -> Params:
  """Returns all parameters as the model initialises them."""
  with progress.step("drawing the first parameters"):
    return init_params(experiment.model, experiment.seed, shardings=shardings)


def _placed(
  value: jax.Array, shardings: Mapping[str, Sharding] | None, path: str
) -> jax.Array:
  """Puts an array that every host has read whole onto the devices."""
  if shardings is None:
    return jnp.asarray(value)
  whole = np.asarray(value)
  return jax.make_array_from_callback(
    whole.shape, shardings[path], lambda index: whole[index]
  )


def _check_shapes(
  params: Mapping[str, Any],
  shapes: Mapping[str, Sequence[int]],
  draw: Collection[str],
  missing: Collection[str],
  folder: pathlib.Path,
) -> None:
  """Raises one UserError with all parameters that do not fit the model."""
  problems = [
    f"missing: {path}" for path in missing if component(path) not in draw
  ]
  problems += [f"unexpected: {path}" for path in set(params) - set(shapes)]
  problems += [
    f"shape of {path}: saved {params[path].shape}, model {shape}"
    for path, shape in shapes.items()
    if path in params and tuple(params[path].shape) != tuple(shape)
  ]
  if problems:
    raise UserError(
      f"{folder} does not fit config.model ({len(problems)} problems):\n  "
      + "\n  ".join(sorted(problems))
    )


def _moment_sharding(
  path: Sequence[Any],
  x: jax.ShapeDtypeStruct,
  params: Mapping[str, jax.ShapeDtypeStruct],
  replicated: NamedSharding,
) -> Any:
  """Returns where an array of the optimizer's state lies.

  Moments have the shape of their parameter and lie where it does; everything
  else, such as the count of steps, is on all devices.
  """
  keys = {getattr(entry, "key", None) for entry in path}
  own = [value for key, value in params.items() if key in keys]
  if own and own[0].shape == x.shape:
    return own[0].sharding
  return replicated
