"""What the towers share: rotary attention and a scanned stack of layers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from hourjax import kernels
from hourjax.models.config import Remat
from hourjax.parallel.fsdp import gather_weight, weight_gradients
from hourjax.parallel.rules import attention_sharding

_PRODUCT = "product"  # of an activation and a weight, for rematerialisation
# Logical axes of a layer's input before its channels.
Lead = tuple[str, str | None]
SEQUENCE: Lead = ("rows", "positions")
IMAGES: Lead = ("images", None)


def rope(
  x: Float[Array, "B N H C"],
  position: Int[Array, "B N"],
  *,
  rotary_dim: int,
  base: float,
) -> Float[Array, "B N H C"]:
  """Rotary embedding of the first `rotary_dim` channels, two-halves layout.

  Channel i is turned with channel i + rotary_dim / 2 by the angle
  position * base ** (-2 i / rotary_dim). The phase is float32, as in the
  published weights' training: at position 234,000 another precision would be
  another model. Source: RoFormer (arXiv 2104.09864), GPT-NeoX layout.
  """
  # Exponent and power in float32 steps, as torch computes the table.
  exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(
    rotary_dim
  )
  frequency = (1.0 / (np.float64(base) ** exponent).astype(np.float32)).astype(
    np.float32
  )
  phase = position.astype(jnp.float32)[..., None] * frequency[None, None]
  cos, sin = jnp.cos(phase)[:, :, None], jnp.sin(phase)[:, :, None]
  turned, kept = jnp.split(x.astype(jnp.float32), [rotary_dim], axis=-1)
  first, second = jnp.split(turned, 2, axis=-1)
  out = [first * cos - second * sin, second * cos + first * sin, kept]
  return jnp.concatenate(out, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions.

  Without `context` it is self-attention; with it, queries read the context.
  """

  def __init__(
    self,
    *,
    width: int,
    heads: int,
    kv_heads: int,
    rotary_dim: int,
    rope_base: float,
    out_bias: bool,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    self.heads, self.kv_heads = heads, kv_heads
    self.rotary_dim, self.rope_base = rotary_dim, rope_base
    kv_width = width // heads * kv_heads
    make = functools.partial(
      linear, axes=("width", "heads"), dtype=dtype, rngs=rngs
    )
    self.q = make(width, width)
    self.k, self.v = make(width, kv_width), make(width, kv_width)
    self.o = make(width, width, bias=out_bias, axes=("heads", "width"))

  def __call__(
    self,
    x: Float[Array, "B T D"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    context: Float[Array, "B S D"] | None = None,
    context_position: Int[Array, "B S"] | None = None,
    context_segment: Int[Array, "B S"] | None = None,
    causal: bool = False,
  ) -> Float[Array, "B T D"]:
    sharding = attention_sharding("self" if context is None else "cross")
    if context is None:
      context, context_position, context_segment = x, position, segment
    q = self._turned(self.q(x), position, self.heads)
    k = self._turned(self.k(context), context_position, self.kv_heads)
    v = self._heads(self.v(context), self.kv_heads)
    out = kernels.attention(
      q, k, v, segment, context_segment, causal=causal, sharding=sharding
    )
    return self.o(out.reshape(x.shape))

  def _heads(self, x, heads):
    return x.reshape(*x.shape[:2], heads, -1)

  def _turned(self, x, position, heads):
    return rope(
      self._heads(x, heads),
      position,
      rotary_dim=self.rotary_dim,
      base=self.rope_base,
    )


class Stack(nnx.Module):
  """`depth` equal layers with stacked parameters, run by one `lax.scan`."""

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
    graph, params = nnx.split(self.layers)

    def step(x, layer_params):
      return nnx.merge(graph, layer_params)(x, *args, **kwargs), None

    return jax.lax.scan(rematerialised(step, self.remat), x, params)[0]

  def layer(self, index: int) -> nnx.Module:
    """One layer with its own parameters, for tests and inspection."""
    graph, params = nnx.split(self.layers)
    return nnx.merge(graph, jax.tree.map(lambda p: p[index], params))


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
    return jax.checkpoint(function, policy=keep(_PRODUCT, *kernels.SAVED))
  if remat == "full":
    return jax.checkpoint(function, policy=keep(*kernels.SAVED))
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
