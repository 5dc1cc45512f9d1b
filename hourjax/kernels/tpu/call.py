"""The two kernels as functions of whole arrays: what fits, how it is cut.

A kernel's block schedule lies in scalar memory, and a tile's number has 13
bits. A call that needs more is made in parts (`kernels.chunking`):

  kernel    what is cut  why                             what it costs
  forward   queries      the schedule is too long        nothing
            keys         one query tile has too many     merged by log-sum-exp
                         blocks
  backward  queries      VMEM does not hold all dq       dk, dv summed: float32
            keys         the schedule is too long, or    dq summed: float32
                         these sums are

An hour of video is one call, and no length is refused. Rows of a batch are
computed together as far as scalar memory holds their schedules, else in groups
one after the other.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from hourjax.kernels import chunking
from hourjax.kernels.tpu import backward as sweep
from hourjax.kernels.tpu import block_schedule
from hourjax.kernels.tpu import forward as attend
from hourjax.kernels.tpu.tiles import (
  MIB,
  SMEM,
  AttentionTiles,
  Shape,
  Tiles,
  cut,
)

_DTYPES = (jnp.bfloat16, jnp.float32)
# Most bytes of float32 dk and dv that are summed over parts of the queries.
# Computing the gradients of so many keys takes about a tenth of a second. One
# more part costs next to nothing beside that.
SUMS = 256 * MIB


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike,
  tiles: AttentionTiles,
  causal: bool = False,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes attention and its log-sum-exp, in parts if need be.

  Args:
    q: queries [B, T, H, C].
    k: keys [B, S, K, C].
    v: values [B, S, K, C].
    query_segment: int32 [B, T]; 0 is padding.
    key_segment: int32 [B, S]; 0 is padding.
    out_dtype: of the output.
    tiles: of the chip, for the dtype of q.
    causal: whether a query sees only the keys up to its own index.
    interpret: False, or `pltpu.InterpretParams` to run without a TPU.

  Returns:
    out [B, T, H, C] and lse float32 [B, T, H]; zeros and -1e30 where a query
    sees no key.

  Raises:
    ValueError: for what the kernels cannot do; see `check`.
  """
  shape = split_forward(tiles, q, k)
  check(q, k, v, shape, forward_vmem(shape, q.dtype.itemsize), tiles)
  call = functools.partial(
    attend.forward, shape=shape, vmem=tiles.vmem, interpret=interpret
  )
  call = functools.partial(
    chunking.forward,
    call,
    **_lengths(shape),
    out_dtype=out_dtype,
    causal=causal,
  )
  return _by_rows(call, shape, q, k, v, query_segment, key_segment)


def backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  d_out: jax.Array,
  *,
  tiles: AttentionTiles,
  causal: bool = False,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes the gradients of q, k and v, in parts if need be.

  Args:
    q: queries [B, T, H, C].
    k: keys [B, S, K, C].
    v: values [B, S, K, C].
    query_segment: int32 [B, T]; 0 is padding.
    key_segment: int32 [B, S]; 0 is padding.
    lse: float32 [B, T, H], over all keys there are, also on other devices;
      1e30 where a query sees none.
    delta: float32 [B, T, H]: sum of out * d_out over C.
    d_out: gradient of the output [B, T, H, C].
    tiles: of the chip, for the dtype of q.
    causal: as for `forward`.
    interpret: False, or `pltpu.InterpretParams` to run without a TPU.

  Returns:
    dq float32 [B, T, H, C]; dk and dv [B, S, K, C] in the dtype of k.

  Raises:
    ValueError: for what the kernels cannot do; see `check`.
  """
  shape = split_backward(tiles, q, k)
  check(q, k, v, shape, backward_vmem(shape, q.dtype.itemsize), tiles)
  call = functools.partial(
    sweep.backward, shape=shape, vmem=tiles.vmem, interpret=interpret
  )
  call = functools.partial(
    chunking.backward, call, **_lengths(shape), causal=causal
  )
  operands = q, k, v, query_segment, key_segment, lse, delta, d_out
  return _by_rows(call, shape, *operands)


def check(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  shape: Shape,
  vmem: int,
  tiles: AttentionTiles,
) -> None:
  """Checks that the kernels can compute a call.

  Args:
    q: queries.
    k: keys.
    v: values.
    shape: how the call is cut into tiles.
    vmem: bytes of VMEM that the kernel takes for this shape.
    tiles: for their limit of VMEM.

  Raises:
    ValueError: for dtypes that differ or are neither bfloat16 nor float32, and
      for tiles that VMEM does not hold. Neither depends on a length.
  """
  check_dtypes(q, k, v)
  if vmem > tiles.vmem:
    raise ValueError(
      f"attention needs {vmem / MIB:.0f} MiB of VMEM for tiles of"
      f" {shape.rows} score rows and {shape.keys} keys of head dim"
      f" {shape.dim} in {q.dtype}; {tiles.vmem / MIB:.0f} MiB are there; take"
      " smaller tiles in hourjax/parallel/chips.py"
    )


def check_dtypes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
  """Checks that the dtypes are all bfloat16 or all float32.

  Raises:
    ValueError: with the dtypes.
  """
  if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in _DTYPES:
    raise ValueError(
      "attention on TPU takes q, k and v all bfloat16 or all float32, not"
      f" {', '.join(str(x.dtype) for x in (q, k, v))}; cast them"
    )


def forward_vmem(shape: Shape, size: int) -> int:
  """Returns the bytes of VMEM that the forward kernel takes.

  Args:
    shape: how the call is cut into tiles.
    size: bytes of a number of q, k and v.
  """
  queries, keys = shape.dim * shape.rows, shape.dim * shape.keys
  return (
    # q, and out, which may be float32: two buffers each, since the next tile
    # is fetched while this one is worked on.
    2 * queries * (size + 4)
    + 4 * keys * size  # k and v, two buffers each
    + 4 * queries  # the sums of weighted values, float32
    # top, sum, lse, segments, places and the first references, most with two
    # buffers: 10 arrays of one row of 4 bytes, which the registers' shape
    # pads to 8 rows.
    + 10 * 4 * 8 * shape.rows
    # Two units of scores and one of weights in float32, and its cast.
    + shape.chunk * shape.unit * (12 + size)
  )


def backward_vmem(shape: Shape, size: int) -> int:
  """Returns the bytes of VMEM that the backward kernel takes.

  Args:
    shape: how the call is cut into tiles.
    size: bytes of a number of q, k, v and d_out.
  """
  queries, keys = shape.dim * shape.rows, shape.dim * shape.keys
  return (
    shape.query_tiles * queries * 4  # dq of all queries of a group, float32
    + 2 * keys * 4  # the sums of dk and dv, float32
    + keys * size  # k, transposed
    + 4 * queries * size  # q and d_out, two buffers each
    # k and v, and dk and dv, which may be float32: two buffers each.
    + 4 * keys * (size + 4)
    # lse, delta, segments and places, two buffers each: 8 arrays of one row
    # of 4 bytes, which the registers' shape pads to 8 rows.
    + 8 * 4 * 8 * shape.rows
    # Scores and gradients of weights of two units, and the weights and the
    # gradients of scores of one, float32.
    + 6 * 4 * shape.chunk * shape.unit
  )


def split_forward(tiles: AttentionTiles, q: jax.Array, k: jax.Array) -> Shape:
  """Returns how one part of the forward pass is cut into tiles.

  Args:
    tiles: of the chip.
    q: queries of the whole call.
    k: keys of the whole call.
  """
  whole = _cut(tiles.forward, q, k)
  # First the keys, as if there were one query tile: cutting queries is exact
  # and costs nothing, cutting keys needs a merge.
  shape = _split_keys(whole._replace(query_tiles=1), _listed)
  shape = shape._replace(query_tiles=whole.query_tiles)
  return _part(shape, "query_tiles", _fewest(shape, "query_tiles", _listed))


def split_backward(tiles: AttentionTiles, q: jax.Array, k: jax.Array) -> Shape:
  """Returns how one part of the backward pass is cut into tiles.

  Args:
    tiles: of the chip.
    q: queries of the whole call.
    k: keys of the whole call.
  """
  parts, shape = split(tiles, q, k)
  each = 8 * k.shape[2] * shape.dim * shape.keys  # float32 dk and dv of a tile

  def fits(shape: Shape) -> bool:
    return _listed(shape) and (parts == 1 or each * shape.key_tiles <= SUMS)

  return _split_keys(shape, fits)


def split(
  tiles: AttentionTiles,
  q: jax.Array | jax.ShapeDtypeStruct,
  k: jax.Array | jax.ShapeDtypeStruct,
) -> tuple[int, Shape]:
  """Splits the queries of the backward pass so that VMEM holds a part's dq.

  Args:
    tiles: of the chip.
    q: queries of the whole call.
    k: keys of the whole call.

  Returns:
    The number of parts, and how one of them is cut into tiles.
  """
  whole = _cut(tiles.backward, q, k)

  def fits(shape: Shape) -> bool:
    vmem = backward_vmem(shape, q.dtype.itemsize)
    return vmem <= tiles.vmem and _listed(shape._replace(key_tiles=1))

  parts = _fewest(whole, "query_tiles", fits)
  return parts, _part(whole, "query_tiles", parts)


def _split_keys(shape: Shape, fits: Callable[[Shape], bool]) -> Shape:
  """Reduces the key tiles to those of one part that fits.

  If the least number of parts does not divide the key tiles, up to twice as
  many are taken to find one that does: else padding the last part would copy
  all keys.
  """
  fewest = _fewest(shape, "key_tiles", fits)
  even = (n for n in range(fewest, 2 * fewest) if shape.key_tiles % n == 0)
  return _part(shape, "key_tiles", next(even, fewest))


def _fewest(whole: Shape, name: str, fits: Callable[[Shape], bool]) -> int:
  """Returns the least number of parts such that each of them fits.

  If none does, every tile is a part.
  """
  tiles = getattr(whole, name)
  enough = (n for n in range(1, tiles) if fits(_part(whole, name, n)))
  return next(enough, tiles)


def _part(whole: Shape, name: str, parts: int) -> Shape:
  """Divides the tiles counted in the field `name` by `parts`, rounding up."""
  return whole._replace(**{name: -(-getattr(whole, name) // parts)})


def _lengths(shape: Shape) -> dict[str, int]:
  """Returns the queries and keys of a part."""
  return {
    "queries": shape.query_tiles * shape.queries,
    "keys": shape.key_tiles * shape.keys,
  }


def _listed(shape: Shape) -> bool:
  """Returns whether 13 bits number the tiles and SMEM holds the schedule."""
  tiles = max(shape.query_tiles, shape.key_tiles)
  return tiles <= block_schedule.MOST_TILES and row_scalars(shape) <= SMEM


def row_scalars(shape: Shape) -> int:
  """Returns the bytes of scalar memory for one row's block schedule."""
  blocks = shape.query_tiles * shape.key_tiles  # at most: if all tiles meet
  # Ranges of ids: low and high of query tiles; low, high and only of chunks.
  ranges = 2 * shape.query_tiles + 3 * shape.key_tiles * shape.chunks
  return 4 * (blocks + ranges)


def _cut(
  tiles: Tiles,
  q: jax.Array | jax.ShapeDtypeStruct,
  k: jax.Array | jax.ShapeDtypeStruct,
) -> Shape:
  """Cuts the whole call into tiles."""
  return cut(
    tiles,
    queries=q.shape[1],
    keys=k.shape[1],
    groups=q.shape[2] // k.shape[2],
    dim=q.shape[3],
  )


def _by_rows(call: Callable, shape: Shape, *operands: jax.Array) -> Any:
  """Calls `call` on as many rows at once as scalar memory has room for."""
  rows = operands[0].shape[0]
  most = max(1, SMEM // row_scalars(shape))
  if rows <= most:
    return call(*operands)
  at_once = max(n for n in range(1, most + 1) if rows % n == 0)
  grouped = [x.reshape(-1, at_once, *x.shape[1:]) for x in operands]
  results = jax.lax.map(lambda row: call(*row), grouped)
  return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), results)
