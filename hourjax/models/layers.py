"""What the towers share: linear layers on a mesh and a scanned stack."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from hourjax.kernels.constants import SAVED
from hourjax.models.config import Remat
from hourjax.parallel.fsdp import gather_weight, weight_gradients

# Called on the host after each layer of a stack, by what is traced now.
_TOLD: contextvars.ContextVar[Callable[[], None] | None] = (
  contextvars.ContextVar("told", default=None)
)
_PRODUCT = "product"  # of an activation and a weight, for rematerialisation
# Logical axes of a layer's input before its channels.
Lead = tuple[str, str | None]
SEQUENCE: Lead = ("rows", "positions")
IMAGES: Lead = ("images", None)
# A few tokens, which go to where the weights are instead of gathering them.
TOKENS: Lead = ("rows", None)


@contextlib.contextmanager
def layers_told(told: Callable[[], None] | None) -> Iterator[None]:
  """While a function is traced: stacks call `told` after each layer.

  That takes a call to the host, and such a program is compiled anew in each
  process; None changes nothing.
  """
  token = _TOLD.set(told)
  try:
    yield
  finally:
    _TOLD.reset(token)


class Stack(nnx.Module):
  """`depth` equal layers with stacked parameters, run by one `lax.scan`.

  A parameter may be given as uint16, the bits of bfloat16. The CPU computes in
  float32, and of a stack in bfloat16 its compiler makes one in float32 before
  the first layer: 11 GiB for 3B. Bits it cannot convert, so each layer is
  converted when it is its turn (`params.as_bits`).
  """

  def __init__(
    self,
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    depth: int,
    remat: Remat,
    rngs: nnx.Rngs,
  ):
    self.depth, self.remat = depth, remat
    self.layers = nnx.vmap(make)(rngs.fork(split=depth))

  def __call__(self, x: Float[Array, "..."], *args, **kwargs):
    def step(layer, x, _):
      return layer(x, *args, **kwargs), None

    return self.scan(step, x)[0]

  def scan(
    self,
    step: Callable[[nnx.Module, Any, Any], tuple],
    x: Any,
    each: Any = None,
  ) -> tuple[Any, Any]:
    """x, out = step(layer, x, part of `each`), layer by layer.

    Args:
      step: what a layer does.
      x: goes from layer to layer.
      each: arrays with a leading axis of layers.

    Returns:
      The last x, and all outs along a new leading axis.
    """
    graph, params = nnx.split(self.layers)

    def body(x, part):
      own, each = part
      own = jax.tree.map(from_bits, own)
      return step(nnx.merge(graph, own), x, each)

    body = rematerialised(body, self.remat)
    told = _TOLD.get()
    if told is None:
      return jax.lax.scan(body, x, (params, each))

    def telling(x, part):
      result = body(x, part)
      jax.debug.callback(told)
      return result

    return jax.lax.scan(telling, x, (params, each))

  def layer(self, index: int) -> nnx.Module:
    """One layer with its own parameters, for tests and inspection."""
    graph, params = nnx.split(self.layers)
    return nnx.merge(graph, jax.tree.map(lambda p: p[index], params))


def from_bits(x: jax.Array) -> jax.Array:
  """Reads uint16 as the bits of bfloat16; everything else stays as it is."""
  if x.dtype != jnp.uint16:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.bfloat16)


def rematerialised(function: Callable, remat: Remat) -> Callable:
  """`function` with the rematerialisation that `ModelConfig.remat` names.

  Attention keeps its output and log-sum-exp in any case: they are small beside
  what it costs to compute them again.
  """
  keep = jax.checkpoint_policies.save_only_these_names
  if remat == "none":
    return function
  if remat == "dots":
    # By name: the products' own gradient hides them from other policies.
    return jax.checkpoint(function, policy=keep(_PRODUCT, *SAVED))
  if remat == "full":
    return jax.checkpoint(function, policy=keep(*SAVED))
  raise ValueError(f"remat is {remat!r}; choose none, dots or full")


class Linear(nnx.Linear):
  """`nnx.Linear` on a mesh: see `product`.

  Attributes:
    axes: logical axes of the kernel.
  """

  def __init__(self, *args, axes: tuple[str | None, str | None], **kwargs):
    super().__init__(
      *args,
      kernel_metadata={"axes": axes},
      bias_metadata={"axes": (bias_axis(axes),)},
      **kwargs,
    )
    self.axes = axes

  def __call__(
    self, x: Float[Array, "a b i"], lead: Lead = SEQUENCE
  ) -> Float[Array, "a b o"]:
    kernel = jnp.asarray(self.kernel[...])
    bias = None if self.bias is None else jnp.asarray(self.bias[...])
    if lead == TOKENS:
      y = x.astype(self.dtype) @ kernel.astype(self.dtype)
      return y if bias is None else y + bias.astype(self.dtype)[None, None]
    y = product(x.astype(self.dtype), kernel, bias, self.axes, lead)
    return checkpoint_name(y, _PRODUCT)


def bias_axis(axes: tuple[str | None, str | None]) -> str | None:
  """A bias is split only where it meets outputs that are."""
  return axes[1] if axes[1] in ("heads", "mlp") else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(
  x: Float[Array, "a b i"],
  kernel: Float[Array, "i o"],
  bias: Float[Array, "o"] | None,
  axes: tuple[str | None, str | None],
  lead: Lead,
) -> Float[Array, "a b o"]:
  """x @ kernel + bias in the dtype of x.

  The kernel is gathered for it, and in the backward pass anew
  (`parallel.fsdp`).

  Args:
    x: input.
    kernel, bias: as they are stored.
    axes: logical axes of the kernel.
    lead: logical axes of a and b.
  """
  y = x @ gather_weight(kernel, axes, x.dtype)
  return y if bias is None else y + bias.astype(x.dtype)[None, None]


def _product_forward(x, kernel, bias, axes, lead):
  return product(x, kernel, bias, axes, lead), (x, kernel, bias)


def _product_backward(axes, lead, saved, d_y):
  x, kernel, bias = saved
  whole = gather_weight(kernel, axes, x.dtype)
  d_x = jnp.einsum("abo,io->abi", d_y, whole)
  d_kernel, d_bias = weight_gradients(x, d_y, axes, lead, kernel.dtype)
  return d_x, d_kernel, None if bias is None else d_bias


product.defvjp(_product_forward, _product_backward)


def linear(
  in_width: int,
  out_width: int,
  *,
  axes: tuple[str | None, str | None],
  bias: bool = True,
  dtype: str,
  rngs: nnx.Rngs,
) -> Linear:
  """Float32 parameters, N(0, 1 / in_width); computes in `dtype`.

  At the decoders' real widths that is their published 0.02; a tiny model
  trained from scratch needs the larger weights of its own width.
  """
  return Linear(
    in_width,
    out_width,
    axes=axes,
    use_bias=bias,
    dtype=jnp.dtype(dtype),
    kernel_init=nnx.initializers.lecun_normal(),
    rngs=rngs,
  )


def layer_norm(
  width: int, *, eps: float, dtype: str, rngs: nnx.Rngs
) -> nnx.LayerNorm:
  """LayerNorm with statistics in float32."""
  return nnx.LayerNorm(
    width,
    epsilon=eps,
    dtype=jnp.dtype(dtype),
    use_fast_variance=False,
    rngs=rngs,
  )
