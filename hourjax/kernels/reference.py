"""Tiled attention in plain JAX: the reference, and the CPU's implementation.

The online softmax of FlashAttention (arXiv 2205.14135) over tiles of queries
and keys, with its own gradient:

    for each row of the batch, or a few short ones together:
      for each query tile i:
        top, total, acc = NEVER, 0, 0
        for each key tile j that shares a segment with i:
          score  = q[i] k[j]^T, masked          [R * K, G * tile_q, tile_k]
          raise top to the row's maximum, shrink total and acc by exp(old - new)
          total += sum of exp(score - top),  acc += exp(score - top) v[j]
        out = acc / total,  lse = top + log(total)

The backward pass computes the scores of each tile anew, and the weights from
the saved log-sum-exp, so memory grows with T + S and never with T x S. Tiles
that share no segment are skipped, so a row packed with short samples costs
about the sum of its T_i x S_i. A tile of one segment alone, as most are of a
long memory, is not masked in the forward pass: masking writes and reads all of
its scores again.

On a CPU each operation of a tile is split over the cores, and costs some
microseconds to start. So R short rows are computed together, as many as make
half of the scores of one large tile: a row of 200 positions alone would keep
the cores waiting for one another.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from hourjax.kernels.constants import NO_PART

QUERY_TILE = 512
KEY_TILE = 512  # with the scores beside it, this fits into a core's cache
_ALIGNED = 16  # float32 numbers of a vector register (AVX-512) or cache line
_NEVER = -1e30  # finite, so that exp(_NEVER - _NEVER) stays a number
_Arrays = TypeVar("_Arrays")  # a tuple of arrays
_Carry = TypeVar("_Carry")


class _Tiles(NamedTuple):
  """Holds R rows of the batch, cut into n_q query and n_k key tiles.

  Attributes:
    q: [n_q, R * K, G * tile_q, C].
    k: [n_k, R * K, tile_k, C].
    v: [n_k, R * K, tile_k, C].
    query_segment: [n_q, R, tile_q].
    key_segment: [n_k, R, tile_k].
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
  return _map_rows(
    lambda *rows: _forward_rows(*rows, causal=causal, out_dtype=out_dtype),
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
  return _map_rows(
    lambda *rows: _backward_rows(*rows, causal=causal),
    _here(q, k, v, query_segment, key_segment, lse, delta, d_out),
  )


def _here(*operands: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the operands behind a barrier, which keeps masks out of memory.

  Differentiating a scan over layers moves out of it what does not depend on
  its carry: here the masks of all tiles, together T x S. The barrier makes the
  segment ids, and so the masks, depend on q.
  """
  return jax.lax.optimization_barrier(operands)


def _map_rows(
  function: Callable[..., _Arrays], operands: tuple[jax.Array, ...]
) -> _Arrays:
  """Calls `function` with a few rows of the batch at a time.

  Not with `vmap`, which would turn the `switch` that skips a tile into a
  `select`, which computes it.
  """
  q, k = operands[:2]
  together = _rows_together(q.shape[0], q.shape[1], k.shape[1])
  if together == q.shape[0]:
    return function(*operands)
  parts = tuple(x.reshape(-1, together, *x.shape[1:]) for x in operands)
  results = jax.lax.map(lambda part: function(*part), parts)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _rows_together(rows: int, queries: int, keys: int) -> int:
  """Returns how many rows are computed at a time, a divisor of `rows`.

  Their scores are at most half of those of one tile of full size: twice as many
  rows left the caches, and took longer than alone. Rows of more than two tiles
  of keys are computed alone: together they could skip only the tiles that none
  of them needs. 24 rows of 200 positions are eight times 3.
  """
  if keys > 2 * KEY_TILE:
    return 1
  area = _tile(queries, QUERY_TILE) * _tile(keys, KEY_TILE, _ALIGNED)
  most = max(1, QUERY_TILE * KEY_TILE // 2 // area)
  return max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)


def _forward_rows(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  *,
  causal: bool,
  out_dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
  """Computes out [R, T, H, C] and lse [R, T, H] of R rows."""
  tiles = _cut(q, k, v, query_segment, key_segment)
  n_q, kv_heads, rows, head_dim = tiles.q.shape

  def one_query_tile(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    def add(
      masked: bool, carry: tuple[jax.Array, jax.Array, jax.Array], j: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      """Adds key tile j to the maximum, the sum and the weighted values."""
      top, total, acc = carry
      score = _scores(tiles, i, j, causal, masked)
      new_top = jnp.maximum(top, score.max(-1))
      weight = _weights(score, new_top, masked)
      shrink = jnp.exp(top - new_top)
      total = total * shrink + weight.sum(-1)
      acc = acc * shrink[..., None] + _dot(
        "kts,ksc->ktc", weight.astype(v.dtype), tiles.v[j]
      )
      return new_top, total, acc

    start = (
      jnp.full((kv_heads, rows), _NEVER, jnp.float32),
      jnp.zeros((kv_heads, rows), jnp.float32),
      jnp.zeros((kv_heads, rows, head_dim), jnp.float32),
    )
    masked, whole = (functools.partial(add, mask) for mask in (True, False))
    top, total, acc = _over_keys(tiles, i, causal, masked, start, whole)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(safe), NO_PART)
    return (acc / safe[..., None]).astype(out_dtype), lse[..., None]

  out, lse = jax.lax.map(one_query_tile, jnp.arange(n_q))
  return _unfold(out, q.shape), _unfold(lse, q.shape)[..., 0]


def _backward_rows(
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
  """Computes dq [R, T, H, C] and dk, dv [R, S, K, C] of R rows."""
  tiles = _cut(q, k, v, query_segment, key_segment)
  scale = q.shape[-1] ** -0.5
  groups, tile = q.shape[2] // k.shape[2], tiles.query_segment.shape[2]
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
      weight = _weights(_scores(tiles, i, j, causal, True), lse[i], True)
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
    # No branch for whole tiles: a `switch` that carries dk and dv took 16 to
    # 26 % more CPU time than the masks that it saves (jaxlib 0.10.2).
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
  add_whole: Callable[[_Carry, jax.Array], _Carry] | None = None,
) -> _Carry:
  """Calls `add` with the carry and each key tile that query tile i can see.

  `add_whole`, if there is one, is called instead where every query sees every
  key of the tile.
  """
  query = tiles.query_segment[i]
  tile_q, tile_k = query.shape[1], tiles.key_segment.shape[2]
  high = jnp.max(query, axis=1, keepdims=True)
  low = jnp.where(query > 0, query, jnp.iinfo(query.dtype).max)
  low = jnp.min(low, axis=1, keepdims=True)
  # Not where the tile holds padding, whose id is 0.
  one_segment = jnp.all(query == high) & jnp.all(high > 0)

  def step(carry: _Carry, j: jax.Array) -> tuple[_Carry, None]:
    key = tiles.key_segment[j]
    # Ids rise along a row, so overlapping ranges mean shared segments; for
    # ids in another order this only skips less.
    shared = jnp.any((key >= low) & (key <= high) & (key > 0))
    if causal:
      shared &= j * tile_k < (i + 1) * tile_q
    if add_whole is None:
      return jax.lax.cond(shared, lambda c: add(c, j), lambda c: c, carry), None
    whole = one_segment & jnp.all(key == high)
    if causal:
      whole &= (j + 1) * tile_k <= i * tile_q + 1
    carry = jax.lax.switch(
      shared.astype(jnp.int32) + (shared & whole).astype(jnp.int32),
      (lambda c: c, lambda c: add(c, j), lambda c: add_whole(c, j)),
      carry,
    )
    return carry, None

  n_k = tiles.key_segment.shape[0]
  return jax.lax.scan(step, start, jnp.arange(n_k))[0]


def _scores(
  tiles: _Tiles, i: jax.Array, j: jax.Array, causal: bool, masked: bool
) -> jax.Array:
  """Returns the scaled scores [R * K, G * tile_q, tile_k], float32."""
  q, k = tiles.q[i], tiles.k[j]
  query, key = tiles.query_segment[i], tiles.key_segment[j]
  score = _dot("ktc,ksc->kts", q, k) * q.shape[-1] ** -0.5
  if not masked:
    return score
  (rows, tile_q), tile_k = query.shape, key.shape[1]
  allowed = (query[:, :, None] == key[:, None]) & (key > 0)[:, None]
  if causal:
    query_index = i * tile_q + jnp.arange(tile_q)
    key_index = j * tile_k + jnp.arange(tile_k)
    allowed &= (key_index[None, :] <= query_index[:, None])[None]
  by_row = score.reshape(rows, -1, tile_q, tile_k)
  return jnp.where(allowed[:, None], by_row, _NEVER).reshape(score.shape)


def _weights(score: jax.Array, top: jax.Array, masked: bool) -> jax.Array:
  """Returns exp(score - top); 0 for masked scores, also if top is masked."""
  weight = jnp.exp(score - top[..., None])
  return jnp.where(score == _NEVER, 0.0, weight) if masked else weight


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
  """Cuts R rows of the batch into tiles."""
  groups = q.shape[2] // k.shape[2]
  tile_q = _tile(q.shape[1], QUERY_TILE)
  tile_k = _tile(k.shape[1], KEY_TILE, _ALIGNED)
  return _Tiles(
    q=_fold(q, groups, tile_q),
    k=rearrange(_split(k, tile_k), "n r t k c -> n (r k) t c"),
    v=rearrange(_split(v, tile_k), "n r t k c -> n (r k) t c"),
    query_segment=_split(query_segment, tile_q),
    key_segment=_split(key_segment, tile_k),
  )


def _tile(length: int, largest: int, step: int = 1) -> int:
  """Returns the smallest tile with which no more tiles are needed.

  600 positions in tiles of at most 512 are two tiles of 300; in steps of 16,
  two tiles of 304.
  """
  tile = -(-length // -(-length // largest))
  return min(-(-tile // step) * step, largest)


def _split(x: jax.Array, tile: int) -> jax.Array:
  """Cuts [R, N, ...] into [ceil(N / tile), R, tile, ...], padded with zeros."""
  extra = -x.shape[1] % tile
  x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
  x = x.reshape(x.shape[0], -1, tile, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _fold(x: jax.Array, groups: int, tile: int) -> jax.Array:
  """Turns [R, T, H, C] into [n, R * K, G * tile, C].

  Query heads of one KV head become rows of its tiles.
  """
  return rearrange(
    _split(x, tile), "n r t (k g) c -> n (r k) (g t) c", g=groups
  )


def _unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Inverts `_fold`, without the padding."""
  rows, length, heads, _ = shape
  groups = heads * rows // x.shape[1]
  x = rearrange(x, "n (r k) (g t) c -> r (n t) (k g) c", r=rows, g=groups)
  return x[:, :length]


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
  """Turns [n, R * K, tile, C] into [R, S, K, C], in the dtype of `like`."""
  x = rearrange(x, "n (r k) t c -> r (n t) k c", r=like.shape[0])
  return x[:, : like.shape[1]].astype(like.dtype)
