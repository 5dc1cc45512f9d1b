"""Where a run's first parameters come from."""

import pathlib

import jax.numpy as jnp

from hourjax.errors import UserError
from hourjax.models.params import init_params, param_shapes
from hourjax.training.checkpoint import restore_params
from hourjax.training.experiment import Experiment
from hourjax.training.optimizer import COMPONENTS, component
from hourjax.weights.checkpoint import load_params


def initial_params(experiment: Experiment) -> dict[str, jnp.ndarray]:
  """Fresh, imported or continued parameters by path (`Experiment.init`)."""
  config = experiment.model
  if not experiment.init:
    return init_params(config, experiment.seed)
  folder = pathlib.Path(experiment.init)
  draw = tuple(filter(None, experiment.draw_missing.split(",")))
  if set(draw) - set(COMPONENTS):
    raise UserError(
      f"config.draw_missing is {experiment.draw_missing!r}; choose from"
      f" {', '.join(COMPONENTS)}"
    )
  shapes = param_shapes(config)
  if (folder / "checkpoints").is_dir():
    params = restore_params(folder)
  else:
    optional = {path for path in shapes if component(path) in draw}
    params = load_params(folder, config, shapes, optional=optional)
  params = {path: jnp.asarray(value) for path, value in params.items()}
  lacking = {p for p in shapes if p not in params}
  if lacking:
    fresh = init_params(config, experiment.seed)
    params |= {path: fresh[path] for path in lacking}
  _check_shapes(params, shapes, draw, lacking, folder)
  return params


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
