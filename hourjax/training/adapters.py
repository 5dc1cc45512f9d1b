"""Runs of adapters: what they are added to, and what they begin with.

The frozen base is read from `config.init` whenever the run starts or goes on,
a parameter after the other, and stored as `config.lora.base` says. Checkpoints
hold adapters, their optimizer's state and the base's fingerprint, a few
megabytes; with another base the run does not go on.

A run whose `config.init` is a run of adapters itself goes on with these: it
has the same base, and its adapters begin with their values.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hourjax import hub, progress
from hourjax.errors import UserError
from hourjax.models import lora, quantization
from hourjax.models.params import VISION, param_axes, param_shapes
from hourjax.parallel.rules import param_shardings
from hourjax.training.checkpoint import Base, restore_params
from hourjax.training.checkpoint_format import (
  adapter_base,
  adapter_manifest,
  fingerprint,
  weight_sum,
)
from hourjax.training.config import Experiment
from hourjax.training.train_state import Params, TrainState, initial_params


def load_base(experiment: Experiment, like: TrainState) -> Base | None:
  """Reads the base of a run of adapters; None for any other run.

  A parameter is cast or quantized before the next one is read.

  Args:
    experiment: of the run.
    like: shapes, dtypes and shardings, as `abstract_state` returns them.

  Raises:
    UserError: `init` names no model, one of other shapes, or adapters of
      another rank or of other layers.
  """
  config, model = experiment.lora, experiment.model
  if not config.rank:
    return None
  if not experiment.init:
    raise UserError(
      f"config.lora.rank is {config.rank} and config.init empty: adapters are"
      " added to a trained model; give its folder, workdir or hf:// name as"
      " config.init, or set config.lora.rank=0"
    )
  folder = hub.local_folder(experiment.init)
  about = adapter_manifest(folder)
  begin: Params = {}
  if about is not None:
    begin = _adapters_of(folder, about, like)
    experiment = dataclasses.replace(experiment, init=adapter_base(about))
  sums: dict[str, int] = {}
  base: Params = {}

  def keep(path: str, value: jax.Array) -> Any:
    """Stores a parameter, and returns no more than its shape."""
    if not path.startswith(VISION):
      sums[path] = weight_sum(value)
    if path in like.frozen:
      base.update(_stored(path, value, like.frozen, config))
    return jax.ShapeDtypeStruct(value.shape, value.dtype)

  shapes = param_shapes(model)
  narrow = lora.stored_shapes(
    dataclasses.replace(config, base="bfloat16"), shapes
  )
  wide = config.base == "float32"
  with progress.step(f"reading the base {experiment.init}"):
    initial_params(
      experiment,
      param_shardings(like.step.sharding.mesh, shapes, param_axes(model)),
      dtypes={
        path: np.dtype(np.float32 if wide else x.dtype)
        for path, x in narrow.items()
      },
      each=keep,
    )
  for path, x in like.frozen.items():
    if path not in base:  # scales and seeds of adapters
      base[path] = _placed(lora.draw(path, x, config, experiment.seed), x)
  found = fingerprint(sums)
  if about is not None and about["base"] != found:
    raise UserError(
      f"{folder} holds adapters of the base {about['base']}, and"
      f" {experiment.init} has the weights {found}; bring back the model that"
      " they were trained on"
    )
  return Base(base, found, begin)


def first_adapters(
  experiment: Experiment, like: TrainState, base: Base | None
) -> Params | None:
  """Returns all parameters that a fresh run of adapters begins with, by path.

  Args:
    experiment: of the run.
    like: as for `load_base`.
    base: as that returned it; None of other runs, which gives None.
  """
  if base is None:
    return None
  params = dict(base.params)
  for path, x in like.trained.items():
    layer, _, name = path.rpartition("/")
    value = base.adapters.get(path)
    if value is None and name == lora.MAGNITUDE:
      kernel = base.params[f"{layer}/kernel"]
      scale = base.params.get(f"{layer}/kernel_scale")
      if scale is not None:
        kernel = quantization.dequantize(kernel, scale, jnp.float32)
      value = lora.column_norms(jnp.asarray(kernel))
    elif value is None:
      value = lora.draw(path, x, experiment.lora, experiment.seed)
    params[path] = _placed(value, x)
  return params


def blank_params(experiment: Experiment, like: TrainState) -> Params | None:
  """Returns zeros for all parameters of a run of adapters, by path.

  For measurements: they take no other time than trained weights.

  Args:
    experiment: of the run; None is returned for one without adapters.
    like: shapes, dtypes and shardings, as `abstract_state` returns them.
  """
  if not experiment.lora.rank:
    return None
  shapes = like.trained | like.frozen
  shardings = {path: x.sharding for path, x in shapes.items()}

  def zeros() -> Params:
    return {path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items()}

  return jax.jit(zeros, out_shardings=shardings)()


def _stored(
  path: str,
  value: jax.Array,
  like: Mapping[str, jax.ShapeDtypeStruct],
  config: lora.LoraConfig,
) -> Params:
  """Returns a parameter, or codes and scales, as the base keeps it."""
  scale = f"{path}_scale"
  if scale not in like:
    return {path: value.astype(like[path].dtype)}
  assert config.base in quantization.FORMATS
  program = jax.jit(
    quantization.quantize,
    static_argnums=1,
    out_shardings=(like[path].sharding, like[scale].sharding),
  )
  codes, scales = program(value, config.base)
  return {path: codes, scale: scales}


def _adapters_of(
  folder: Any, about: Mapping[str, Any], like: TrainState
) -> Params:
  """Returns the adapters of another run, if they are of the same shapes.

  Raises:
    UserError: they are not.
  """
  found = restore_params(folder).params

  def shape(of: Mapping[str, Any], path: str) -> Any:
    return tuple(of[path].shape) if path in of else "nothing"

  wrong = [
    f"{path}: {shape(found, path)} there, {shape(like.trained, path)} here"
    for path in sorted({*found, *like.trained})
    if shape(found, path) != shape(like.trained, path)
  ]
  if wrong:
    own = about["config"]["lora"]
    raise UserError(
      f"config.init={folder} is a run of adapters of rank {own['rank']} on"
      f" {own['targets']}, and this run's differ; set config.lora as there, or"
      f" merge it first (python -m hourjax.export --model={folder}):\n  "
      + "\n  ".join(wrong[:5])
    )
  return found


def _placed(value: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Puts an array that every process has whole onto the devices."""
  whole = np.asarray(value)
  return jax.make_array_from_callback(
    whole.shape, like.sharding, lambda index: whole[index]
  )
