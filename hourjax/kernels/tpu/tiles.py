"""Tiles of the TPU kernels: what they are, and how a call is cut into them.

The sizes for each generation stand in `hourjax.parallel.chips`, and are handed
to the attention call. `python -m hourjax.bench attention --tune` compiles
candidates for a chip and prints the best ones.

                         rows (G heads x queries)
                    <------------------------------->
                  ^ +-------+-------+-------+-------+ ^
                  | | unit  |       |       |       | | chunk
       keys of    | +-------+-------+-------+-------+ v
       one block  | |       |       |       |       |
                  v +-------+-------+-------+-------+

A block, the scores of one query tile and one key tile, is `keys` x `rows`. It
is computed in units of `chunk` x `unit`: row by row of this figure, the
scores of the next unit being multiplied while the softmax of this one runs.
"""

import math
from typing import NamedTuple

from hourjax.kernels.constants import LANES

MIB = 1 << 20
# Bytes of scalar memory for the block schedule: half of the 1 MiB that exists,
# the rest of which is left to the compiler.
SMEM = 512 << 10


class Tiles(NamedTuple):
  """Holds the sizes of a kernel's tiles and of the units within a block.

  Attributes:
    rows: score rows of a query tile, which are its columns in memory: the
      queries of all G heads of a KV group side by side, so that a key that is
      read from HBM serves all of them.
    keys: keys of a key tile.
    chunk: keys of a unit; divides `keys`.
    unit: rows of a unit; best a divisor of `rows`.
  """

  rows: int
  keys: int
  chunk: int
  unit: int


class AttentionTiles(NamedTuple):
  """Holds the tiles of both kernels, and the memory that they may take.

  Attributes:
    forward: tiles of the forward kernel.
    backward: tiles of the backward kernel.
    vmem: bytes of a core's VMEM that a kernel may take.
  """

  forward: Tiles
  backward: Tiles
  vmem: int


class Shape(NamedTuple):
  """Describes one call that is cut into tiles.

  Attributes:
    groups: G, query heads of a KV head.
    queries: positions of a query tile.
    query_tiles: number of query tiles.
    rows: groups * queries, the width of a query tile; a multiple of 128.
    unit: rows of a unit; divides `rows`.
    keys: keys of a key tile.
    key_tiles: number of key tiles.
    chunk: keys of a unit; divides `keys`.
    dim: C, padded to a multiple of 128 lanes.
  """

  groups: int
  queries: int
  query_tiles: int
  rows: int
  unit: int
  keys: int
  key_tiles: int
  chunk: int
  dim: int

  @property
  def chunks(self) -> int:
    """Returns the number of chunks of a key tile."""
    return self.keys // self.chunk

  @property
  def row_units(self) -> list[slice]:
    """Returns the rows of each unit of a chunk."""
    starts = range(0, self.rows, self.unit)
    return [slice(start, start + self.unit) for start in starts]

  @property
  def units(self) -> list[tuple[int, slice]]:
    """Returns (first key, rows) of each unit of a block, in order."""
    starts = range(0, self.keys, self.chunk)
    return [(key, rows) for key in starts for rows in self.row_units]


def cut(
  tiles: Tiles, *, queries: int, keys: int, groups: int, dim: int
) -> Shape:
  """Cuts a call into tiles, smaller ones than `tiles` if the call is small.

  With tiles of 1,024 rows and G = 8 heads, a tile holds 128 queries; 9,728
  queries are 76 tiles.

  Args:
    tiles: the sizes that are wanted.
    queries: T of the call.
    keys: S of the call.
    groups: G of the call.
    dim: C of the call.
  """
  # Queries come in steps for which G times as many rows fill whole lanes: of
  # 16 queries for G = 8, of 128 for G = 7.
  step = LANES // math.gcd(groups, LANES)
  wanted = max(1, tiles.rows // (groups * step)) * step
  tile = min(wanted, _up(queries, step))
  rows = groups * tile
  unit = tiles.unit if rows % tiles.unit == 0 else _divisor(rows, 1024)
  chunk = min(tiles.chunk, _up(keys, LANES))
  key_tile = min(tiles.keys // chunk * chunk, _up(keys, chunk))
  return Shape(
    groups=groups,
    queries=tile,
    query_tiles=-(-queries // tile),
    rows=rows,
    unit=unit,
    keys=key_tile,
    key_tiles=-(-keys // key_tile),
    chunk=chunk,
    dim=_up(dim, LANES),
  )


def _divisor(rows: int, largest: int) -> int:
  """Returns the largest multiple of 128 up to `largest` that divides rows."""
  return max(n for n in range(LANES, largest + 1, LANES) if rows % n == 0)


def _up(n: int, step: int) -> int:
  """Rounds n, but at least 1, up to a multiple of step."""
  return -(-max(n, 1) // step) * step
