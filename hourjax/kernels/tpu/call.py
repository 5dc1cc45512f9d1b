"""The two kernels as functions of whole arrays: what fits, how it is cut."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hourjax.kernels.common import NO_KEYS
from hourjax.kernels.tpu import backward as sweep
from hourjax.kernels.tpu import folding, visits
from hourjax.kernels.tpu import forward as attend
from hourjax.kernels.tpu.tiles import (
  MIB,
  SMEM,
  Chip,
  Shape,
  Tiles,
  cut,
  this_chip,
)

_DTYPES = (jnp.bfloat16, jnp.float32)


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike,
  chip: Chip | None = None,
  interpret=False,
) -> tuple[jax.Array, jax.Array]:
  """`forward.forward` with the tiles of the chip at hand.

  Raises:
    ValueError: for what the kernels cannot do; see `check`.
  """
  chip = chip or this_chip(q.dtype)
  shape = _cut(chip.forward, q, k)
  check(q, k, v, shape, forward_vmem(shape, q.dtype.itemsize), chip)
  call = functools.partial(
    attend.forward,
    shape=shape,
    vmem=chip.vmem,
    out_dtype=out_dtype,
    interpret=interpret,
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
  chip: Chip | None = None,
  interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`backward.backward`, a part of the queries at a time if dq is too large.

  Raises:
    ValueError: for what the kernels cannot do; see `check`.
  """
  chip = chip or this_chip(q.dtype)
  parts, shape = split(chip, q, k)
  check(q, k, v, shape, backward_vmem(shape, q.dtype.itemsize), chip)
  call = functools.partial(
    sweep.backward,
    shape=shape,
    vmem=chip.vmem,
    grad_dtype=k.dtype if parts == 1 else jnp.float32,
    interpret=interpret,
  )
  length = shape.query_tiles * shape.queries
  of_queries = [
    jnp.split(folding.pad(x, 1, parts * length, fill), parts, axis=1)
    for x, fill in (
      (q, 0),
      (query_segment, 0),
      (lse, NO_KEYS),
      (delta, 0),
      (d_out, 0),
    )
  ]
  dqs, dk, dv = [], 0, 0
  for q_, segment, lse_, delta_, d_out_ in zip(*of_queries):
    dq, more_dk, more_dv = _by_rows(
      call, shape, q_, k, v, segment, key_segment, lse_, delta_, d_out_
    )
    dqs, dk, dv = [*dqs, dq], dk + more_dk, dv + more_dv
  dq = jnp.concatenate(dqs, axis=1)[:, : q.shape[1]]
  return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def check(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  shape: Shape,
  vmem: int,
  chip: Chip,
) -> None:
  """Refuses, by name, what the kernels do not do.

  Raises:
    ValueError: for dtypes other than bfloat16 and float32 or that differ,
      tiles that VMEM does not hold, more tiles than a visit can name, and
      more visits of one row than scalar memory holds.
  """
  check_dtypes(q, k, v)
  if vmem > chip.vmem:
    raise ValueError(
      f"attention needs {vmem / MIB:.0f} MiB of VMEM for tiles of"
      f" {shape.rows} score rows and {shape.keys} keys of head dim"
      f" {shape.dim} in {q.dtype}; {chip.vmem / MIB:.0f} MiB are there; take"
      " smaller tiles in kernels/tpu/tiles.py"
    )
  for name, tiles, each in (
    ("queries", shape.query_tiles, shape.queries),
    ("keys", shape.key_tiles, shape.keys),
  ):
    if tiles > visits.MOST_TILES:
      raise ValueError(
        f"attention on TPU takes at most {visits.MOST_TILES} tiles of {each}"
        f" {name} in a row, got {tiles}; shard them over more devices"
      )
  if row_scalars(shape) > SMEM:
    raise ValueError(
      f"a row of {shape.query_tiles} x {shape.key_tiles} tiles needs"
      f" {row_scalars(shape)} bytes of scalar memory for its visits, more than"
      f" {SMEM}; shard the memory over more devices"
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


def split(chip: Chip, q: jax.Array, k: jax.Array) -> tuple[int, Shape]:
  """Parts of the queries whose dq fits in VMEM, and the cut of one part."""
  whole = _cut(chip.backward, q, k)
  for parts in range(1, whole.query_tiles + 1):
    shape = whole._replace(query_tiles=-(-whole.query_tiles // parts))
    fits = backward_vmem(shape, q.dtype.itemsize) <= chip.vmem
    if fits and row_scalars(shape) <= SMEM:
      break
  return parts, shape


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
  most = SMEM // row_scalars(shape)
  if rows <= most:
    return call(*operands)
  at_once = max(n for n in range(1, most + 1) if rows % n == 0)
  grouped = [x.reshape(-1, at_once, *x.shape[1:]) for x in operands]
  results = jax.lax.map(lambda row: call(*row), grouped)
  return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), results)
