"""Layers that all parts share: a scanned stack of layers, and norms."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from hourjax.kernels.constants import SAVED
from hourjax.models.config import Offload, Remat
from hourjax.models.linear import PRODUCT

# Called on the host after each layer of the stacks that are traced while it is
# set; see `layer_callback`.
_CALLBACK: contextvars.ContextVar[Callable[[], None] | None] = (
  contextvars.ContextVar("layer_callback", default=None)
)
# Name under which rematerialisation finds the input of a layer.
_INPUT = "layer_input"


@contextlib.contextmanager
def layer_callback(callback: Callable[[], None] | None) -> Iterator[None]:
  """Makes stacks that are traced inside call `callback` after each layer.

  The call goes from the device to the host, and JAX compiles such a program
  anew in each process instead of taking it from its cache.

  Args:
    callback: called without arguments; None changes nothing.
  """
  token = _CALLBACK.set(callback)
  try:
    yield
  finally:
    _CALLBACK.reset(token)


class Stack(nnx.Module):
  """Runs `depth` equal layers with stacked parameters by one `lax.scan`.

  A parameter may be given as uint16, the bits of bfloat16. The CPU computes
  in float32, and its compiler would convert a whole bfloat16 stack to float32
  before the first layer: 11 GiB for the 3B model. It cannot convert bits, so
  that each layer is converted when it runs (see `params.as_bits`).
  """

  def __init__(
    self,
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    depth: int,
    remat: Remat,
    rngs: nnx.Rngs,
    offload: Offload = "device",
  ):
    """Draws the parameters of all layers.

    Args:
      make: builds one layer.
      depth: number of layers.
      remat: see `ModelConfig`.
      rngs: streams of random numbers.
      offload: see `ModelConfig`.
    """
    self.depth, self.remat, self.offload = depth, remat, offload
    self.layers = nnx.vmap(make)(rngs.split(depth))

  def __call__(
    self, x: Float[Array, "..."], *args: Any, **kwargs: Any
  ) -> Float[Array, "..."]:
    """Computes x = layer(x, *args, **kwargs) for every layer."""

    def step(
      layer: nnx.Module, x: Float[Array, "..."], _: None
    ) -> tuple[Float[Array, "..."], None]:
      return layer(x, *args, **kwargs), None

    return self.scan(step, x)[0]

  def scan(
    self,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    x: Any,
    per_layer: Any = None,
  ) -> tuple[Any, Any]:
    """Computes x, out = step(layer, x, its part of `per_layer`) layer by layer.

    Args:
      step: what is done with a layer.
      x: carried from layer to layer.
      per_layer: arrays with a leading axis of layers.

    Returns:
      The last x, and all outs along a new leading axis.
    """
    graph, params = nnx.split(self.layers)

    def body(x: Any, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
      own, part = scanned
      own = jax.tree.map(from_bits, own)
      return step(nnx.merge(graph, own), x, part)

    body = rematerialised(body, self.remat, self.offload)
    callback = _CALLBACK.get()
    if callback is None:
      return jax.lax.scan(body, x, (params, per_layer))

    def reporting(x: Any, scanned: tuple[Any, Any]) -> tuple[Any, Any]:
      result = body(x, scanned)
      jax.debug.callback(callback)
      return result

    return jax.lax.scan(reporting, x, (params, per_layer))

  def layer(self, index: int) -> nnx.Module:
    """Returns one layer with its own parameters, for tests and inspection."""
    graph, params = nnx.split(self.layers)
    return nnx.merge(graph, jax.tree.map(lambda p: p[index], params))


def from_bits(x: jax.Array) -> jax.Array:
  """Reads uint16 as the bits of bfloat16; leaves other dtypes as they are."""
  if x.dtype != jnp.uint16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.bfloat16)


def rematerialised(
  function: Callable, remat: Remat, offload: Offload = "device"
) -> Callable:
  """Returns `function` with the rematerialisation that `remat` names.

  The output and log-sum-exp of attention are kept in any case: they are small
  beside what it costs to compute them again.

  Args:
    function: to be differentiated.
    remat: see `ModelConfig`.
    offload: see `ModelConfig`.

  Raises:
    ValueError: `remat` is unknown, or keeps what is to be moved to the host.
  """
  if offload == "host":
    if remat != "full":
      raise ValueError(
        f"offload is 'host' and remat {remat!r}: what it keeps is not moved;"
        " choose remat 'full', or offload 'device'"
      )
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[_INPUT, *SAVED],
      offload_src="device",
      offload_dst="pinned_host",
    )

    def named(x: Any, *args: Any) -> Any:
      # A name for what a scan would keep of each layer on the device.
      return function(checkpoint_name(x, _INPUT), *args)

    return jax.checkpoint(named, policy=policy)
  keep = jax.checkpoint_policies.save_only_these_names
  if remat == "none":
    return function
  if remat == "dots":
    # By name, because JAX's policies for products do not see those inside
    # the custom gradient of `linear.sharded_product`.
    return jax.checkpoint(function, policy=keep(PRODUCT, *SAVED))
  if remat == "full":
    return jax.checkpoint(function, policy=keep(*SAVED))
  raise ValueError(f"remat is {remat!r}; choose none, dots or full")


def layer_norm(
  width: int, *, eps: float, dtype: str, rngs: nnx.Rngs
) -> nnx.LayerNorm:
  """Builds a LayerNorm that computes its statistics in float32."""
  return nnx.LayerNorm(
    width,
    epsilon=eps,
    dtype=jnp.dtype(dtype),
    use_fast_variance=False,
    rngs=rngs,
  )


def rms_norm(
  width: int, *, eps: float, dtype: str, rngs: nnx.Rngs
) -> nnx.RMSNorm:
  """Builds an RMSNorm that computes its statistics in float32."""
  return nnx.RMSNorm(
    width,
    epsilon=eps,
    dtype=jnp.dtype(dtype),
    use_fast_variance=False,
    rngs=rngs,
  )
