"""Which tiles meet: the grid of a kernel as a list, from segment ids.

A kernel does not walk over all query tiles x key tiles. It walks over a list
of the pairs that share a segment, made here on the device and prefetched into
scalar memory. With query tiles of segments 1 1 2 and key tiles of 1 2:

    tiles   query 0  query 1  query 2        visits  (0, 0) (1, 0) (2, 1)
    key 0      x        x
    key 1                        x

Ids rise along a row, so whether two tiles share a segment is read from their
least and largest id. For ids in another order some visits find nothing, which
costs time and no correctness: the masks inside are exact.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# One visit in 32 bits: key tile, query tile, flags.
TILE_BITS = 13
MOST_TILES = 1 << TILE_BITS
FIRST = 1 << 26  # of this output tile
LAST = 1 << 27
WHOLE = 1 << 28  # the keys are all of one segment: only rows need a mask
PARTLY = 1 << 29  # keys of several segments, or padding
NEW = 1 << 30  # WHOLE, and the tile before this one lacks that segment
_NOTHING = jnp.iinfo(jnp.int32).max


class Ranges(NamedTuple):
  """Segment ids of each tile."""

  low: jax.Array  # int32 [B, n]: the least; a huge number where all is padding
  high: jax.Array  # int32 [B, n]: the largest; 0 where all is padding
  only: jax.Array  # int32 [B, n]: the id that all of it has, or 0

  def meets(self, other: "Ranges") -> jax.Array:
    """bool [B, n, m]: might they share a segment?"""
    return (self.low[:, :, None] <= other.high[:, None]) & (
      other.low[:, None] <= self.high[:, :, None]
    )


class Visits(NamedTuple):
  """The grid and what the kernel asks about it, for scalar memory."""

  code: jax.Array  # int32 [B, most]
  count: jax.Array  # int32 []: the longest list of all rows
  query: Ranges  # by query tile
  key: Ranges  # by key chunk

  def scalars(self) -> tuple[jax.Array, ...]:
    """Flat, since scalar memory pads two-dimensional arrays."""
    ranges = (self.query.low, self.query.high, *self.key)
    return tuple(x.reshape(-1) for x in (self.code, *ranges))


def key_tile(code: jax.Array) -> jax.Array:
  """Key tile of a visit."""
  return code & (MOST_TILES - 1)


def query_tile(code: jax.Array) -> jax.Array:
  """Query tile of a visit."""
  return (code >> TILE_BITS) & (MOST_TILES - 1)


class Blocks(NamedTuple):
  """Index maps of a grid (row, KV head, visit), for block specs."""

  query: Callable  # of arrays [B, K, query tiles, ., rows]
  query_segment: Callable  # [B, query tiles, 1, rows]
  key: Callable  # [B, S, K * C]
  key_segment: Callable  # [B, chunks, 1, chunk]


def blocks(most: int) -> Blocks:
  """Where a visit's tiles lie; `most` is the length of a row's list."""

  def query(b, head, n, code, *_):
    return b, head, query_tile(code[b * most + n]), 0, 0

  def query_segment(b, _, n, code, *__):
    return b, query_tile(code[b * most + n]), 0, 0

  def key(b, head, n, code, *_):
    return b, key_tile(code[b * most + n]), head

  def key_segment(b, _, n, code, *__):
    return b, key_tile(code[b * most + n]), 0, 0

  return Blocks(query, query_segment, key, key_segment)


def has(code: jax.Array, flags: int) -> jax.Array:
  """Has the visit one of these flags?"""
  return (code & flags) != 0


def plan(
  query_segment: jax.Array,
  key_segment: jax.Array,
  *,
  query_tiles: int,
  key_tiles: int,
  chunks: int,
  by_key: bool,
) -> Visits:
  """Lists the visits of each row.

  Args:
    query_segment: int32 [B, T], T a multiple of query_tiles.
    key_segment: int32 [B, S], S a multiple of key_tiles * chunks.
    query_tiles, key_tiles: how many there are.
    chunks: of a key tile; ranges of keys are told by chunk.
    by_key: visits of a key tile are neighbours; else those of a query tile.
      Every tile of that kind has a visit, if only to write zeros.
  """
  query = _ranges(query_segment, query_tiles)
  key = _ranges(key_segment, key_tiles * chunks)
  tile = _ranges(key_segment, key_tiles)
  meets = query.meets(key)
  meets = meets.reshape(*meets.shape[:2], key_tiles, chunks).any(-1)
  before = jnp.arange(key_tiles)[None] - 1
  new = (before < 0) | ~(
    (tile.low[:, before[0]] <= tile.only)
    & (tile.only <= tile.high[:, before[0]])
  )
  kind = jnp.where(tile.only > 0, WHOLE + jnp.where(new, NEW, 0), PARTLY)
  pair = (
    jnp.arange(query_tiles)[None, :, None] * MOST_TILES
    + jnp.arange(key_tiles)[None, None]
  )
  code = pair + kind[:, None]
  if by_key:
    code, pair, meets = (jnp.swapaxes(x, 1, 2) for x in (code, pair, meets))
  # A tile that meets nothing is visited once, and nothing is computed.
  order = jnp.arange(meets.shape[2])[None, None]
  alone = ~meets.any(-1, keepdims=True) & (order == 0)
  code = jnp.where(alone, pair, code)
  listed = meets | alone
  first = jnp.argmax(listed, -1, keepdims=True)
  last = meets.shape[2] - 1 - jnp.argmax(listed[..., ::-1], -1, keepdims=True)
  code += jnp.where(order == first, FIRST, 0)
  code += jnp.where(order == last, LAST, 0)
  return _compact(code, listed, query, key)


def _compact(code, listed, query, key) -> Visits:
  """The listed codes to the front; after them the last one, without flags."""
  rows, most = code.shape[0], code.shape[1] * code.shape[2]
  code, listed = code.reshape(rows, most), listed.reshape(rows, most)
  count = listed.sum(-1, dtype=jnp.int32)
  # A scatter, not a sort: sorting so much takes the compiler minutes.
  place = jnp.where(listed, jnp.cumsum(listed, -1) - 1, most)
  row = jnp.arange(rows)[:, None]
  code = jnp.zeros_like(code).at[row, place].set(code, mode="drop")
  last = jnp.take_along_axis(code, count[:, None] - 1, 1) & (FIRST - 1)
  code = jnp.where(jnp.arange(most)[None] < count[:, None], code, last)
  return Visits(code.astype(jnp.int32), count.max(), query, key)


def _ranges(segment, tiles) -> Ranges:
  ids = segment.reshape(segment.shape[0], tiles, -1)
  high = ids.max(-1)
  return Ranges(
    low=jnp.where(ids > 0, ids, _NOTHING).min(-1),
    high=high,
    only=jnp.where(ids.min(-1) == high, high, 0),
  )
