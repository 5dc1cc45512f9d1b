"""The one attention call of the model."""

import jax
from jaxtyping import Array, Float, Int

from hourjax.kernels import reference


def attention(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  v: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  *,
  causal: bool = False,
) -> Float[Array, "B T H C"]:
  """Grouped-query attention between positions of the same segment.

  Scores are scaled by C ** -0.5; softmax and accumulation are float32.
  Positions (RoPE) are applied by the caller. A T x S matrix is never built.

  Args:
    q: queries. Head h reads the keys of KV head h // (H / K).
    k: keys.
    v: values.
    query_segment: a query sees the keys whose segment id equals its own.
      0 is padding: such a query sees nothing.
    key_segment: ids of the keys; 0 is padding.
    causal: query t also sees only the keys at index s <= t (needs T == S).

  Returns:
    In the dtype of q. A query that sees no key gets zeros and passes no
    gradient.

  Raises:
    ValueError: if H is not a multiple of K, or causal with T != S.
  """
  heads, kv_heads = q.shape[2], k.shape[2]
  if heads % kv_heads:
    raise ValueError(
      f"{heads} query heads cannot share {kv_heads} KV heads evenly"
    )
  if causal and q.shape[1] != k.shape[1]:
    raise ValueError(
      "causal attention needs as many keys as queries, got"
      f" {k.shape[1]} keys for {q.shape[1]} queries"
    )
  with jax.named_scope("attention"):
    return reference.chunked_attention(
      q, k, v, query_segment, key_segment, causal
    )
