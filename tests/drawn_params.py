"""Random parameters by numpy: the compiler takes longer than many tests."""

import functools
from collections.abc import Callable

import numpy as np
from flax import nnx

from hourjax.models.config import ModelConfig
from hourjax.models.params import param_shapes


def draw_params(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
  """Draws float32 parameters as `init_params` distributes them."""
  rng = np.random.default_rng(seed)
  params = {}
  for path, shape in sorted(param_shapes(config).items()):
    name = path.rpartition("/")[2]
    if name in ("scale", "bias"):
      value = np.full(shape, float(name == "scale"))
    else:
      one = shape[1:] if "/layers/" in path else shape
      fan_in = np.prod(one[:-1]) if name == "kernel" else one[-1]
      value = rng.normal(scale=fan_in**-0.5, size=shape)
    params[path] = value.astype(np.float32)
  return params


def draw_nonzero_params(
  config: ModelConfig, prefix: str = ""
) -> dict[str, np.ndarray]:
  """Draws parameters whose biases count too; those below `prefix`."""
  rng = np.random.default_rng(0)
  return {
    path: _normal(rng, shape)
    for path, shape in param_shapes(config).items()
    if path.startswith(prefix)
  }


@functools.cache
def draw_module(make: Callable) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns graph and random parameters of what `make` builds."""
  graph, state = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(0)
  flat = [
    (path, variable.replace(_normal(rng, variable.get_value().shape)))
    for path, variable in nnx.to_flat_state(state)
    if isinstance(variable, nnx.Param)
  ]
  return graph, nnx.from_flat_state(flat)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Draws N(0, 1 / fan-in), and N(0, 1) for biases and scales."""
  spread = 1.0 if len(shape) < 2 else shape[-2] ** -0.5
  return (rng.standard_normal(shape) * spread).astype(np.float32)
