"""The cost of packing: cycles of a row that holds several videos.

The block schedule of the kernels is made for the row. A block is one pair of a
query tile and a key tile (`kernels.tpu.block_schedule`). Its cost is the cycles
of the pieces of the kernel that it runs.
"""

import collections
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hourjax.benchmarks import schedule
from hourjax.benchmarks.schedule import (
  Backward,
  CausalBackward,
  CausalForward,
  Regions,
)
from hourjax.kernels.tpu import block_schedule
from hourjax.kernels.tpu.call import split
from hourjax.kernels.tpu.tiles import AttentionTiles, Shape, cut

FRAME = 65  # memory tokens of a frame: 8 x 8 and a newline


class Row(NamedTuple):
  """Describes a row of the batch in which all videos are of one size.

  Attributes:
    videos: how many videos there are.
    queries: queries of each video.
    keys: memory tokens of each video.
    query_slots: queries of the row, padding included.
    key_slots: memory tokens of the row, padding included.
  """

  videos: int
  queries: int
  keys: int
  query_slots: int
  key_slots: int

  def segments(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns segment ids of queries `[T]` and of keys `[S]`.

    They are 1, 2, ... for the videos, and then 0 for padding.
    """
    ids = np.arange(1, self.videos + 1, dtype=np.int32)

    def padded(each: int, slots: int) -> np.ndarray:
      return np.pad(np.repeat(ids, each), (0, slots - self.videos * each))

    return (
      padded(self.queries, self.query_slots),
      padded(self.keys, self.key_slots),
    )

  def alone(self) -> "Row":
    """Returns the smallest row that holds one of the videos."""
    return Row(1, self.queries, self.keys, self.queries, self.keys)


def packed_row(queries: int, keys: int, videos: int = 6) -> Row:
  """Returns a row of videos of ten minutes, or shorter where `keys` are fewer.

  Args:
    queries: queries of the row.
    keys: memory tokens of the row.
    videos: how many videos it holds.
  """
  frames = min(600, keys // FRAME // videos)
  return Row(videos, queries // videos, frames * FRAME, queries, keys)


class Call(NamedTuple):
  """Describes a kernel on one chip.

  Attributes:
    regions: the pieces of the kernel, as compiled with the chip's tiles.
    generation: the generation of the chip.
    tiles: the tiles and limits of the kernels.
    heads: query heads of the arrays.
    kv_heads: key and value heads of the arrays.
    dim: width of a head.
  """

  regions: Regions
  generation: str
  tiles: AttentionTiles
  heads: int
  kv_heads: int
  dim: int

  @property
  def by_key(self) -> bool:
    """Returns whether it goes key tile by key tile, as the backward kernel."""
    return isinstance(self.regions, Backward | CausalBackward)

  @property
  def causal(self) -> bool:
    """Returns whether a query sees only keys up to its own index."""
    return isinstance(self.regions, CausalForward | CausalBackward)

  def cut(self, queries: int, keys: int) -> tuple[int, Shape]:
    """Returns how a call of these sizes is cut.

    Args:
      queries: queries of the call.
      keys: keys of the call.

    Returns:
      The number of parts of the queries, for each of which all keys are read
      once, and how one part is cut into tiles.
    """
    if self.by_key:
      q, k = (
        jax.ShapeDtypeStruct((1, length, heads, self.dim), jnp.bfloat16)
        for length, heads in ((queries, self.heads), (keys, self.kv_heads))
      )
      return split(self.tiles, q, k)
    groups = self.heads // self.kv_heads
    return 1, cut(
      self.tiles.forward,
      queries=queries,
      keys=keys,
      groups=groups,
      dim=self.dim,
    )


def packed_figures(call: Call, row: Row) -> dict[str, Any]:
  """Compares a packed row with its videos in calls of their own.

  Args:
    call: the kernel.
    row: the packed row.

  Returns:
    `cycles` of one core for the row; `ratio_to_sum_of_parts`, over one call
    for each video; `share_of_useful_peak`, where only pairs of a query and a
    key of its video are useful; and `blocks`, the counts of `count_blocks` for
    the row, for one KV head.
  """
  counted = []
  for case in (row, row.alone()):
    parts, shape = call.cut(case.query_slots, case.key_slots)
    counts = count_blocks(case, shape, parts=parts, by_key=call.by_key)
    tile = shape._replace(query_tiles=0, key_tiles=0)
    counted.append((tile, counts))
  (tile, counts), (smaller, part_counts) = counted
  if tile != smaller:
    return {"missing": "a video of the row is smaller than one tile"}
  cycles, part = (
    block_cycles(each, call.regions, call.generation) * call.kv_heads
    for each in (counts, part_counts)
  )
  flops = (10 if call.by_key else 4) * call.dim * call.heads
  flops *= row.videos * row.queries * row.keys
  share = schedule.share_of_peak(flops, cycles, call.generation)
  return {
    "cycles": cycles,
    "ratio_to_sum_of_parts": round(cycles / (row.videos * part), 3),
    "share_of_useful_peak": round(share, 3),
    "blocks": counts,
  }


def count_blocks(
  row: Row, shape: Shape, *, parts: int, by_key: bool, causal: bool = False
) -> dict[str, int]:
  """Counts how often the blocks of a row run each piece of the kernel.

  Args:
    row: the row.
    shape: how a part of it is cut into tiles.
    parts: parts of its queries.
    by_key: whether the kernel goes key tile by key tile.
    causal: whether a query sees only keys up to its own index.

  Returns:
    Counts by the names of the fields of `schedule.Forward`, or of
    `schedule.CausalForward`: "always" counts the blocks, "chunk" the chunks of
    those blocks that go chunk by chunk.
  """
  query, key = row.segments()
  length = shape.query_tiles * shape.queries
  query = np.pad(query, (0, parts * length - len(query)))
  key_parts = -(
    -shape.key_tiles // block_schedule.MOST_TILES
  )  # as many as have names
  shape = shape._replace(key_tiles=-(-shape.key_tiles // key_parts))
  keys = key_parts * shape.key_tiles * shape.keys
  key = np.pad(key, (0, keys - len(key))).reshape(key_parts, -1)
  plan = jax.jit(
    functools.partial(
      block_schedule.make_schedule,
      query_tiles=shape.query_tiles,
      key_tiles=shape.key_tiles,
      chunks=shape.chunks,
      by_key=by_key,
    )
  )
  counts = collections.Counter()
  queries = enumerate(query.reshape(parts, length))
  for (i, ids), (j, key_ids) in itertools.product(queries, enumerate(key)):
    offset = i * length - j * len(key_ids) if causal else None
    grid = plan(ids[None], key_ids[None], offset=offset)
    counts += _count(grid, shape, causal)
  return dict(counts)


def _count(
  grid: block_schedule.BlockSchedule, shape: Shape, causal: bool
) -> collections.Counter:
  """Counts the pieces that one block schedule runs; see `count_blocks`."""
  codes = grid.blocks[0, : int(grid.count)]
  counts = collections.Counter(always=len(codes))
  for name in ("FIRST", "LAST", "WHOLE", "NEW"):
    listed = block_schedule.has(codes, getattr(block_schedule, name))
    counts[name.lower()] = int(listed.sum())
  meets = np.asarray(grid.query.meets(grid.key))[0]
  only = np.asarray(grid.key.only)[0]
  # Index of each tile's first query, counted from each chunk's first key.
  first = np.arange(len(meets))[:, None] * shape.queries
  first = first - np.arange(meets.shape[1]) * shape.chunk
  if causal:
    first += int(grid.offset[0])
    meets = meets & (first + shape.queries > 0)
  diagonal = causal & (first + 1 < shape.chunk)
  partly = codes[block_schedule.has(codes, block_schedule.PARTLY)]
  queries, keys = (
    block_schedule.query_tile(partly),
    block_schedule.key_tile(partly),
  )
  for query, key in zip(np.asarray(queries), np.asarray(keys)):
    of_tile = np.arange(shape.chunks) + key * shape.chunks
    met = of_tile[meets[query, of_tile]]
    one, on = only[met] > 0, diagonal[query, met]
    counts["chunk"] += shape.chunks
    counts["uniform"] += int((one & ~on).sum())
    counts["diagonal"] += int((one & on).sum())
    counts["mixed"] += int((~one).sum())
  return counts


def block_cycles(counts: dict[str, int], regions: Regions, chip: str) -> int:
  """Returns the cycles of a row's blocks, for one KV head.

  Args:
    counts: what `count_blocks` returned.
    regions: the pieces of the kernel.
    chip: the generation.
  """
  # The backward kernel has one branch for all chunks of a tile of several
  # segments, and always masks.
  if isinstance(regions, Backward):
    mixed = counts.get("mixed", 0) + counts.get("uniform", 0)
    counts = counts | {"mixed": mixed}
  return sum(
    counts.get(name, 0) * schedule.total(found, chip)
    for name, found in regions._asdict().items()
  )
