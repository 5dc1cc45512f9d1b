"""Where a run's first parameters come from."""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from hourjax import progress
from hourjax.errors import UserError
from hourjax.models.params import init_params, param_shapes
from hourjax.training.checkpoint import restore_params
from hourjax.training.experiment import Experiment
from hourjax.training.optimizer import COMPONENTS, component
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
