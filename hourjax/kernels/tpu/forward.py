"""Forward kernel: transposed scores, and a maximum that is taken once.

Scores are [keys, rows], so that the probabilities are the stationary operand
of the second matmul, V^T P^T: its contraction is over keys and fills the
matrix unit, also the 256-wide one of v6e and v7x, which head dim 128 leaves
half empty the other way round. The price is that probabilities are pushed as
weights; the unit does that beside the running matmul.

FlashAttention (arXiv 2205.14135) rescales its sums whenever the maximum of a
row grows. Here a row's reference is the maximum over the first keys that it
sees, and stays: float32 and bfloat16 hold weights up to 2 ** 127 as exactly as
those up to 1. Only if a sum passes `LARGEST` (scores more than 69 above the
reference), or is not a number, the whole call is repeated with the running
maximum: at worst it costs three times as much, and is never wrong.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hourjax.kernels.tpu import block_schedule, tile_layout
from hourjax.kernels.tpu.tile_layout import LOG2E, NEVER, dot, mask
from hourjax.kernels.tpu.tiles import Shape

LARGEST = 2.0**100  # of a sum of weights; times |v| it must not overflow


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  *,
  shape: Shape,
  vmem: int,
  out_dtype: jax.typing.DTypeLike,
  interpret=False,
) -> tuple[jax.Array, jax.Array]:
  """Segment-masked attention and its log-sum-exp.

  Args:
    q: [B, T, H, C].
    k, v: [B, S, K, C].
    query_segment, key_segment: int32 [B, T] and [B, S]; 0 is padding.
    shape: how it is cut into tiles.
    vmem: bytes the kernel may take.
    out_dtype: of the output.
    interpret: False, or `pltpu.InterpretParams` to run without a TPU.

  Returns:
    out [B, T, H, C] and lse float32 [B, T, H]; a query that sees no key has
    zeros and `NEVER`.
  """
  grid = block_schedule.plan(
    tile_layout.pad(query_segment, 1, shape.query_tiles * shape.queries),
    tile_layout.pad(key_segment, 1, shape.key_tiles * shape.keys),
    query_tiles=shape.query_tiles,
    key_tiles=shape.key_tiles,
    chunks=shape.chunks,
    by_key=False,
  )
  arrays = (
    tile_layout.fold(q, shape),
    tile_layout.flat_keys(k, shape),
    tile_layout.flat_keys(v, shape),
    tile_layout.fold_segments(query_segment, shape),
    tile_layout.tile_segments(key_segment, shape),
  )
  call = functools.partial(
    _call,
    shape=shape,
    scale=q.shape[-1] ** -0.5,
    kv_heads=k.shape[2],
    vmem=vmem,
    out_dtype=out_dtype,
    interpret=interpret,
  )
  out, lse = call(grid, arrays, running=False)
  out, lse = jax.lax.cond(
    jnp.isfinite(lse).all(),
    lambda *_: (out, lse),
    functools.partial(call, running=True),
    grid,
    arrays,
  )
  length, dim = q.shape[1], q.shape[3]
  return (
    tile_layout.unfold(out, shape, length, dim),
    tile_layout.unfold_numbers(lse, shape, length),
  )


def _call(
  grid: block_schedule.Visits,
  arrays: tuple[jax.Array, ...],
  *,
  running: bool,
  shape: Shape,
  scale: float,
  kv_heads: int,
  vmem: int,
  out_dtype: jax.typing.DTypeLike,
  interpret,
):
  """(out, lse) in tiles. `running`: with the running maximum everywhere."""
  q, k = arrays[:2]
  rows, most = grid.code.shape
  at = block_schedule.blocks(most)
  queries = pl.BlockSpec((1, 1, 1, shape.dim, shape.rows), at.query)
  numbers = pl.BlockSpec((1, 1, 1, 1, shape.rows), at.query)
  keys = pl.BlockSpec((1, shape.keys, shape.dim), at.key)
  pairs = rows * kv_heads * shape.query_tiles * shape.rows * k.shape[1]
  return pl.pallas_call(
    functools.partial(
      _kernel,
      shape=shape,
      most=most,
      to_power=scale * LOG2E,
      running=running,
    ),
    out_shape=(
      jax.ShapeDtypeStruct(q.shape, out_dtype),
      jax.ShapeDtypeStruct((*q.shape[:3], 1, shape.rows), jnp.float32),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=6,
      grid=(rows, kv_heads, grid.count),
      in_specs=[
        queries,
        keys,
        keys,
        pl.BlockSpec((1, 1, 1, shape.rows), at.query_segment),
        pl.BlockSpec((1, shape.chunks, 1, shape.chunk), at.key_segment),
      ],
      out_specs=(queries, numbers),
      scratch_shapes=[
        pltpu.VMEM((1, shape.rows), jnp.float32),
        pltpu.VMEM((1, shape.rows), jnp.float32),
        pltpu.VMEM((shape.dim, shape.rows), jnp.float32),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * pairs * shape.dim,
      transcendentals=pairs,
      bytes_accessed=2 * q.nbytes + 2 * shape.query_tiles * k.nbytes,
    ),
    interpret=interpret,
    name="attention_forward" + "_running" * running,
  )(*grid.scalars(), *arrays)


def _kernel(
  code_ref,
  query_low,
  query_high,
  key_low,
  key_high,
  key_only,
  q_ref,  # [1, 1, 1, C, rows]
  k_ref,  # [1, keys, C]
  v_ref,
  query_segment,  # [1, 1, 1, rows]
  key_segment,  # [1, chunks, 1, chunk]
  out_ref,  # [1, 1, 1, C, rows]
  lse_ref,  # [1, 1, 1, 1, rows]
  top_ref,  # [1, rows]: the reference, in powers of two
  sum_ref,  # [1, rows]
  acc_ref,  # [C, rows]
  *,
  shape: Shape,
  most: int,
  to_power: float,
  running: bool,
):
  b = pl.program_id(0)
  code = code_ref[b * most + pl.program_id(2)]
  chunk = (block_schedule.key_tile(code) + b * shape.key_tiles) * shape.chunks

  @pl.when(block_schedule.has(code, block_schedule.FIRST))
  def _():
    top_ref[...] = jnp.full_like(top_ref, NEVER)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def scores(key, at):
    keys = k_ref[0, pl.ds(key, shape.chunk)]
    return dot(keys, q_ref[0, 0, 0, :, at]) * to_power

  def values(key):  # [C, chunk]
    return v_ref[0, pl.ds(key, shape.chunk)].T

  def gather(at, weight, value, shrink=1.0):
    sum_ref[:, at] = sum_ref[:, at] * shrink + weight.sum(0, keepdims=True)
    more = dot(value, weight.astype(value.dtype))
    acc_ref[:, at] = acc_ref[:, at] * shrink + more

  def one_segment():
    """All keys are of one segment: rows of others are masked by row."""
    mine = query_segment[0, 0] == key_only[chunk]

    @pl.when(block_schedule.has(code, block_schedule.NEW))
    def _():
      for at in shape.row_units:
        top = scores(0, at).max(0, keepdims=True)
        fresh = mine[:, at] & (top_ref[:, at] == NEVER)
        top_ref[:, at] = jnp.where(fresh, top, top_ref[:, at])

    # exp2(score + NEVER) is 0.
    reference = jnp.where(mine, top_ref[...], -NEVER)
    # One unit ahead: the matrix unit works while these are exponentiated.
    ahead = scores(*shape.units[0])
    for number, (key, at) in enumerate(shape.units):
      score = ahead
      if number + 1 < len(shape.units):
        ahead = scores(*shape.units[number + 1])
      if at.start == 0:
        value = values(key)
      gather(at, jnp.exp2(score - reference[:, at]), value)

  def some_chunks():
    """Keys of several segments, or of any with a running maximum."""
    i = block_schedule.query_tile(code) + b * shape.query_tiles

    def visit(c, only):
      key = pl.multiple_of(c * shape.chunk, shape.chunk)
      value = values(key)
      for at in shape.row_units:
        mine = query_segment[0, 0, :, at]
        score = scores(key, at)
        if only is None:
          score = jnp.where(mask(key_segment[0, c], mine), score, NEVER)
        old, peak = top_ref[:, at], score.max(0, keepdims=True)
        seen = peak > NEVER if only is None else mine == only
        top = jnp.where(seen, jnp.maximum(old, peak), old)
        top_ref[:, at] = top
        weight = jnp.exp2(score - jnp.where(seen, top, -NEVER))
        gather(at, weight, value, jnp.exp2(old - top))

    def one_chunk(c, carry):
      j = chunk + c
      meets = (query_low[i] <= key_high[j]) & (key_low[j] <= query_high[i])
      only = key_only[j]
      pl.when(meets & (only > 0))(lambda: visit(c, only))
      pl.when(meets & (only == 0))(lambda: visit(c, None))
      return carry

    jax.lax.fori_loop(0, shape.chunks, one_chunk, None)

  if running:
    pl.when(
      block_schedule.has(code, block_schedule.WHOLE | block_schedule.PARTLY)
    )(some_chunks)
  else:
    pl.when(block_schedule.has(code, block_schedule.WHOLE))(one_segment)
    pl.when(block_schedule.has(code, block_schedule.PARTLY))(some_chunks)

  @pl.when(block_schedule.has(code, block_schedule.LAST))
  def _():
    total = sum_ref[...]
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out_ref[0, 0, 0] = (acc_ref[...] / safe).astype(out_ref.dtype)
    lse = top_ref[...] / LOG2E + jnp.log(safe)
    # Infinite where the reference was left too far behind, or not a number.
    lse = jnp.where(total <= LARGEST, lse, jnp.inf)
    lse_ref[0, 0, 0] = jnp.where(total == 0, NEVER, lse)
