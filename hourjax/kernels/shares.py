"""How much of the attention each key gets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hourjax.kernels.attention import attention
from hourjax.kernels.sharded import Sharding


def key_shares(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  *,
  sharding: Sharding | None = None,
) -> Float[Array, "B S"]:
  """Attention weights on each key, summed over queries and heads, float32.

  The gradient of attention's output for the values is its weights: with the
  gradient 1 in one channel of every query, that channel of dv is the sum
  wanted. So the kernels compute it, and no T x S matrix is built. A row sums
  to the heads times the queries that see a key.

  Args:
    q, k, query_segment, key_segment, sharding: as for `attention`. Weights
      are rounded to the dtype of k.
  """

  def mixed(values):
    return attention(
      q, k, values, query_segment, key_segment, sharding=sharding
    )

  # The values themselves do not matter to their gradient.
  out, transpose = jax.vjp(mixed, k)
  (d_values,) = transpose(jnp.zeros_like(out).at[..., 0].set(1))
  return d_values[..., 0].astype(jnp.float32).sum(-1)
