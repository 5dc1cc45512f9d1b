"""Random parameters by NumPy, since drawing them by JAX compiles for long."""

import functools

import numpy as np
from flax import nnx

from hourjax.models.config import ModelConfig
from hourjax.models.params import param_shapes


def params(config: ModelConfig, prefix: str = "") -> dict[str, np.ndarray]:
  """Returns float32 parameters of a model by path, N(0, 1 / fan-in)."""
  rng = np.random.default_rng(0)
  return {
    path: _draw(rng, shape)
    for path, shape in param_shapes(config).items()
    if path.startswith(prefix)
  }


@functools.cache
def module(make) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns graph and random parameters of what `make` builds."""
  graph, state = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(0)
  flat = [
    (path, variable.replace(_draw(rng, variable.get_value().shape)))
    for path, variable in nnx.to_flat_state(state)
    if isinstance(variable, nnx.Param)
  ]
  return graph, nnx.from_flat_state(flat)


def _draw(rng, shape) -> np.ndarray:
  spread = 1.0 if len(shape) < 2 else shape[-2] ** -0.5
  return (rng.standard_normal(shape) * spread).astype(np.float32)
