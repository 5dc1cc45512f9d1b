"""Backward kernel: one sweep over the keys, five matmuls a tile.

Visits go key tile by key tile: dk and dv gather in VMEM while a key tile
stays, and are written once. Queries are few beside the keys, so dq of all
queries of a KV group stays in VMEM for the whole sweep (38 MiB for 9,728
queries of 8 heads) and nothing partial goes to HBM. Where it does not fit, the
queries are split and the keys swept once for each part.

As in the forward kernel, scores are [keys, rows] and the matrix of weights is
the stationary operand of the three matmuls that contract over it:

    dv^T += do^T P      dk^T += q^T dS      dq^T += k^T dS^T
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hourjax.kernels.constants import NO_KEYS
from hourjax.kernels.tpu import block_schedule, tile_layout
from hourjax.kernels.tpu.tile_layout import LOG2E, dot, dot_transposed, mask
from hourjax.kernels.tpu.tiles import Shape


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
  shape: Shape,
  vmem: int,
  grad_dtype: jax.typing.DTypeLike,
  interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v.

  Args:
    q, d_out: [B, T, H, C].
    k, v: [B, S, K, C].
    query_segment, key_segment: int32 [B, T] and [B, S]; 0 is padding.
    lse: float32 [B, T, H], over all keys there are, also on other devices;
      1e30 where a query sees none.
    delta: float32 [B, T, H]: sum of out * d_out over C.
    shape: how it is cut into tiles.
    vmem: bytes the kernel may take.
    grad_dtype: of dk and dv.
    interpret: False, or `pltpu.InterpretParams` to run without a TPU.

  Returns:
    dq float32 [B, T, H, C], dk and dv [B, S, K, C].
  """
  grid = block_schedule.plan(
    tile_layout.pad(query_segment, 1, shape.query_tiles * shape.queries),
    tile_layout.pad(key_segment, 1, shape.key_tiles * shape.keys),
    query_tiles=shape.query_tiles,
    key_tiles=shape.key_tiles,
    chunks=shape.chunks,
    by_key=True,
  )
  rows, heads, scale = q.shape[0], k.shape[2], q.shape[-1] ** -0.5
  most = grid.code.shape[1]

  at = block_schedule.blocks(most)
  queries = pl.BlockSpec((1, 1, 1, shape.dim, shape.rows), at.query)
  numbers = pl.BlockSpec((1, 1, 1, 1, shape.rows), at.query)
  keys = pl.BlockSpec((1, shape.keys, shape.dim), at.key)
  folded = tile_layout.fold(q, shape)
  flat = tile_layout.flat_keys(k, shape)
  pairs = rows * heads * shape.query_tiles * shape.rows * flat.shape[1]
  grad = jax.ShapeDtypeStruct(flat.shape, grad_dtype)
  dq, dk, dv = pl.pallas_call(
    functools.partial(_kernel, shape=shape, most=most, scale=scale),
    out_shape=(jax.ShapeDtypeStruct(folded.shape, jnp.float32), grad, grad),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=6,
      grid=(rows, heads, grid.count),
      in_specs=[
        queries,
        queries,
        numbers,
        numbers,
        keys,
        keys,
        pl.BlockSpec((1, 1, 1, shape.rows), at.query_segment),
        pl.BlockSpec((1, shape.chunks, 1, shape.chunk), at.key_segment),
      ],
      out_specs=(pl.BlockSpec(memory_space=pl.ANY), keys, keys),
      scratch_shapes=[
        pltpu.VMEM(folded.shape[2:], jnp.float32),
        pltpu.VMEM((shape.dim, shape.keys), jnp.float32),
        pltpu.VMEM((shape.dim, shape.keys), jnp.float32),
        pltpu.VMEM((shape.dim, shape.keys), k.dtype),
        pltpu.SemaphoreType.DMA,
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=pl.CostEstimate(
      flops=10 * pairs * shape.dim,
      transcendentals=pairs,
      bytes_accessed=4 * flat.nbytes
      + shape.key_tiles * 2 * folded.nbytes
      + 4 * folded.size,
    ),
    interpret=interpret,
    name="attention_backward",
  )(
    *grid.scalars(),
    folded,
    tile_layout.fold(d_out.astype(q.dtype), shape),
    tile_layout.fold_numbers(lse * LOG2E, shape, fill=NO_KEYS),
    tile_layout.fold_numbers(delta, shape, fill=0.0),
    flat,
    tile_layout.flat_keys(v, shape),
    tile_layout.fold_segments(query_segment, shape),
    tile_layout.tile_segments(key_segment, shape),
  )
  length, dim = q.shape[1], q.shape[3]
  return (
    tile_layout.unfold(dq, shape, length, dim) * scale,
    tile_layout.unflat_keys(dk, heads, k.shape[1], dim),
    tile_layout.unflat_keys(dv, heads, k.shape[1], dim),
  )


def _kernel(
  code_ref,
  query_low,
  query_high,
  key_low,
  key_high,
  key_only,
  q_ref,  # [1, 1, 1, C, rows]
  d_out_ref,
  lse_ref,  # [1, 1, 1, 1, rows], in powers of two
  delta_ref,
  k_ref,  # [1, keys, C]
  v_ref,
  query_segment,  # [1, 1, 1, rows]
  key_segment,  # [1, chunks, 1, chunk]
  dq_hbm,  # [B, K, query tiles, C, rows]
  dk_ref,  # [1, keys, C]
  dv_ref,
  dq_acc,  # [query tiles, C, rows]
  dk_acc,  # [C, keys]
  dv_acc,
  k_transposed,  # [C, keys]
  sent,
  *,
  shape: Shape,
  most: int,
  scale: float,
):
  b, head, n = (pl.program_id(axis) for axis in range(3))
  code = code_ref[b * most + n]
  i = block_schedule.query_tile(code)
  chunk = (block_schedule.key_tile(code) + b * shape.key_tiles) * shape.chunks

  @pl.when(n == 0)
  def _():
    def clear(tile, carry):
      dq_acc[tile] = jnp.zeros(dq_acc.shape[1:], jnp.float32)
      return carry

    jax.lax.fori_loop(0, shape.query_tiles, clear, None)

  @pl.when(block_schedule.has(code, block_schedule.FIRST))
  def _():
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    k_transposed[...] = k_ref[0].T

  def products(key, at):
    """Scores and the gradients of their weights, [chunk, unit] each."""
    keys = pl.ds(key, shape.chunk)
    score = dot(k_ref[0, keys], q_ref[0, 0, 0, :, at])
    return score, dot(v_ref[0, keys], d_out_ref[0, 0, 0, :, at])

  def gather(key, at, score, d_weight, lse, allowed=None):
    keys = pl.ds(key, shape.chunk)
    weight = jnp.exp2(score * (scale * LOG2E) - lse)
    if allowed is not None:
      weight = jnp.where(allowed, weight, 0.0)
    d_score = weight * (d_weight - delta_ref[0, 0, 0, :, at])
    weight, d_score = (x.astype(k_ref.dtype) for x in (weight, d_score))
    dv_acc[:, keys] += dot_transposed(d_out_ref[0, 0, 0, :, at], weight)
    dk_acc[:, keys] += dot_transposed(q_ref[0, 0, 0, :, at], d_score)
    dq_acc[i, :, at] += dot(k_transposed[:, keys], d_score)

  @pl.when(block_schedule.has(code, block_schedule.WHOLE))
  def _():
    # Rows of other segments are masked by row: exp2(score - NO_KEYS) is 0.
    mine = query_segment[0, 0] == key_only[chunk]
    lse = jnp.where(mine, lse_ref[0, 0, 0], NO_KEYS)
    ahead = products(*shape.units[0])
    for number, (key, at) in enumerate(shape.units):
      now = ahead
      if number + 1 < len(shape.units):
        ahead = products(*shape.units[number + 1])
      gather(key, at, *now, lse[:, at])

  @pl.when(block_schedule.has(code, block_schedule.PARTLY))
  def _():
    query = i + b * shape.query_tiles

    def one_chunk(c, carry):
      j = chunk + c

      @pl.when(
        (query_low[query] <= key_high[j]) & (key_low[j] <= query_high[query])
      )
      def _():
        key = pl.multiple_of(c * shape.chunk, shape.chunk)
        for at in shape.row_units:
          allowed = mask(key_segment[0, c], query_segment[0, 0, :, at])
          now = products(key, at)
          gather(key, at, *now, lse_ref[0, 0, 0, :, at], allowed)

      return carry

    jax.lax.fori_loop(0, shape.chunks, one_chunk, None)

  @pl.when(block_schedule.has(code, block_schedule.LAST))
  def _():
    dk_ref[0] = (dk_acc[...] * scale).T.astype(dk_ref.dtype)
    dv_ref[0] = dv_acc[...].T.astype(dv_ref.dtype)

  @pl.when(n == pl.num_programs(2) - 1)
  def _():
    copy = pltpu.make_async_copy(dq_acc, dq_hbm.at[b, head], sent)
    copy.start()
    copy.wait()
