"""Parameters as a flat mapping of paths, e.g. "projector/fc1/kernel"."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourjax.models.config import ModelConfig
from hourjax.models.hourllava import HourLLaVA


def init_params(
  config: ModelConfig,
  seed: int,
  *,
  below: str = "",
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, jax.Array]:
  """Freshly drawn float32 parameters.

  Args:
    config: of the model.
    seed: of the draw.
    below: start of the paths that are wanted, e.g. "vision/"; the others are
      not computed, and these are the same as without it.
    shardings: of all of these by path; every device draws its own part. The
      values are those of a single device.
  """

  def draw():
    params = to_flat(HourLLaVA(config, rngs=nnx.Rngs(seed)))
    return {p: value for p, value in params.items() if p.startswith(below)}

  return jax.jit(draw, out_shardings=shardings)()


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of all parameters, without allocating any."""
  model = nnx.eval_shape(lambda: HourLLaVA(config, rngs=nnx.Rngs(0)))
  return {path: tuple(p.shape) for path, p in to_flat(model).items()}


def param_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
  """Logical axes of all parameters (`parallel.rules`); None is not split."""
  model = nnx.eval_shape(lambda: HourLLaVA(config, rngs=nnx.Rngs(0)))
  axes = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    own = variable.get_metadata().get("axes")
    dims = len(variable.get_value().shape)
    # A stack of layers has one dimension more than the layer named.
    stacked = ("layers",) * (own is not None and dims > len(own))
    axes["/".join(map(str, path))] = (*stacked, *(own or (None,) * dims))
  return axes


def to_flat(model: HourLLaVA) -> dict[str, Any]:
  """Parameters of a model by path."""
  state = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {
    "/".join(str(key) for key in path): variable[...]
    if not isinstance(variable.get_value(), jax.ShapeDtypeStruct)
    else variable.get_value()
    for path, variable in state
  }


def with_params(
  config: ModelConfig, params: Mapping[str, Any], *, below: str = ""
) -> HourLLaVA:
  """The model with these parameters; pure, so it may run under `jit`.

  Args:
    config: of the model.
    params: by path.
    below: start of the paths that are filled in; what lies elsewhere has
      shapes but no values, and must not be used.

  Raises:
    KeyError: if a parameter is missing.
  """
  model = nnx.eval_shape(lambda: HourLLaVA(config, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(model)
  flat = []
  for path, variable in nnx.to_flat_state(state):
    name = "/".join(str(key) for key in path)
    if isinstance(variable, nnx.Param):
      if name.startswith(below):
        variable = variable.replace(params[name])
      flat.append((path, variable))
  return nnx.merge(graph, nnx.from_flat_state(flat))


def narrow_dtype(path: str, config: ModelConfig) -> np.dtype:
  """What products and lookups cast at every use is kept cast."""
  cast = path.rpartition("/")[2] in ("kernel", "embedding")
  return jnp.dtype(config.dtype if cast else jnp.float32)


def as_bits(
  params: Mapping[str, jax.Array], config: ModelConfig
) -> dict[str, jax.Array]:
  """Parameters as the CPU can read them layer by layer: see `layers.Stack`.

  Stacked bfloat16 becomes uint16 of the same bits, in the same memory, and so
  do embeddings that are only looked up; the rest, and everything on other
  devices, stays as it is.
  """
  axes = param_axes(config)
  looked_up = () if config.decoder.tied else ("decoder/embedding",)
  return {
    path: _bits(value)
    if value.dtype == jnp.bfloat16
    and (axes[path][:1] == ("layers",) or path in looked_up)
    and next(iter(value.devices())).platform == "cpu"
    else value
    for path, value in params.items()
  }


def _bits(value: jax.Array) -> jax.Array:
  shards = [
    jax.device_put(np.asarray(x.data).view(np.uint16), x.device)
    for x in value.addressable_shards
  ]
  return jax.make_array_from_single_device_arrays(
    value.shape, value.sharding, shards
  )
