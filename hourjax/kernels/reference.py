"""Chunked attention in plain JAX: the reference, and the path off-TPU.

The online softmax of FlashAttention (arXiv 2205.14135) over tiles of queries
and keys, with its own gradient: the backward pass recomputes each tile from
the saved log-sum-exp, so memory grows with T + S and never with T x S.
Tiles whose queries and keys share no segment are skipped, so a row packed
with short samples costs about the sum of its T_i x S_i.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from hourjax.kernels.constants import NO_PART

QUERY_TILE = 512
KEY_TILE = 512  # what fits into a core's cache, with the scores beside it
_NEVER = -1e30  # finite, so that exp(_NEVER - _NEVER) stays a number


class _Tiles(NamedTuple):
  """One row of the batch, cut into tiles; n_q x n_k tiles in all."""

  q: jax.Array  # [n_q, K, G * tile_q, C]
  k: jax.Array  # [n_k, K, tile_k, C]
  v: jax.Array  # [n_k, K, tile_k, C]
  query_segment: jax.Array  # [n_q, tile_q]
  key_segment: jax.Array  # [n_k, tile_k]


def forward(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  v: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  *,
  causal: bool = False,
  out_dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
  """Segment-masked grouped-query attention; see `kernels.attention`.

  Returns:
    out in `out_dtype`, and the log-sum-exp of the scaled scores, float32;
    zeros and -1e30 where a query sees no key.
  """
  # lax.map over the batch, not vmap: under vmap a skipped tile is computed.
  return jax.lax.map(
    lambda row: _forward_row(*row, causal=causal, out_dtype=out_dtype),
    _here(q, k, v, query_segment, key_segment),
  )


def backward(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  v: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  lse: Float[Array, "B T H"],
  delta: Float[Array, "B T H"],
  d_out: Float[Array, "B T H C"],
  *,
  causal: bool = False,
) -> tuple[
  Float[Array, "B T H C"], Float[Array, "B S K C"], Float[Array, "B S K C"]
]:
  """Gradients, from the log-sum-exp over all keys there are anywhere.

  Args:
    q, k, v, query_segment, key_segment: as in the forward pass.
    lse: float32; 1e30 where a query sees no key.
    delta: float32, the sum of out * d_out over C.
    d_out: the output's gradient.
    causal: as in the forward pass.

  Returns:
    dq in float32; dk and dv in the dtypes of k and v.
  """
  return jax.lax.map(
    lambda row: _backward_row(*row, causal=causal),
    _here(q, k, v, query_segment, key_segment, lse, delta, d_out),
  )


def _here(*operands):
  """Keeps what follows within a scan over layers.

  Differentiating such a scan hoists what does not depend on its carry: here
  the masks of all tiles, together T x S. The barrier makes them depend on q.
  """
  return jax.lax.optimization_barrier(operands)


def _forward_row(q, k, v, query_segment, key_segment, *, causal, out_dtype):
  """[T, H, C], [S, K, C], ... -> out [T, H, C], lse [T, H]."""
  tiles = _cut(q, k, v, query_segment, key_segment)
  n_q, kv_heads, rows, head_dim = tiles.q.shape

  def one_query_tile(i):
    def visit(carry, j):
      top, total, acc = carry
      score = _scores(tiles, i, j, causal)
      new_top = jnp.maximum(top, score.max(-1))
      weight = _weights(score, new_top)
      shrink = jnp.exp(top - new_top)
      total = total * shrink + weight.sum(-1)
      acc = acc * shrink[..., None] + jnp.einsum(
        "kts,ksc->ktc",
        weight.astype(v.dtype),
        tiles.v[j],
        preferred_element_type=jnp.float32,
      )
      return new_top, total, acc

    start = (
      jnp.full((kv_heads, rows), _NEVER, jnp.float32),
      jnp.zeros((kv_heads, rows), jnp.float32),
      jnp.zeros((kv_heads, rows, head_dim), jnp.float32),
    )
    top, total, acc = _over_keys(tiles, i, causal, visit, start)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(safe), NO_PART)
    return (acc / safe[..., None]).astype(out_dtype), lse[..., None]

  out, lse = jax.lax.map(one_query_tile, jnp.arange(n_q))
  return _unfold(out, q.shape), _unfold(lse, q.shape)[..., 0]


def _backward_row(
  q, k, v, query_segment, key_segment, lse, delta, d_out, *, causal
):
  tiles = _cut(q, k, v, query_segment, key_segment)
  scale = q.shape[-1] ** -0.5
  groups, tile = q.shape[1] // k.shape[1], tiles.query_segment.shape[1]
  d_tiles = _fold(d_out, groups, tile)
  lse = _fold(lse[..., None], groups, tile)[..., 0]
  delta = _fold(delta[..., None], groups, tile)[..., 0]

  def one_query_tile(carry, i):
    def visit(state, j):
      dq, dk, dv = state
      weight = _weights(_scores(tiles, i, j, causal), lse[i])
      dv_j = _dot("kts,ktc->ksc", weight.astype(q.dtype), d_tiles[i])
      d_weight = _dot("ktc,ksc->kts", d_tiles[i], tiles.v[j])
      d_score = weight * (d_weight - delta[i][..., None]) * scale
      d_score = d_score.astype(q.dtype)
      dq = dq + _dot("kts,ksc->ktc", d_score, tiles.k[j])
      dk_j = _dot("kts,ktc->ksc", d_score, tiles.q[i])
      return dq, dk.at[j].add(dk_j), dv.at[j].add(dv_j)

    dk, dv = carry
    start = (jnp.zeros(tiles.q.shape[1:], jnp.float32), dk, dv)
    dq, dk, dv = _over_keys(tiles, i, causal, visit, start)
    return (dk, dv), dq

  zeros = jnp.zeros(tiles.k.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(
    one_query_tile, (zeros, zeros), jnp.arange(tiles.q.shape[0])
  )
  return _unfold(dq, q.shape), _join(dk, k), _join(dv, v)


def _over_keys(tiles, i, causal, visit, start):
  """Folds `visit` over the key tiles that query tile i can see."""
  query = tiles.query_segment[i]
  last = (i + 1) * query.shape[0] - 1
  low = jnp.min(jnp.where(query > 0, query, jnp.iinfo(query.dtype).max))
  high = jnp.max(query)

  def step(carry, j):
    key = tiles.key_segment[j]
    # Ids rise along a row, so overlapping ranges mean shared segments; for
    # ids in another order this only skips less.
    shared = jnp.any((key >= low) & (key <= high) & (key > 0))
    if causal:
      shared &= j * key.shape[0] <= last
    carry = jax.lax.cond(shared, lambda c: visit(c, j), lambda c: c, carry)
    return carry, None

  n_k = tiles.key_segment.shape[0]
  return jax.lax.scan(step, start, jnp.arange(n_k))[0]


def _scores(tiles, i, j, causal):
  """Scaled and masked scores [K, G * tile_q, tile_k], float32."""
  q, k = tiles.q[i], tiles.k[j]
  query, key = tiles.query_segment[i], tiles.key_segment[j]
  score = _dot("ktc,ksc->kts", q, k) * q.shape[-1] ** -0.5
  allowed = (query[:, None] == key[None]) & (key > 0)[None]
  if causal:
    query_index = i * query.shape[0] + jnp.arange(query.shape[0])
    key_index = j * key.shape[0] + jnp.arange(key.shape[0])
    allowed &= key_index[None, :] <= query_index[:, None]
  groups = q.shape[1] // query.shape[0]
  return jnp.where(jnp.tile(allowed, (groups, 1))[None], score, _NEVER)


def _weights(score, top):
  weight = jnp.exp(score - top[..., None])
  return jnp.where(score == _NEVER, 0.0, weight)


def _dot(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _cut(q, k, v, query_segment, key_segment) -> _Tiles:
  groups = q.shape[1] // k.shape[1]
  tile_q = _tile(q.shape[0], QUERY_TILE)
  tile_k = _tile(k.shape[0], KEY_TILE)
  return _Tiles(
    q=_fold(q, groups, tile_q),
    k=rearrange(_split(k, tile_k), "n t k c -> n k t c"),
    v=rearrange(_split(v, tile_k), "n t k c -> n k t c"),
    query_segment=_split(query_segment, tile_q),
    key_segment=_split(key_segment, tile_k),
  )


def _tile(length, largest):
  """The smallest tile that needs no more tiles: 600 at most 512 gives 300."""
  return -(-length // -(-length // largest))


def _split(x, tile):
  """[N, ...] -> [ceil(N / tile), tile, ...], padded with zeros."""
  extra = -x.shape[0] % tile
  x = jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(-1, tile, *x.shape[1:])


def _fold(x, groups, tile):
  """[T, H, C] -> [n, K, G * tile, C]: the heads of a group become rows."""
  return rearrange(_split(x, tile), "n t (k g) c -> n k (g t) c", g=groups)


def _unfold(x, shape):
  """Inverse of `_fold`, without the padding."""
  length, heads, _ = shape
  groups = heads // x.shape[1]
  return rearrange(x, "n k (g t) c -> (n t) (k g) c", g=groups)[:length]


def _join(x, like):
  """[n, K, tile, C] -> [S, K, C] in the dtype of `like`."""
  x = rearrange(x, "n k t c -> (n t) k c")
  return x[: like.shape[0]].astype(like.dtype)
