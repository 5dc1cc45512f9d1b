"""Tiles of the TPU kernels: what they are, and how a call is cut into them.

The sizes for each generation stand in `hourjax.parallel.chips`, and are handed
to the attention call. `python -m hourjax.bench attention --tune` compiles
candidates for a chip and prints the best ones.
"""

import math
from typing import NamedTuple

from hourjax.kernels.constants import LANES

MIB = 1 << 20
SMEM = 512 << 10  # bytes of scalar memory for the list of visits; 1 MiB exists


class Tiles(NamedTuple):
  """What one visit of a kernel works on.

  A tile of queries is `rows` columns of transposed scores: the G heads of a
  KV group side by side, so that a key read from HBM serves all of them. It
  meets `keys` keys, in units of `chunk` keys x `unit` rows: the scores of the
  next unit are computed while the softmax of this one runs.
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
  """One call, cut into tiles. A row is G x `queries` score rows wide."""

  groups: int  # G
  queries: int  # of a tile
  query_tiles: int
  rows: int  # groups * queries, a multiple of 128
  unit: int  # rows of a unit, divides rows
  keys: int  # of a tile
  key_tiles: int
  chunk: int  # divides keys
  dim: int  # C, padded to lanes

  @property
  def chunks(self) -> int:
    """Chunks of a key tile."""
    return self.keys // self.chunk

  @property
  def row_units(self) -> list[slice]:
    """Rows of each unit of a chunk."""
    starts = range(0, self.rows, self.unit)
    return [slice(start, start + self.unit) for start in starts]

  @property
  def units(self) -> list[tuple[int, slice]]:
    """(first key, rows) of each unit of a visit, in order."""
    starts = range(0, self.keys, self.chunk)
    return [(key, rows) for key in starts for rows in self.row_units]


def cut(
  tiles: Tiles, *, queries: int, keys: int, groups: int, dim: int
) -> Shape:
  """Tiles for T queries and S keys; smaller ones where these are few."""
  step = LANES // math.gcd(groups, LANES)  # so that rows fill whole lanes
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
  """The largest multiple of 128, at most `largest`, that divides rows."""
  return max(n for n in range(LANES, largest + 1, LANES) if rows % n == 0)


def _up(n: int, step: int) -> int:
  return -(-max(n, 1) // step) * step
