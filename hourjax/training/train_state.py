"""Where a run's first parameters come from."""
# MERGED hourjax.training.state:
# The state of a run on a mesh: where each array lies, and its first value.
# MERGED hourjax.training.lowering:
# A run's programs for a mesh, lowered but not compiled.

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hourjax import progress
from hourjax.errors import UserError
from hourjax.models.params import init_params, param_axes, param_shapes
from hourjax.parallel.mesh import AXES
from hourjax.parallel.rules import param_shardings
from hourjax.training.batch_sharding import abstract_batch, check_rows
from hourjax.training.checkpoint import restore_params
from hourjax.training.config import Experiment
from hourjax.training.optimizer import (
  COMPONENTS,
  component,
  make_optimizer,
  split_params,
)
from hourjax.training.train_step import Step, Sums, TrainState
from hourjax.weights.checkpoint import load_params
from hourjax.weights.config import check_start


def initial_params(
  experiment: Experiment,
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, jax.Array]:
  """Fresh, imported or continued parameters by path (`Experiment.init`).

  Args:
    experiment: of the run.
    shardings: by path; all on the default device if None.
  """
  config = experiment.model
  if not experiment.init:
    return _drawn(experiment, shardings)
  folder = pathlib.Path(experiment.init)
  draw = tuple(filter(None, experiment.draw_missing.split(",")))
  if set(draw) - set(COMPONENTS):
    raise UserError(
      f"config.draw_missing is {experiment.draw_missing!r}; choose from"
      f" {', '.join(COMPONENTS)}"
    )
  shapes = param_shapes(config)
  if (folder / "checkpoints").is_dir():

    def place(path, value):
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
  lacking = {p for p in shapes if p not in params}
  _check_shapes(params, shapes, draw, lacking, folder)
  if lacking:
    fresh = _drawn(experiment, shardings)
    params |= {path: fresh[path] for path in lacking}
  return params


def _drawn(experiment, shardings):
  with progress.step("drawing the first parameters"):
    return init_params(experiment.model, experiment.seed, shardings=shardings)


def _placed(value, shardings, path):
  """A whole array that every host has read, each device's part of it."""
  if shardings is None:
    return jnp.asarray(value)
  value = np.asarray(value)
  return jax.make_array_from_callback(
    value.shape, shardings[path], lambda index: value[index]
  )


def _check_shapes(params, shapes, draw, lacking, folder):
  problems = [
    f"missing: {path}" for path in lacking if component(path) not in draw
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


_STEPS = 1000  # of the schedule, which changes nothing of the program


def check_mesh(experiment: Experiment, devices: int, slices: int = 1) -> None:
  """Refuses what cannot be split over so many devices; needs none of them.

  Raises:
    UserError: the mesh does not fill them, or does not divide rows or
      parameters; names both values and what to give instead.
  """
  sizes = experiment.mesh.sizes(devices, slices)
  _check(experiment, AbstractMesh(sizes, AXES))


def _check(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
  check_rows(
    mesh.shape,
    experiment.row_spec,
    experiment.batch_rows,
    experiment.accumulate,
  )
  model = experiment.model
  param_shardings(mesh, param_shapes(model), param_axes(model))


def programs(
  experiment: Experiment, mesh: Mesh
) -> dict[str, jax.stages.Lowered]:
  """The two programs of a train step; no array exists.

  One optimizer step is `experiment.accumulate` times "accumulate" and once
  "update". The devices may be of a topology.

  Raises:
    UserError: rows or parameters cannot be split over the mesh.
  """
  _check(experiment, mesh)
  state, optimizer = abstract_state(experiment, mesh, _STEPS)
  step = Step(experiment.model, optimizer, state_shardings(state))
  whole = state.step.sharding
  sums = Sums(
    jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    state.trained,
  )
  batch = abstract_batch(experiment.row_spec, experiment.batch_rows, mesh)
  with jax.set_mesh(mesh):
    return {
      "accumulate": step.programs["accumulate"].lower(
        sums, state.trained, state.frozen, batch
      ),
      "update": step.programs["update"].lower(state, sums),
    }
