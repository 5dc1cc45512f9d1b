"""The train state: what it holds, where it lies on a mesh, how it begins."""

import dataclasses
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
from hourjax.models import lora
from hourjax.models.params import (
  VISION,
  init_params,
  param_axes,
  param_shapes,
)
from hourjax.parallel.rules import check_attention, param_shardings
from hourjax.training.checkpoint import restore_params
from hourjax.training.checkpoint_format import adapter_base, adapter_manifest
from hourjax.training.config import Experiment
from hourjax.training.optimizer import (
  COMPONENTS,
  component,
  make_optimizer,
  split_params,
)
from hourjax.weights.checkpoint import Each, load_params
from hourjax.weights.config import check_start

Params = dict[str, jax.Array]  # by path, such as "decoder/norm/scale"
AbstractParams = dict[str, jax.ShapeDtypeStruct]


class TrainState(NamedTuple):
  """Holds everything that a checkpoint holds, except the data position.

  A checkpoint of adapters holds no frozen parameters (`training.adapters`).

  Attributes:
    step: number of steps taken, int32 [].
    trained: parameters that receive gradients, float32, by path.
    frozen: parameters that do not, by path: float32, or the base of adapters
      as `config.lora.base` stores it.
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
  split = _adapters if experiment.lora.rank else _all_params
  trained, frozen = split(experiment, mesh)
  params = trained | frozen
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


def _all_params(
  experiment: Experiment, mesh: Mesh
) -> tuple[AbstractParams, AbstractParams]:
  """Returns trained and frozen parameters of a run without adapters."""
  shapes = param_shapes(experiment.model)
  shardings = param_shardings(mesh, shapes, param_axes(experiment.model))
  params = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[path])
    for path, shape in shapes.items()
  }
  return split_params(params, experiment.optimizer)


def _adapters(
  experiment: Experiment, mesh: Mesh
) -> tuple[AbstractParams, AbstractParams]:
  """Returns the adapters, which are trained, and their frozen base.

  Raises:
    UserError: targets, rank or learning rates do not suit the model.
  """
  config, rates = experiment.lora, experiment.optimizer
  if rates.vision:
    raise UserError(
      f"config.optimizer.vision is {rates.vision} and config.lora.rank"
      f" {config.rank}: adapters leave the tower as it is; set"
      " config.optimizer.vision=0, or config.lora.rank=0 to train all of it"
    )
  shapes, axes = param_shapes(experiment.model), param_axes(experiment.model)
  try:
    layers = [
      path
      for path in lora.target_layers(config, shapes)
      if rates.rate(component(path)) > 0
    ]
    own = lora.adapter_shapes(config, layers, shapes)
  except ValueError as error:
    raise UserError(str(error)) from None
  if not layers:
    given = ", ".join(f"{c}={rates.rate(c)}" for c in COMPONENTS)
    raise UserError(
      f"config.lora.targets={config.targets} names no layer that is trained:"
      f" learning rates {given}; raise that of a component it names"
    )
  stored = lora.stored_shapes(config, shapes)
  if not experiment.reads_pixels:
    # No row has a use for the tower: 0.8 GB in bfloat16.
    stored = {p: x for p, x in stored.items() if not p.startswith(VISION)}
  every = stored | own
  places = {
    path: axes.get(path) or lora.added_axes(path, axes) for path in every
  }
  shardings = param_shardings(
    mesh,
    shapes | {path: x.shape for path, x in every.items()},
    axes | places,
  )
  every = {
    path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path])
    for path, x in every.items()
  }
  trained = {path for path in own if path.rpartition("/")[2] in lora.TRAINED}
  return (
    {path: x for path, x in every.items() if path in trained},
    {path: x for path, x in every.items() if path not in trained},
  )


def fresh_state(
  experiment: Experiment,
  like: TrainState,
  optimizer: optax.GradientTransformation,
  params: Params | None = None,
) -> TrainState:
  """Returns the state at step 0.

  Args:
    experiment: of the run; its `init` says where the parameters come from.
    like: shapes and shardings, as `abstract_state` returns them.
    optimizer: that `abstract_state` returned with it.
    params: by path, if they were read already.

  Raises:
    UserError: `init` cannot be read or does not fit the model.
  """
  shapes = like.trained | like.frozen
  if params is None:
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
  experiment: Experiment,
  shardings: Mapping[str, Sharding] | None = None,
  *,
  dtypes: Mapping[str, np.dtype] | None = None,
  each: Each = lambda path, value: value,
) -> dict[str, Any]:
  """Returns the parameters that a run begins with, by path.

  They are drawn, imported from a folder of published weights, or taken from
  the best or newest checkpoint of another run, as `Experiment.init` says.

  Args:
    experiment: of the run.
    shardings: of each parameter, by path; all on the default device if None.
    dtypes: of each parameter that is read, by path; all float32 if None.
    each: returns what is kept of a parameter, of the same shape, before the
      next one is read.

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
      if tuple(value.shape) != shapes.get(path):
        return value
      if dtypes is not None:
        value = value.astype(dtypes[path])
      return each(path, _placed(value, shardings, path))

    if about := adapter_manifest(folder):
      return _merged(experiment, folder, about, shardings, dtypes, each)
    params = restore_params(folder, each=place).params
  else:
    check_start(folder, config)
    optional = {path for path in shapes if component(path) in draw}
    where = shardings
    if where is None:
      here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      where = dict.fromkeys(shapes, here)
    params = load_params(
      folder,
      config,
      shapes,
      dtype=np.float32 if dtypes is None else dtypes,
      optional=optional,
      shardings=where,
      each=each,
    )
  missing = {p for p in shapes if p not in params}
  _check_shapes(params, shapes, draw, missing, folder)
  if missing:
    fresh = _drawn(experiment, shardings)
    params |= {path: each(path, fresh[path]) for path in missing}
  return params


def _merged(
  experiment: Experiment,
  folder: pathlib.Path,
  about: Mapping[str, Any],
  shardings: Mapping[str, Sharding] | None,
  dtypes: Mapping[str, np.dtype] | None,
  each: Each,
) -> dict[str, Any]:
  """Returns the parameters of a run of adapters, merged into its base.

  Args:
    experiment: of the run that begins.
    folder: workdir of the run of adapters.
    about: manifest of its checkpoint.
    shardings: as for `initial_params`.
    dtypes: as for `initial_params`.
    each: as for `initial_params`.
  """
  own = restore_params(folder).params
  adapters = lora.complete(own, lora.LoraConfig(**about["config"]["lora"]))

  def merge(path: str, value: jax.Array) -> Any:
    layer = path.removesuffix("/kernel")
    if layer in adapters:
      whole = jax.jit(lora.merge, out_shardings=value.sharding)(
        value.astype(jnp.float32), adapters.pop(layer)
      )
      value = whole.astype(value.dtype)
    return each(path, value)

  base = dataclasses.replace(experiment, init=adapter_base(about))
  return initial_params(base, shardings, dtypes=dtypes, each=merge)


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
