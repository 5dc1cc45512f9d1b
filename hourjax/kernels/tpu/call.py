"""The two kernels as functions of whole arrays: what fits, how it is cut.

A kernel's list of visits lies in scalar memory, and tiles have numbers of so
many bits. A call with more of them is made in parts (`kernels.chunking`):

  kernel    what is cut  why                            what it costs
  forward   queries      the list is too long           nothing
            keys         one tile of queries has too    merged by log-sum-exp
                         many
  backward  queries      VMEM does not hold all dq      dk, dv summed: float32
            keys         the list is too long, or such  dq summed: float32
                         sums are

An hour is one call, and no length is refused. Of the rows of a batch as many
are taken at once as there is scalar memory for.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

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
# Bytes of float32 dk and dv that are summed over parts of the queries. So many
# keys are a tenth of a second's work, in which what a part costs is lost.
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
  interpret=False,
) -> tuple[jax.Array, jax.Array]:
  """`forward.forward` in parts if need be.

  Raises:
    ValueError: for what the kernels cannot do; see `check`.
  """
  shape = split_forward(tiles, q, k)
  check(q, k, v, shape, forward_vmem(shape, q.dtype.itemsize), tiles)
  call = functools.partial(
    attend.forward, shape=shape, vmem=tiles.vmem, interpret=interpret
  )
  call = functools.partial(
    chunking.forward, call, **_lengths(shape), out_dtype=out_dtype
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
  interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`backward.backward` likewise.

  Raises:
    ValueError: for what the kernels cannot do; see `check`.
  """
  shape = split_backward(tiles, q, k)
  check(q, k, v, shape, backward_vmem(shape, q.dtype.itemsize), tiles)
  call = functools.partial(
    sweep.backward, shape=shape, vmem=tiles.vmem, interpret=interpret
  )
  call = functools.partial(chunking.backward, call, **_lengths(shape))
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
  """Refuses, by name, what the kernels do not do.

  Raises:
    ValueError: for dtypes other than bfloat16 and float32 or that differ, and
      tiles that VMEM does not hold. Neither depends on how long anything is.
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
  """Raises ValueError unless all are bfloat16 or all float32."""
  if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in _DTYPES:
    raise ValueError(
      "attention on TPU takes q, k and v all bfloat16 or all float32, not"
      f" {', '.join(str(x.dtype) for x in (q, k, v))}; cast them"
    )


def forward_vmem(shape: Shape, size: int) -> int:
  """Bytes of VMEM of the forward kernel for numbers of `size` bytes."""
  queries, keys = shape.dim * shape.rows, shape.dim * shape.keys
  return (
    2 * queries * (size + 4)  # q and out, two buffers each
    + 4 * keys * size  # k and v, two buffers each
    + 4 * queries  # accumulator
    + 8 * 4 * 8 * shape.rows  # statistics, lse, segments: padded to 8 rows
    + shape.chunk * shape.unit * (12 + size)  # two units of scores, weights
  )


def backward_vmem(shape: Shape, size: int) -> int:
  """Bytes of VMEM of the backward kernel for numbers of `size` bytes."""
  queries, keys = shape.dim * shape.rows, shape.dim * shape.keys
  return (
    shape.query_tiles * queries * 4  # dq of all queries of a group
    + 2 * keys * 4  # dk and dv
    + keys * size  # k, transposed
    + 4 * queries * size  # q and d_out, two buffers each
    + 4 * keys * (size + 4)  # k, v, dk, dv, two buffers each
    + 8 * 4 * 8 * shape.rows  # lse, delta, segments: padded to 8 rows
    + 6 * 4 * shape.chunk * shape.unit  # two units, weights and gradients
  )


def split_forward(tiles: AttentionTiles, q: jax.Array, k: jax.Array) -> Shape:
  """The cut of one part of the forward pass."""
  whole = _cut(tiles.forward, q, k)
  shape = _split_keys(whole._replace(query_tiles=1), _listed)
  shape = shape._replace(query_tiles=whole.query_tiles)
  return _part(shape, "query_tiles", _fewest(shape, "query_tiles", _listed))


def split_backward(tiles: AttentionTiles, q: jax.Array, k: jax.Array) -> Shape:
  """The cut of one part of the backward pass."""
  parts, shape = split(tiles, q, k)
  each = 8 * k.shape[2] * shape.dim * shape.keys  # float32 dk and dv of a tile

  def fits(shape):
    return _listed(shape) and (parts == 1 or each * shape.key_tiles <= SUMS)

  return _split_keys(shape, fits)


def split(
  tiles: AttentionTiles, q: jax.Array, k: jax.Array
) -> tuple[int, Shape]:
  """Parts of the queries whose dq fits in VMEM, and the cut of one part."""
  whole = _cut(tiles.backward, q, k)

  def fits(shape):
    vmem = backward_vmem(shape, q.dtype.itemsize)
    return vmem <= tiles.vmem and _listed(shape._replace(key_tiles=1))

  parts = _fewest(whole, "query_tiles", fits)
  return parts, _part(whole, "query_tiles", parts)


def _split_keys(shape: Shape, fits: Callable[[Shape], bool]) -> Shape:
  """With the key tiles of one part.

  Up to twice as many parts as need be are taken if they are of one length:
  else all keys would be copied to pad the last part.
  """
  fewest = _fewest(shape, "key_tiles", fits)
  even = (n for n in range(fewest, 2 * fewest) if shape.key_tiles % n == 0)
  return _part(shape, "key_tiles", next(even, fewest))


def _fewest(whole: Shape, name: str, fits: Callable[[Shape], bool]) -> int:
  """Of how many parts each fits; one tile a part if none does."""
  tiles = getattr(whole, name)
  enough = (n for n in range(1, tiles) if fits(_part(whole, name, n)))
  return next(enough, tiles)


def _part(whole: Shape, name: str, parts: int) -> Shape:
  return whole._replace(**{name: -(-getattr(whole, name) // parts)})


def _lengths(shape: Shape) -> dict[str, int]:
  """Queries and keys of a part."""
  return {
    "queries": shape.query_tiles * shape.queries,
    "keys": shape.key_tiles * shape.keys,
  }


def _listed(shape: Shape) -> bool:
  """Can visits name its tiles, and does scalar memory hold them all?"""
  tiles = max(shape.query_tiles, shape.key_tiles)
  return tiles <= block_schedule.MOST_TILES and row_scalars(shape) <= SMEM


def row_scalars(shape: Shape) -> int:
  """Bytes of scalar memory for the visits of one row."""
  visited = shape.query_tiles * shape.key_tiles
  ranges = 2 * shape.query_tiles + 3 * shape.key_tiles * shape.chunks
  return 4 * (visited + ranges)


def _cut(tiles: Tiles, q: jax.Array, k: jax.Array) -> Shape:
  return cut(
    tiles,
    queries=q.shape[1],
    keys=k.shape[1],
    groups=q.shape[2] // k.shape[2],
    dim=q.shape[3],
  )


def _by_rows(call: Callable, shape: Shape, *operands: jax.Array):
  """`call` on as many rows at once as scalar memory has visits for."""
  rows = operands[0].shape[0]
  most = max(1, SMEM // row_scalars(shape))
  if rows <= most:
    return call(*operands)
  at_once = max(n for n in range(1, most + 1) if rows % n == 0)
  grouped = [x.reshape(-1, at_once, *x.shape[1:]) for x in operands]
  results = jax.lax.map(lambda row: call(*row), grouped)
  return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), results)
