"""Which scores count: those of one segment, and none above the diagonal.

Index 0 is the first key of a block, so a tile of queries begins at some index
`first`, which may be negative. Of a causal block with three chunks of two keys
and a tile of three queries that begins at index 2,

             query   2 3 4
    chunk 0    0     x x x     all keys lie before the tile: no mask
               1     x x x
    chunk 1    2     x x x     the diagonal: masked score by score
               3     . x x
    chunk 2    4     . . x     the diagonal, too
               5     . . .

and a chunk that begins at index 5 or later meets no query of this tile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hourjax.kernels.constants import LANES
from hourjax.kernels.tpu.tiles import Shape


def column(key_segment: jax.Array) -> jax.Array:
  """Turns ids of keys, int32 [1, keys], into [keys, 1]; padding becomes -1.

  No query has the id -1, so that padding needs no comparison of its own.
  """
  key_segment = jnp.where(key_segment > 0, key_segment, -1)
  # The ids lie along lanes, and are wanted down a column. The transpose unit
  # takes whole registers, so they are repeated to 128 rows, transposed, and
  # one column is kept.
  return jnp.broadcast_to(key_segment, (LANES, key_segment.shape[1])).T[:, :1]


def allowed(
  key_column: jax.Array | None,
  only: jax.Array | None,
  query_segment: jax.Array,
  last: jax.Array | None,
  keys: int,
) -> jax.Array | None:
  """Returns which scores of a unit count, bool [keys, rows].

  Args:
    key_column: ids of the keys as `column` returns them, for keys of several
      segments.
    only: else the one segment of all keys.
    query_segment: int32 [1, rows].
    last: int32 [1, rows], the index of the last key up to which a row sees
      keys, counted from the first key of the unit; None if it sees all.
    keys: how many keys the unit has.

  Returns:
    The mask; None where rows of other segments have to be masked and nothing
    else: a row is masked faster than its scores.
  """
  same = None if key_column is None else key_column == query_segment
  if last is None:
    return same
  if same is None:  # rows of other segments see no key, at no cost by score
    last = jnp.where(query_segment == only, last, -1)
  index = jax.lax.broadcasted_iota(jnp.int32, (keys, last.shape[1]), 0)
  return index <= last if same is None else same & (index <= last)


def by_kind(
  add: Callable[[jax.Array | None, bool], None],
  *,
  meets: jax.Array,
  only: jax.Array,
  first: jax.Array,
  shape: Shape,
) -> None:
  """Adds a chunk of a causal block with no more masks than it needs.

  Args:
    add: adds it; takes the one segment of its keys, or None, and whether it
      lies on the diagonal.
    meets: whether chunk and query tile may share a segment, bool [].
    only: the one id that all keys of the chunk have, or 0 if they differ.
    first: index of the tile's first query, counted from the chunk's first key.
    shape: how the call is cut into tiles.
  """
  meets &= first + shape.queries > 0
  one, before = meets & (only > 0), first + 1 >= shape.chunk
  pl.when(one & before)(lambda: add(only, False))
  pl.when(one & ~before)(lambda: add(only, True))
  # The rarest kind, and so the only one of several segments.
  pl.when(meets & (only == 0))(lambda: add(None, True))
