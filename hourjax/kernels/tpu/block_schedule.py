"""The block schedule: which query tiles meet which key tiles, in which order.

A kernel does not walk over all query tiles x key tiles. Its grid is a list of
blocks, made here on the device from the segment ids and prefetched into scalar
memory. A block is one query tile and one key tile that share a segment. With
query tiles of the segments 1, 1 and 2, and key tiles of 1 and 2:

             query tile 0   1   2
    key tile 0          x   x               forward schedule, as (query, key):
    key tile 1                  x             (0, 0) (1, 0) (2, 1)

The forward kernel takes all blocks of a query tile one after the other, and
the backward kernel all blocks of a key tile, since that is the tile whose sums
each of them holds in VMEM.

In causal attention no block lies above the diagonal, and those that it crosses
are PARTLY.

Ids rise along a row, so whether two tiles share a segment is read from their
least and largest id. Where ids are in another order, some blocks are scheduled
in which no query meets a key. That costs time and changes no result: the masks
inside the kernels are exact.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# A block is one int32: 13 bits key tile, 13 bits query tile, then flags.
TILE_BITS = 13
MOST_TILES = 1 << TILE_BITS
FIRST = 1 << 26  # the first block of its output tile: sums are set to zero
LAST = 1 << 27  # the last one: sums are written out
WHOLE = 1 << 28  # all keys are of one segment, so that only rows need a mask
PARTLY = 1 << 29  # keys of several segments, padding, or the causal diagonal
NEW = 1 << 30  # WHOLE, and the key tile before this one lacks the segment
_NOTHING = jnp.iinfo(jnp.int32).max  # the least id of a tile of padding


class SegmentRanges(NamedTuple):
  """Holds which segment ids each tile contains.

  Attributes:
    low: int32 [B, n], the least id; a huge number where all is padding.
    high: int32 [B, n], the largest id; 0 where all is padding.
    only: int32 [B, n], the id that all positions have; 0 if they differ.
  """

  low: jax.Array
  high: jax.Array
  only: jax.Array

  def meets(self, other: "SegmentRanges") -> jax.Array:
    """Returns whether tiles might share a segment, bool [B, n, m]."""
    return (self.low[:, :, None] <= other.high[:, None]) & (
      other.low[:, None] <= self.high[:, :, None]
    )


class BlockSchedule(NamedTuple):
  """Holds the grid of a kernel, and what the kernel asks about its tiles.

  Attributes:
    blocks: int32 [B, most], the blocks of each row in order; the places after
      its last block repeat that block without flags, so that nothing is
      computed there and no tile is fetched anew.
    count: int32 [], the number of blocks of the row that has the most.
    offset: int32 [1], the index of the first query in the row less that of
      the first key; only causal kernels read it.
    query: ranges of the query tiles.
    key: ranges of the key chunks.
  """

  blocks: jax.Array
  count: jax.Array
  offset: jax.Array
  query: SegmentRanges
  key: SegmentRanges

  def scalars(self) -> tuple[jax.Array, ...]:
    """Returns what is prefetched into scalar memory, in the kernels' order.

    Each array is flat: scalar memory pads the last dimension of an array of
    two dimensions to a whole register.
    """
    ranges = (self.query.low, self.query.high, *self.key)
    return tuple(x.reshape(-1) for x in (self.blocks, self.offset, *ranges))


def key_tile(block: jax.Array) -> jax.Array:
  """Returns the number of a block's key tile."""
  return block & (MOST_TILES - 1)


def query_tile(block: jax.Array) -> jax.Array:
  """Returns the number of a block's query tile."""
  return (block >> TILE_BITS) & (MOST_TILES - 1)


def has(block: jax.Array, flags: int) -> jax.Array:
  """Returns whether a block has one of these flags."""
  return (block & flags) != 0


class IndexMaps(NamedTuple):
  """Holds index maps of the grid (row, KV head, block), for block specs.

  Attributes:
    query: of arrays [B, K, query tiles, ., rows].
    query_segment: of arrays [B, query tiles, 1, rows].
    key: of arrays [B, S, K * C].
    key_segment: of arrays [B, chunks, 1, chunk].
    place: of the array [1, rows] that all tiles share.
  """

  query: Callable[..., tuple]
  query_segment: Callable[..., tuple]
  key: Callable[..., tuple]
  key_segment: Callable[..., tuple]
  place: Callable[..., tuple]


def index_maps(most: int) -> IndexMaps:
  """Returns the functions by which Pallas finds the tiles of a block.

  Args:
    most: blocks for which each row of the schedule has room.
  """

  # Pallas hands over the grid's indices, then every prefetched array; the
  # first of these is the schedule, flat: block n of row b is at b * most + n.
  def query(
    b: jax.Array, head: jax.Array, n: jax.Array, blocks: jax.Ref, *_
  ) -> tuple:
    return b, head, query_tile(blocks[b * most + n]), 0, 0

  def query_segment(
    b: jax.Array, _: jax.Array, n: jax.Array, blocks: jax.Ref, *__
  ) -> tuple:
    return b, query_tile(blocks[b * most + n]), 0, 0

  def key(
    b: jax.Array, head: jax.Array, n: jax.Array, blocks: jax.Ref, *_
  ) -> tuple:
    return b, key_tile(blocks[b * most + n]), head

  def key_segment(
    b: jax.Array, _: jax.Array, n: jax.Array, blocks: jax.Ref, *__
  ) -> tuple:
    return b, key_tile(blocks[b * most + n]), 0, 0

  def place(*_) -> tuple:
    return 0, 0

  return IndexMaps(query, query_segment, key, key_segment, place)


def make_schedule(
  query_segment: jax.Array,
  key_segment: jax.Array,
  *,
  query_tiles: int,
  key_tiles: int,
  chunks: int,
  by_key: bool,
  offset: jax.typing.ArrayLike | None = None,
) -> BlockSchedule:
  """Lists the blocks of each row.

  Args:
    query_segment: int32 [B, T], T a multiple of query_tiles.
    key_segment: int32 [B, S], S a multiple of key_tiles * chunks.
    query_tiles: number of query tiles.
    key_tiles: number of key tiles.
    chunks: chunks of a key tile; ranges of keys are kept by chunk.
    by_key: True lists the blocks key tile by key tile, False query tile by
      query tile. Each of these tiles has at least one block, if only to write
      zeros.
    offset: int32 [], for causal attention: the index of the first query in
      the row less that of the first key. None if a query sees keys on both of
      its sides.
  """
  query = _ranges(query_segment, query_tiles)
  key = _ranges(key_segment, key_tiles * chunks)
  tile = _ranges(key_segment, key_tiles)
  # By chunk, which is exact in more cases than by tile: a tile of the segments
  # 1 and 3 does not meet a query of 2 if a chunk boundary parts them.
  meets = query.meets(key)
  whole = (tile.only > 0)[:, None]
  if offset is not None:
    first = offset + _starts(query_segment, query_tiles)[:, None]
    after = offset + _starts(query_segment, query_tiles, after=1)[:, None]
    chunk = _starts(key_segment, key_tiles * chunks)[None]
    meets &= (chunk < after)[None]
    # The last key of the tile does not lie after the first query.
    end = _starts(key_segment, key_tiles, after=1)[None]
    whole &= (end <= first + 1)[None]
  meets = meets.reshape(*meets.shape[:2], key_tiles, chunks).any(-1)
  # NEW where the key tile before has no key of this segment. For key tile 0
  # `before` is -1, which indexes the last tile; `before < 0` overrides it.
  before = jnp.arange(key_tiles)[None] - 1
  new = (before < 0) | ~(
    (tile.low[:, before[0]] <= tile.only)
    & (tile.only <= tile.high[:, before[0]])
  )
  kind = jnp.where(whole, WHOLE + jnp.where(new, NEW, 0)[:, None], PARTLY)
  pair = (
    jnp.arange(query_tiles)[None, :, None] * MOST_TILES
    + jnp.arange(key_tiles)[None, None]
  )
  blocks = pair + kind
  if by_key:
    blocks, pair, meets = (jnp.swapaxes(x, 1, 2) for x in (blocks, pair, meets))
  # An output tile that meets nothing still has to be written. It gets one
  # block without WHOLE and PARTLY, in which nothing is computed.
  order = jnp.arange(meets.shape[2])[None, None]
  alone = ~meets.any(-1, keepdims=True) & (order == 0)
  blocks = jnp.where(alone, pair, blocks)
  listed = meets | alone
  first = jnp.argmax(listed, -1, keepdims=True)
  last = meets.shape[2] - 1 - jnp.argmax(listed[..., ::-1], -1, keepdims=True)
  blocks += jnp.where(order == first, FIRST, 0)
  blocks += jnp.where(order == last, LAST, 0)
  offset = jnp.asarray([0 if offset is None else offset], jnp.int32)
  return _compact(blocks, listed, offset, query, key)


def _starts(segment: jax.Array, tiles: int, after: int = 0) -> jax.Array:
  """Returns the index at which each of `tiles` tiles of [B, N] starts.

  Args:
    segment: ids of the positions.
    tiles: number of tiles.
    after: 1 returns the index after each tile instead.
  """
  return (jnp.arange(tiles) + after) * (segment.shape[1] // tiles)


def _compact(
  blocks: jax.Array,
  listed: jax.Array,
  offset: jax.Array,
  query: SegmentRanges,
  key: SegmentRanges,
) -> BlockSchedule:
  """Moves the listed blocks to the front, and repeats the last one after them.

  Args:
    blocks: int32 [B, n, m], every pair of tiles.
    listed: bool [B, n, m], which of them are scheduled.
    offset: as in `BlockSchedule`.
    query: ranges of the query tiles.
    key: ranges of the key chunks.
  """
  rows, most = blocks.shape[0], blocks.shape[1] * blocks.shape[2]
  blocks, listed = blocks.reshape(rows, most), listed.reshape(rows, most)
  count = listed.sum(-1, dtype=jnp.int32)
  # A scatter, not a sort: sorting so much takes the compiler minutes.
  place = jnp.where(listed, jnp.cumsum(listed, -1) - 1, most)
  row = jnp.arange(rows)[:, None]
  blocks = jnp.zeros_like(blocks).at[row, place].set(blocks, mode="drop")
  # The grid is as long as the longest row's list. The others repeat their last
  # block: Pallas fetches no tile whose index stays, and without flags no
  # branch of the kernel runs.
  last = jnp.take_along_axis(blocks, count[:, None] - 1, 1) & (FIRST - 1)
  blocks = jnp.where(jnp.arange(most)[None] < count[:, None], blocks, last)
  blocks = blocks.astype(jnp.int32)
  return BlockSchedule(blocks, count.max(), offset, query, key)


def _ranges(segment: jax.Array, tiles: int) -> SegmentRanges:
  """Returns the ranges of ids [B, N], cut into `tiles` tiles."""
  ids = segment.reshape(segment.shape[0], tiles, -1)
  high = ids.max(-1)
  return SegmentRanges(
    low=jnp.where(ids > 0, ids, _NOTHING).min(-1),
    high=high,
    only=jnp.where(ids.min(-1) == high, high, 0),
  )
