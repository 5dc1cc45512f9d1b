"""Tiled attention in plain JAX: the reference, and the CPU's implementation.

The online softmax of FlashAttention (arXiv 2205.14135) over tiles of queries
and keys, with its own gradient:

    for each row of the batch:
      for each query tile i:
        top, total, acc = NEVER, 0, 0
        for each key tile j that shares a segment with i:
          score  = q[i] k[j]^T, masked          [K, G * tile_q, tile_k]
          raise top to the row's maximum, shrink total and acc by exp(old - new)
          total += sum of exp(score - top),  acc += exp(score - top) v[j]
        out = acc / total,  lse = top + log(total)

The backward pass computes the scores of each tile anew, and the weights from
the saved log-sum-exp, so memory grows with T + S and never with T x S. Tiles
that share no segment are skipped, so a row packed with short samples costs
about the sum of its T_i x S_i.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from hourjax.kernels.constants import NO_PART

QUERY_TILE = 512
KEY_TILE = 512  # with the scores beside it, this fits into a core's cache
_NEVER = -1e30  # finite, so that exp(_NEVER - _NEVER) stays a number
_Carry = TypeVar("_Carry")


class _Tiles(NamedTuple):
  """Holds one row of the batch, cut into n_q query and n_k key tiles.

  Attributes:
    q: [n_q, K, G * tile_q, C].
    k: [n_k, K, tile_k, C].
    v: [n_k, K, tile_k, C].
    query_segment: [n_q, tile_q].
    key_segment: [n_k, tile_k].
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  query_segment: jax.Array
  key_segment: jax.Array


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
  """Computes segment-masked grouped-query attention and its log-sum-exp.

  Args:
    q: queries, as for `kernels.attention.attention`; so are the others.
    k: keys.
    v: values.
    query_segment: ids of the queries.
    key_segment: ids of the keys.
    causal: whether a query sees only the keys up to its own index.
    out_dtype: of the output.

  Returns:
    out in `out_dtype`, and the log-sum-exp of the scaled scores, float32;
    zeros and -1e30 where a query sees no key.
  """
  # lax.map over the batch, not vmap: vmap turns the `cond` that skips a tile
  # into a `select`, which computes it.
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
  """Computes the gradients of q, k and v.

  Args:
    q: as in the forward pass.
    k: as in the forward pass; may be a part of the keys.
    v: as in the forward pass; the same part.
    query_segment: as in the forward pass.
    key_segment: as in the forward pass.
    lse: float32 log-sum-exp over all keys, also those that k does not hold;
      1e30 where a query sees no key.
    delta: float32, the sum of out * d_out over C.
    d_out: gradient of the output.
    causal: as in the forward pass.

  Returns:
    dq in float32; dk and dv in the dtypes of k and v.
  """
  return jax.lax.map(
    lambda row: _backward_row(*row, causal=causal),
    _here(q, k, v, query_segment, key_segment, lse, delta, d_out),
  )


def _here(*operands: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the operands behind a barrier, which keeps masks out of memory.

  Differentiating a scan over layers moves out of it what does not depend on
  its carry: here the masks of all tiles, together T x S. The barrier makes the
  segment ids, and so the masks, depend on q.
  """
  return jax.lax.optimization_barrier(operands)


def _forward_row(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  *,
  causal: bool,
  out_dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
  """Computes out [T, H, C] and lse [T, H] of one row."""
  tiles = _cut(q, k, v, query_segment, key_segment)
  n_q, kv_heads, rows, head_dim = tiles.q.shape

  def one_query_tile(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    def add(
      carry: tuple[jax.Array, jax.Array, jax.Array], j: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      """Adds key tile j to the maximum, the sum and the weighted values."""
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
    top, total, acc = _over_keys(tiles, i, causal, add, start)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(safe), NO_PART)
    return (acc / safe[..., None]).astype(out_dtype), lse[..., None]

  out, lse = jax.lax.map(one_query_tile, jnp.arange(n_q))
  return _unfold(out, q.shape), _unfold(lse, q.shape)[..., 0]


def _backward_row(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  d_out: jax.Array,
  *,
  causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes dq [T, H, C] and dk, dv [S, K, C] of one row."""
  tiles = _cut(q, k, v, query_segment, key_segment)
  scale = q.shape[-1] ** -0.5
  groups, tile = q.shape[1] // k.shape[1], tiles.query_segment.shape[1]
  d_tiles = _fold(d_out, groups, tile)
  lse = _fold(lse[..., None], groups, tile)[..., 0]
  delta = _fold(delta[..., None], groups, tile)[..., 0]

  def one_query_tile(
    carry: tuple[jax.Array, jax.Array], i: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    def add(
      state: tuple[jax.Array, jax.Array, jax.Array], j: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      """Adds the gradients of key tile j."""
      dq, dk, dv = state
      weight = _weights(_scores(tiles, i, j, causal), lse[i])
      dv_j = _dot("kts,ktc->ksc", weight.astype(q.dtype), d_tiles[i])
      d_weight = _dot("ktc,ksc->kts", d_tiles[i], tiles.v[j])
      # In float32, since the difference cancels most of both.
      d_score = weight * (d_weight - delta[i][..., None]) * scale
      d_score = d_score.astype(q.dtype)
      dq = dq + _dot("kts,ksc->ktc", d_score, tiles.k[j])
      dk_j = _dot("kts,ktc->ksc", d_score, tiles.q[i])
      return dq, dk.at[j].add(dk_j), dv.at[j].add(dv_j)

    dk, dv = carry
    start = (jnp.zeros(tiles.q.shape[1:], jnp.float32), dk, dv)
    dq, dk, dv = _over_keys(tiles, i, causal, add, start)
    return (dk, dv), dq

  zeros = jnp.zeros(tiles.k.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(
    one_query_tile, (zeros, zeros), jnp.arange(tiles.q.shape[0])
  )
  return _unfold(dq, q.shape), _join(dk, k), _join(dv, v)


def _over_keys(
  tiles: _Tiles,
  i: jax.Array,
  causal: bool,
  add: Callable[[_Carry, jax.Array], _Carry],
  start: _Carry,
) -> _Carry:
  """Calls `add` with the carry and each key tile that query tile i can see."""
  query = tiles.query_segment[i]
  last = (i + 1) * query.shape[0] - 1
  low = jnp.min(jnp.where(query > 0, query, jnp.iinfo(query.dtype).max))
  high = jnp.max(query)

  def step(carry: _Carry, j: jax.Array) -> tuple[_Carry, None]:
    key = tiles.key_segment[j]
    # Ids rise along a row, so overlapping ranges mean shared segments; for
    # ids in another order this only skips less.
    shared = jnp.any((key >= low) & (key <= high) & (key > 0))
    if causal:
      shared &= j * key.shape[0] <= last
    carry = jax.lax.cond(shared, lambda c: add(c, j), lambda c: c, carry)
    return carry, None

  n_k = tiles.key_segment.shape[0]
  return jax.lax.scan(step, start, jnp.arange(n_k))[0]


def _scores(
  tiles: _Tiles, i: jax.Array, j: jax.Array, causal: bool
) -> jax.Array:
  """Returns the scaled and masked scores [K, G * tile_q, tile_k], float32."""
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


def _weights(score: jax.Array, top: jax.Array) -> jax.Array:
  """Returns exp(score - top); 0 for masked scores, also if top is masked."""
  weight = jnp.exp(score - top[..., None])
  return jnp.where(score == _NEVER, 0.0, weight)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Multiplies as einsum does, summed in float32."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _cut(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
) -> _Tiles:
  """Cuts one row of the batch into tiles."""
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


def _tile(length: int, largest: int) -> int:
  """Returns the smallest tile with which no more tiles are needed.

  600 positions in tiles of at most 512 are two tiles of 300.
  """
  return -(-length // -(-length // largest))


def _split(x: jax.Array, tile: int) -> jax.Array:
  """Cuts [N, ...] into [ceil(N / tile), tile, ...], padded with zeros."""
  extra = -x.shape[0] % tile
  x = jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(-1, tile, *x.shape[1:])


def _fold(x: jax.Array, groups: int, tile: int) -> jax.Array:
  """Turns [T, H, C] into [n, K, G * tile, C]: heads of a group become rows."""
  return rearrange(_split(x, tile), "n t (k g) c -> n k (g t) c", g=groups)


def _unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Inverts `_fold`, without the padding."""
  length, heads, _ = shape
  groups = heads // x.shape[1]
  return rearrange(x, "n k (g t) c -> (n t) (k g) c", g=groups)[:length]


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
  """Turns [n, K, tile, C] into [S, K, C], in the dtype of `like`."""
  x = rearrange(x, "n k t c -> (n t) k c")
  return x[: like.shape[0]].astype(like.dtype)
