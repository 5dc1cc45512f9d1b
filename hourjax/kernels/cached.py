"""Attention of a few new tokens to a cache of earlier ones.

What a decoder does for every word it writes: little arithmetic over much
memory, so it is plain JAX. On a mesh the compiler splits it as the cache is
split, and sums over devices what is small.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_NEVER = -1e30


def cached_attention(
  q: Float[Array, "B n H C"],
  k: Float[Array, "B n K C"],
  v: Float[Array, "B n K C"],
  cached_k: Float[Array, "B S K C"],
  cached_v: Float[Array, "B S K C"],
  length: Int[Array, "B"],
) -> Float[Array, "B n H C"]:
  """Causal grouped-query attention of new tokens that follow cached ones.

  New token m sees the first `length` cached tokens and the new ones up to
  itself. Scores are scaled by C ** -0.5; softmax and sums are float32.
  Positions (RoPE) are applied by the caller. An n x S matrix is built.

  Args:
    q, k, v: of the new tokens.
    cached_k, cached_v: of earlier tokens; what lies beyond `length` does not
      count.
    length: cached tokens of each row, 0 or more.

  Returns:
    In the dtype of q.
  """
  rows, new, heads, dim = q.shape
  kv_heads = k.shape[2]
  q = q.reshape(rows, new, kv_heads, heads // kv_heads, dim)
  scale = dim**-0.5
  there = jnp.arange(cached_k.shape[1])[None] < length[:, None]
  earlier = jnp.where(
    there[:, None, None, None], _scores(q, cached_k) * scale, _NEVER
  )
  before = jnp.tril(jnp.ones((new, new), bool))
  own = jnp.where(before[None, None, None], _scores(q, k) * scale, _NEVER)
  top = jnp.maximum(earlier.max(-1), own.max(-1))[..., None]
  earlier, own = jnp.exp(earlier - top), jnp.exp(own - top)
  total = earlier.sum(-1) + own.sum(-1)
  out = _mixed(earlier, cached_v) + _mixed(own, v)
  out = jnp.moveaxis(out / total[..., None], 3, 1)
  return out.reshape(rows, new, heads, dim).astype(v.dtype)


def _scores(q, k):
  """[B, n, K, G, C] and [B, m, K, C] to float32 [B, K, G, n, m]."""
  return jnp.einsum(
    "bnkgc,bmkc->bkgnm", q, k, preferred_element_type=jnp.float32
  )


def _mixed(weight, v):
  """[B, K, G, n, m] and [B, m, K, C] to float32 [B, K, G, n, C]."""
  return jnp.einsum(
    "bkgnm,bmkc->bkgnc",
    weight.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
