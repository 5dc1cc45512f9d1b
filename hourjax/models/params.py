"""Parameters as a flat mapping of paths, e.g. "projector/fc1/kernel"."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hourjax.models.config import ModelConfig
from hourjax.models.hourllava import HourLLaVA
from hourjax.models.linear import ADDED, Linear

VISION = "vision/"  # start of the paths of the vision tower's parameters


def init_params(
  config: ModelConfig,
  seed: int,
  *,
  prefix: str = "",
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, jax.Array]:
  """Draws float32 parameters.

  Args:
    config: of the model.
    seed: of the random numbers.
    prefix: start of the paths that are wanted, e.g. "vision/". Only these
      are computed, with the same values as without it.
    shardings: of all of these by path. Every device draws its own part, and
      the values are those of a single device.

  Returns:
    Arrays by path.
  """
  places = None if shardings is None else tuple(shardings.items())
  return _drawing(config, prefix, places)(jax.random.key(seed))


@functools.cache
def _drawing(
  config: ModelConfig,
  prefix: str,
  shardings: tuple[tuple[str, jax.sharding.Sharding], ...] | None,
) -> Callable[[jax.Array], dict[str, jax.Array]]:
  """Returns the compiled function from a random key to parameters."""

  def draw(key: jax.Array) -> dict[str, jax.Array]:
    state = nnx.state(HourLLaVA(config, rngs=nnx.Rngs(key)), nnx.Param)
    params = {_name(p): value[...] for p, value in _flat(state)}
    return {p: value for p, value in params.items() if p.startswith(prefix)}

  return jax.jit(
    draw, out_shardings=None if shardings is None else dict(shardings)
  )


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of all parameters by path, allocating none."""
  return {
    _name(path): tuple(variable.get_value().shape)
    for path, variable in _abstract(config)[1]
  }


def param_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
  """Returns the logical axes of all parameters by path.

  Returns:
    A name of `parallel.rules.PARAMETERS`, or None, for each dimension.
  """
  axes = {}
  for path, variable in _abstract(config)[1]:
    own = variable.get_metadata().get("axes")
    dims = len(variable.get_value().shape)
    # A stack of layers has one dimension more than the layer named.
    stacked = ("layers",) * (own is not None and dims > len(own))
    axes[_name(path)] = (*stacked, *(own or (None,) * dims))
  return axes


def with_params(
  config: ModelConfig, params: Mapping[str, Any], *, prefix: str = ""
) -> HourLLaVA:
  """Builds the model with these parameters; pure, so it may run under `jit`.

  Parameters that only some layers have, those of adapters and the scales of
  quantized kernels, are given to their layers (see `lora`, `quantization`).

  Args:
    config: of the model.
    params: by path. Those of the vision tower may be left out all together.
    prefix: start of the paths that are filled in; the other parameters have
      shapes but no values, and must not be used, nor must those left out.

  Raises:
    KeyError: a parameter is missing.
  """
  known = param_shapes(config)
  added = tuple(
    (path, jax.ShapeDtypeStruct(value.shape, value.dtype))
    for path, value in sorted(params.items())
    if path not in known and path.rpartition("/")[2] in ADDED
  )
  no_tower = not any(path.startswith(VISION) for path in params)
  graph, variables = _abstract(config, added)
  flat = []
  for path, variable in variables:
    name = _name(path)
    filled = name.startswith(prefix)
    filled = filled and not (no_tower and name.startswith(VISION))
    value = params[name] if filled else variable.get_value()
    flat.append((path, variable.replace(value)))
  return nnx.merge(graph, nnx.from_flat_state(flat))


_Path = tuple[Any, ...]


# Building a model takes half a second, and a program is traced for every
# shape of its inputs.
@functools.cache
def _abstract(
  config: ModelConfig,
  added: tuple[tuple[str, jax.ShapeDtypeStruct], ...] = (),
) -> tuple[nnx.GraphDef, tuple[tuple[_Path, nnx.Param], ...]]:
  """Returns a model's graph, and its parameters with shapes for values.

  Args:
    config: of the model.
    added: parameters, by path, that layers have beside their own.
  """
  model = nnx.eval_shape(lambda: HourLLaVA(config, rngs=nnx.Rngs(0)))
  for path, value in added:
    *names, last = path.split("/")
    layer = functools.reduce(getattr, names, model)
    if not isinstance(layer, Linear):
      raise KeyError(f"the model has no parameter {path}")
    setattr(layer, last, nnx.Param(value))
  graph, state = nnx.split(model)
  return graph, tuple(
    (path, variable)
    for path, variable in _flat(state)
    if isinstance(variable, nnx.Param)
  )


def _flat(state: Any) -> Iterator[tuple[_Path, nnx.Variable]]:
  yield from nnx.to_flat_state(state)


def _name(path: _Path) -> str:
  return "/".join(map(str, path))


def narrow_dtype(path: str, config: ModelConfig) -> np.dtype:
  """Returns the dtype in which inference keeps a parameter.

  Kernels and embeddings are cast to the compute dtype whenever they are used,
  so that they can be kept cast; all others stay float32.
  """
  cast = path.rpartition("/")[2] in ("kernel", "embedding")
  return jnp.dtype(config.dtype if cast else jnp.float32)


def as_bits(
  params: Mapping[str, jax.Array], config: ModelConfig
) -> dict[str, jax.Array]:
  """Returns parameters as the CPU can convert them layer by layer.

  See `layers.Stack` for the reason. Stacked bfloat16 arrays become uint16 of
  the same bits in the same memory, and so do embeddings that are only looked
  up. All others, and everything on other devices, stays as it is.

  Args:
    params: by path.
    config: of the model.
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
  """Returns an array on the CPU as uint16, without a copy."""
  shards = [
    jax.device_put(np.asarray(x.data).view(np.uint16), x.device)
    for x in value.addressable_shards
  ]
  return jax.make_array_from_single_device_arrays(
    value.shape, value.sharding, shards
  )
