"""Tile sizes of the TPU kernels, by chip generation, and what they take.

`python -m hourjax.bench attention --tune` compiles the candidates for a chip
and prints its line of `CHIPS` anew.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from hourjax.kernels.common import LANES

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


class Chip(NamedTuple):
  """Tiles and limits of a generation."""

  forward: Tiles
  backward: Tiles
  vmem: int  # bytes of a core's VMEM that a kernel may take


_SMALL = Tiles(1024, 512, 256, 512)
_MEDIUM = Tiles(1024, 1024, 512, 512)
_LARGE = Tiles(2048, 2048, 512, 512)
_SWEEP = Tiles(1024, 1024, 512, 512)
_LARGE_SWEEP = Tiles(2048, 1024, 256, 512)

_EXACT = Tiles(512, 256, 256, 256)

# By `pltpu.get_tpu_info().chip_version`. VMEM: 16, 128, 64, 128 and 64 MiB
# exist; the compiler wants a part of it for itself.
CHIPS = {
  "v4": Chip(_SMALL, _SMALL, 15 * MIB),
  "v5e": Chip(_MEDIUM, _SWEEP, 110 * MIB),
  "v5p": Chip(_MEDIUM, _SWEEP, 60 * MIB),
  "v6e": Chip(_LARGE, _LARGE_SWEEP, 110 * MIB),
  "7x": Chip(_LARGE, _LARGE_SWEEP, 60 * MIB),
}


def this_chip(dtype: jax.typing.DTypeLike) -> Chip:
  """The generation that is being compiled for, with its tiles for a dtype.

  That is the mesh's one, inside a `shard_map` or `jax.set_mesh`, and else the
  default device's.

  Raises:
    ValueError: if it has no line in `CHIPS`.
  """
  name = str(pltpu.get_tpu_info().chip_version)
  if name not in CHIPS:
    raise ValueError(
      f"no tiles are known for TPU {name}, only for {', '.join(CHIPS)}; add a"
      " line to kernels/tpu/tiles.py (bench attention --tune prints it)"
    )
  chip = CHIPS[name]
  if dtype == jnp.float32:
    # An exact product is six: larger tiles of them would be programs that take
    # the compiler minutes.
    return chip._replace(forward=_EXACT, backward=_EXACT)
  return chip


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
