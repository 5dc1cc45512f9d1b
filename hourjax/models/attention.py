"""Rotary grouped-query attention: over itself, a context or a KV cache."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from hourjax.kernels.attention import attention, cached_attention
from hourjax.models.config import PLATFORM_ATTENTION, AttentionConfig
from hourjax.models.layers import rms_norm
from hourjax.models.linear import TOKENS, linear
from hourjax.parallel.chips import attention_tiles
from hourjax.parallel.rules import attention_sharding


class KeysValues(NamedTuple):
  """Holds the keys and values of a context.

  Attributes:
    k: keys, already rotated by their positions.
    v: values.
  """

  k: Float[Array, "*layers B S K C"]
  v: Float[Array, "*layers B S K C"]


def rope(
  x: Float[Array, "B N H C"],
  position: Int[Array, "B N"],
  *,
  rotary_dim: int,
  base: float,
) -> Float[Array, "B N H C"]:
  """Rotates the first `rotary_dim` channels of each head by its position.

  Channel i is rotated with channel i + rotary_dim / 2 (two-halves layout) by
  the angle position * base ** (-2 i / rotary_dim). The phase is float32, as
  in the training of the published weights: at position 234,000 a phase of
  another precision would be another model. Source: RoFormer (arXiv
  2104.09864), in the channel order of GPT-NeoX.

  Args:
    x: queries or keys.
    position: of each token.
    rotary_dim: number of channels that are rotated, even.
    base: of the frequencies.

  Returns:
    Queries or keys in the dtype of `x`.
  """
  # The exponent and the power are rounded to float32 separately, as torch
  # does when it computes the table of frequencies.
  exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(
    rotary_dim
  )
  frequency = (1.0 / (np.float64(base) ** exponent).astype(np.float32)).astype(
    np.float32
  )
  phase = position.astype(jnp.float32)[..., None] * frequency[None, None]
  cos, sin = jnp.cos(phase)[:, :, None], jnp.sin(phase)[:, :, None]
  rotary, rest = jnp.split(x.astype(jnp.float32), [rotary_dim], axis=-1)
  first, second = jnp.split(rotary, 2, axis=-1)
  out = [first * cos - second * sin, second * cos + first * sin, rest]
  return jnp.concatenate(out, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
  """Computes grouped-query attention with rotary positions.

  Without a `context` it is self-attention; with one, `x` makes the queries
  and the context the keys and values.
  """

  def __init__(
    self,
    *,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    rope_base: float,
    out_bias: bool,
    dtype: str,
    rngs: nnx.Rngs,
    bias: bool = True,
    qk_norm_eps: float | None = None,
    query_init: float = 0.0,
    config: AttentionConfig = PLATFORM_ATTENTION,
    scope: str = "attention",
  ):
    """Draws the parameters.

    Args:
      width: channels of input and output.
      heads: query heads.
      kv_heads: key and value heads.
      head_dim: channels of a head.
      rotary_dim: channels of a head that are rotated.
      rope_base: base of the rotary frequencies.
      out_bias: whether the output product adds a bias.
      dtype: of the computation.
      rngs: streams of random numbers.
      bias: whether the products of queries, keys and values add a bias.
      qk_norm_eps: epsilon of an RMSNorm over the channels of each query and
        key head, applied before rotation; None leaves the norms out.
      query_init: see `DecoderConfig`.
      config: which implementation computes attention.
      scope: under which a profile finds the attention, without its products
        with weights.
    """
    self.config, self.scope = config, scope
    self.heads, self.kv_heads = heads, kv_heads
    self.rotary_dim, self.rope_base = rotary_dim, rope_base
    make = functools.partial(
      linear, axes=("width", "heads"), dtype=dtype, rngs=rngs
    )
    self.q = make(width, heads * head_dim, bias=bias)
    self.k = make(width, kv_heads * head_dim, bias=bias)
    self.v = make(width, kv_heads * head_dim, bias=bias)
    if query_init:
      # Each query head begins like the key head of its group.
      key = self.k.kernel[...].reshape(width, kv_heads, 1, head_dim)
      groups = jnp.broadcast_to(
        key, (width, kv_heads, heads // kv_heads, head_dim)
      )
      self.q.kernel[...] = query_init * groups.reshape(width, -1)
    self.o = make(
      heads * head_dim, width, bias=out_bias, axes=("heads", "width")
    )
    self.q_norm, self.k_norm = (
      rms_norm(head_dim, eps=qk_norm_eps, dtype=dtype, rngs=rngs)
      if qk_norm_eps is not None
      else None
      for _ in "qk"
    )

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
    """Attends from `x` to the context, or to `x` itself without one.

    Args:
      x: makes the queries.
      position: of the queries.
      segment: of the queries; a query attends to the keys of its segment.
      context: makes the keys and values.
      context_position: of the keys.
      context_segment: of the keys; 0 is padding.
      causal: whether a query attends to no later key.

    Returns:
      What each query reads, after the output product.
    """
    if context is None:
      kind = "self"
      context, context_position, context_segment = x, position, segment
    else:
      kind = "cross"
    if context_position is None or context_segment is None:
      raise ValueError("a context needs positions and segments")
    cache = self.keys_values(context, context_position)
    return self.attend(
      x, position, segment, cache, context_segment, kind=kind, causal=causal
    )

  def keys_values(
    self, context: Float[Array, "B S D"], position: Int[Array, "B S"]
  ) -> KeysValues:
    """Computes keys and values of a context, to be attended to repeatedly."""
    return KeysValues(
      self._rotated(self.k(context), position, self.kv_heads, self.k_norm),
      self._split_heads(self.v(context), self.kv_heads),
    )

  def queries(
    self, x: Float[Array, "B T D"], position: Int[Array, "B T"]
  ) -> Float[Array, "B T H C"]:
    """Computes the rotated queries of `x`."""
    return self._rotated(self.q(x), position, self.heads, self.q_norm)

  def attend(
    self,
    x: Float[Array, "B T D"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    cache: KeysValues,
    cache_segment: Int[Array, "B S"],
    *,
    kind: str,
    causal: bool = False,
  ) -> Float[Array, "B T D"]:
    """Attends from `x` to keys and values that were computed before.

    Args:
      x: makes the queries.
      position: of the queries.
      segment: of the queries.
      cache: keys and values [B, S, K, C], of `keys_values`.
      cache_segment: of the keys; 0 is padding.
      kind: "self" or "cross", as for `parallel.rules.attention_sharding`.
      causal: whether a query attends to no later key.

    Returns:
      What each query reads, after the output product.
    """
    q = self.queries(x, position)
    scoped = jax.named_scope(self.scope)(attention)
    out = scoped(
      q,
      *cache,
      segment,
      cache_segment,
      causal=causal,
      sharding=attention_sharding(kind),
      **self.implementation(q),
    )
    return self.o(out.reshape(*x.shape[:2], -1))

  def implementation(self, q: Float[Array, "B T H C"]) -> dict[str, Any]:
    """Returns the implementation and tiles for an attention call on `q`.

    Args:
      q: queries of the call, whose dtype decides the tiles.

    Returns:
      The arguments `implementation` and `tiles` of the call.
    """
    name = self.config.implementation
    if name == "platform":
      name = None
    tiles = None
    if name in (None, "tpu"):
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
    """Attends from a few new tokens to a cache and to one another, causally.

    Args:
      x: the new tokens.
      position: of the new tokens.
      cached: keys and values [B, S, K, C]; of each row the first `length` are
        attended to.
      length: number of cached tokens in each row.

    Returns:
      What the tokens read, and their own keys and values [B, n, K, C], which
      are not yet in the cache.
    """
    q = self._rotated(self.q(x, TOKENS), position, self.heads, self.q_norm)
    k = self._rotated(self.k(x, TOKENS), position, self.kv_heads, self.k_norm)
    v = self._split_heads(self.v(x, TOKENS), self.kv_heads)
    out = cached_attention(q, k, v, *cached, length)
    out = self.o(out.reshape(*x.shape[:2], -1), TOKENS)
    return out, KeysValues(k, v)

  def _split_heads(
    self, x: Float[Array, "B N HC"], heads: int
  ) -> Float[Array, "B N H C"]:
    return x.reshape(*x.shape[:2], heads, -1)

  def _rotated(
    self,
    x: Float[Array, "B N HC"],
    position: Int[Array, "B N"],
    heads: int,
    norm: nnx.RMSNorm | None,
  ) -> Float[Array, "B N H C"]:
    """Splits heads, applies the norm if there is one, and rotates."""
    x = self._split_heads(x, heads)
    if norm is not None:
      x = norm(x)
    return rope(x, position, rotary_dim=self.rotary_dim, base=self.rope_base)
