"""Rotary grouped-query attention: to itself, to a context, to a cache."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from hourjax.kernels.attention import attention, cached_attention
from hourjax.kernels.tpu.tiles import AttentionTiles
from hourjax.models.config import PLATFORM_ATTENTION, AttentionConfig
from hourjax.models.layers import TOKENS, linear
from hourjax.parallel.chips import attention_tiles
from hourjax.parallel.rules import attention_sharding


class KeysValues(NamedTuple):
  """What attention reads of a context; the keys are turned by position."""

  k: Float[Array, "*layers B S K C"]
  v: Float[Array, "*layers B S K C"]


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
    config: AttentionConfig = PLATFORM_ATTENTION,
  ):
    self.config = config
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
    kind = "self" if context is None else "cross"
    if context is None:
      context, context_position, context_segment = x, position, segment
    known = self.keys_values(context, context_position)
    return self.read(
      x, position, segment, known, context_segment, kind=kind, causal=causal
    )

  def keys_values(
    self, context: Float[Array, "B S D"], position: Int[Array, "B S"]
  ) -> KeysValues:
    """Of a context, which may be kept and read again."""
    return KeysValues(
      self._turned(self.k(context), position, self.kv_heads),
      self._heads(self.v(context), self.kv_heads),
    )

  def queries(
    self, x: Float[Array, "B T D"], position: Int[Array, "B T"]
  ) -> Float[Array, "B T H C"]:
    """What x asks with."""
    return self._turned(self.q(x), position, self.heads)

  def read(
    self,
    x: Float[Array, "B T D"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    known: KeysValues,
    known_segment: Int[Array, "B S"],
    *,
    kind: str,
    causal: bool = False,
  ) -> Float[Array, "B T D"]:
    """Reads keys and values there are; `kind` as in `attention_sharding`."""
    q = self.queries(x, position)
    out = attention(
      q,
      *known,
      segment,
      known_segment,
      causal=causal,
      sharding=attention_sharding(kind),
      **self.implementation(q, causal=causal),
    )
    return self.o(out.reshape(x.shape))

  def implementation(
    self, q: Float[Array, "B T H C"], *, causal: bool = False
  ) -> dict[str, str | AttentionTiles | None]:
    """Returns who computes attention of q, as arguments of the call."""
    name = self.config.implementation
    if name == "platform":
      name = None
    tiles = None
    if name in (None, "tpu") and not causal:
      tiles = attention_tiles(
        q.dtype,
        forward=self.config.forward_tiles,
        backward=self.config.backward_tiles,
      )
    return {"implementation": name, "tiles": tiles}

  def extend(
    self,
    x: Float[Array, "B n D"],
    position: Int[Array, "B n"],
    cached: KeysValues,
    length: Int[Array, "B"],
  ) -> tuple[Float[Array, "B n D"], KeysValues]:
    """A few new tokens after the first `length` cached ones of each row.

    Returns:
      What they read, and their own keys and values, which are not yet cached.
    """
    q = self._turned(self.q(x, TOKENS), position, self.heads)
    k = self._turned(self.k(x, TOKENS), position, self.kv_heads)
    v = self._heads(self.v(x, TOKENS), self.kv_heads)
    out = cached_attention(q, k, v, *cached, length)
    return self.o(out.reshape(x.shape), TOKENS), KeysValues(k, v)

  def _heads(self, x, heads):
    return x.reshape(*x.shape[:2], heads, -1)

  def _turned(self, x, position, heads):
    return rope(
      self._heads(x, heads),
      position,
      rotary_dim=self.rotary_dim,
      base=self.rope_base,
    )
