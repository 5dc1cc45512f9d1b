"""The backward kernel: one sweep over the keys, five products a block.

One block of the schedule, of a query tile and a key tile. All large squares
are [keys, rows], as in the forward kernel:

    S^T  = K Q^T                 scores, computed anew          product 1
    P^T  = exp2(S^T - lse)       weights, normalised by lse
    dP^T = V dO^T                gradients of the weights       product 2
    dS^T = P^T * (dP^T - delta)  gradients of the scores

    dv^T += dO^T P       [C, keys]   in VMEM, of this key tile      product 3
    dk^T += Q^T dS       [C, keys]   in VMEM, of this key tile      product 4
    dq^T += K^T dS^T     [C, rows]   in VMEM, of all query tiles    product 5

    for each row of the batch b, KV head:                         (grid)
      dq of all query tiles = 0
      for each block n of the schedule, by key tile:              (grid)
        if FIRST:   dk, dv = 0, 0
        if WHOLE:   for each unit: products 1 to 5
        if PARTLY:  for each chunk that meets the query tile: mask, 1 to 5
                    (causal: each chunk with no more masks than it needs)
        if LAST:    write dk and dv of the key tile
      copy dq to HBM

Blocks go key tile by key tile: dk and dv are summed in VMEM while a key tile
stays, and are written once. Queries are few beside the keys, so dq of all
queries of a KV group stays in VMEM for the whole sweep (38 MiB for 9,728
queries of 8 heads), and no partial dq goes to HBM, where two tiles would have
to take turns in adding to it. Where dq does not fit, the queries are split and
the keys swept once for each part (`kernels.tpu.call`).

Products 3 to 5 have the matrix of weights or of their gradients as the
stationary operand, which is why their results are transposed.

`delta`, the sum over C of out * dO, and `lse` come from outside: they are over
all keys there are, of which this kernel may see a part.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hourjax.kernels.constants import NO_KEYS
from hourjax.kernels.tpu import block_schedule, masks, tile_layout
from hourjax.kernels.tpu.tile_layout import LOG2E, dot, dot_transposed
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
  offset: jax.Array | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes the gradients of q, k and v.

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
    shape: how the call is cut into tiles.
    vmem: bytes of VMEM that the kernel may take.
    grad_dtype: of dk and dv.
    offset: int32 [], for causal attention: the index of the first query in
      the row less that of the first key. None if it is not causal.
    interpret: False, or `pltpu.InterpretParams` to run without a TPU.

  Returns:
    dq float32 [B, T, H, C], dk and dv [B, S, K, C].
  """
  schedule = block_schedule.make_schedule(
    tile_layout.pad(query_segment, 1, shape.query_tiles * shape.queries),
    tile_layout.pad(key_segment, 1, shape.key_tiles * shape.keys),
    query_tiles=shape.query_tiles,
    key_tiles=shape.key_tiles,
    chunks=shape.chunks,
    by_key=True,
    offset=offset,
  )
  rows, heads, scale = q.shape[0], k.shape[2], q.shape[-1] ** -0.5
  causal = offset is not None
  most = schedule.blocks.shape[1]

  at = block_schedule.index_maps(most)
  queries = pl.BlockSpec((1, 1, 1, shape.dim, shape.rows), at.query)
  numbers = pl.BlockSpec((1, 1, 1, 1, shape.rows), at.query)
  keys = pl.BlockSpec((1, shape.keys, shape.dim), at.key)
  folded = tile_layout.fold(q, shape)
  flat = tile_layout.flat_keys(k, shape)
  pairs = rows * heads * shape.query_tiles * shape.rows * flat.shape[1]
  pairs //= 2 if causal else 1
  grad = jax.ShapeDtypeStruct(flat.shape, grad_dtype)
  dq, dk, dv = pl.pallas_call(
    functools.partial(
      _kernel,
      shape=shape,
      most=most,
      scale=scale,
      causal=causal,
    ),
    out_shape=(jax.ShapeDtypeStruct(folded.shape, jnp.float32), grad, grad),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=7,  # what `schedule.scalars` returns
      # As long as the longest schedule of all rows, known when it runs.
      grid=(rows, heads, schedule.count),
      in_specs=[
        queries,
        queries,
        numbers,
        numbers,
        keys,
        keys,
        pl.BlockSpec((1, 1, 1, shape.rows), at.query_segment),
        pl.BlockSpec((1, shape.chunks, 1, shape.chunk), at.key_segment),
        pl.BlockSpec((1, shape.rows), at.place),
      ],
      # dq stays in HBM for Pallas: the kernel itself copies it, once.
      out_specs=(pl.BlockSpec(memory_space=pl.ANY), keys, keys),
      scratch_shapes=[
        pltpu.VMEM(folded.shape[2:], jnp.float32),  # dq of all query tiles
        pltpu.VMEM((shape.dim, shape.keys), jnp.float32),  # dk
        pltpu.VMEM((shape.dim, shape.keys), jnp.float32),  # dv
        pltpu.VMEM((shape.dim, shape.keys), k.dtype),  # k, transposed
        pltpu.SemaphoreType.DMA,  # of the copy of dq
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      # Blocks add to the same scratch, so in order.
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=pl.CostEstimate(
      flops=10 * pairs * shape.dim,  # five products, a multiply and an add each
      transcendentals=pairs,
      bytes_accessed=4 * flat.nbytes  # k, v, dk, dv once
      + shape.key_tiles * 2 * folded.nbytes  # q and d_out for each key tile
      + 4 * folded.size,  # dq once, float32
    ),
    interpret=interpret,
    name="attention_backward" + "_causal" * causal,
  )(
    *schedule.scalars(),
    folded,
    tile_layout.fold(d_out.astype(q.dtype), shape),
    # Padding gets NO_KEYS, with which all its weights are 0.
    tile_layout.fold_numbers(lse * LOG2E, shape, fill=NO_KEYS),
    tile_layout.fold_numbers(delta, shape, fill=0.0),
    flat,
    tile_layout.flat_keys(v, shape),
    tile_layout.fold_segments(query_segment, shape),
    tile_layout.tile_segments(key_segment, shape),
    tile_layout.places(shape),
  )
  length, dim = q.shape[1], q.shape[3]
  return (
    # dS is that of the scaled scores; one more factor makes it that of q k^T.
    # On [C, rows] that is far fewer numbers than on [keys, rows].
    tile_layout.unfold(dq, shape, length, dim) * scale,
    tile_layout.unflat_keys(dk, heads, k.shape[1], dim),
    tile_layout.unflat_keys(dv, heads, k.shape[1], dim),
  )


def _kernel(
  blocks_ref: jax.Ref,  # the schedule and its ranges, in scalar memory, flat
  offset: jax.Ref,
  query_low: jax.Ref,
  query_high: jax.Ref,
  key_low: jax.Ref,
  key_high: jax.Ref,
  key_only: jax.Ref,
  q_ref: jax.Ref,  # [1, 1, 1, C, rows]
  d_out_ref: jax.Ref,  # [1, 1, 1, C, rows]
  lse_ref: jax.Ref,  # [1, 1, 1, 1, rows], in powers of two
  delta_ref: jax.Ref,  # [1, 1, 1, 1, rows]
  k_ref: jax.Ref,  # [1, keys, C]
  v_ref: jax.Ref,  # [1, keys, C]
  query_segment: jax.Ref,  # [1, 1, 1, rows]
  key_segment: jax.Ref,  # [1, chunks, 1, chunk]
  place: jax.Ref,  # [1, rows]
  dq_hbm: jax.Ref,  # [B, K, query tiles, C, rows]
  dk_ref: jax.Ref,  # [1, keys, C]
  dv_ref: jax.Ref,  # [1, keys, C]
  dq_acc: jax.Ref,  # [query tiles, C, rows]
  dk_acc: jax.Ref,  # [C, keys]
  dv_acc: jax.Ref,  # [C, keys]
  k_transposed: jax.Ref,  # [C, keys]
  sent: jax.Ref,
  *,
  shape: Shape,
  most: int,
  scale: float,
  causal: bool,
) -> None:
  """Computes one block, as the module's docstring shows.

  Args:
    blocks_ref: blocks of the schedule. Shapes of all references are beside the
      parameters above.
    offset: the index of the first query less that of the first key.
    query_low: least segment id of each query tile.
    query_high: largest segment id of each query tile.
    key_low: least segment id of each key chunk.
    key_high: largest segment id of each key chunk.
    key_only: the one id that all keys of a chunk have, or 0 if they differ.
    q_ref: a query tile.
    d_out_ref: gradient of its output.
    lse_ref: its log-sum-exp.
    delta_ref: its sums of out * d_out.
    k_ref: a key tile.
    v_ref: its values.
    query_segment: ids of the query tile.
    key_segment: ids of the key tile.
    place: which query of its tile a row is.
    dq_hbm: gradients of all queries.
    dk_ref: gradients of the key tile.
    dv_ref: gradients of its values.
    dq_acc: scratch.
    dk_acc: scratch.
    dv_acc: scratch.
    k_transposed: scratch.
    sent: semaphore of the copy of dq.
    shape: how the call is cut into tiles.
    most: blocks for which each row of the schedule has room.
    scale: of the scores.
    causal: whether a query sees only keys up to its own index.
  """
  b, head, n = (pl.program_id(axis) for axis in range(3))
  block = blocks_ref[b * most + n]
  i = block_schedule.query_tile(block)
  # Number of this tile's first chunk in the flat ranges of all rows.
  chunk = (block_schedule.key_tile(block) + b * shape.key_tiles) * shape.chunks

  @pl.when(n == 0)
  def _() -> None:
    # Tile by tile: one assignment to all of it would be unrolled by the
    # compiler into as many stores as 38 MiB have registers.
    def clear(tile: jax.Array, carry: None) -> None:
      dq_acc[tile] = jnp.zeros(dq_acc.shape[1:], jnp.float32)
      return carry

    jax.lax.fori_loop(0, shape.query_tiles, clear, None)

  @pl.when(block_schedule.has(block, block_schedule.FIRST))
  def _() -> None:
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    # Product 5 wants K^T. It is transposed once for all blocks of the tile.
    k_transposed[...] = k_ref[0].T

  def products(key: int | jax.Array, at: slice) -> tuple[jax.Array, jax.Array]:
    """Returns S^T and dP^T of a unit, [chunk, unit] each: products 1 and 2."""
    keys = pl.ds(key, shape.chunk)
    score = dot(k_ref[0, keys], q_ref[0, 0, 0, :, at])
    return score, dot(v_ref[0, keys], d_out_ref[0, 0, 0, :, at])

  def add(
    key: int | jax.Array,
    at: slice,
    score: jax.Array,
    d_weight: jax.Array,
    lse: jax.Array,
    allowed: jax.Array | None = None,
  ) -> None:
    """Adds a unit to dv, dk and dq: products 3 to 5.

    Args:
      key: first key of the unit in its tile.
      at: rows of the unit.
      score: S^T of the unit.
      d_weight: dP^T of the unit.
      lse: of the rows, in powers of two.
      allowed: which scores count, bool [chunk, unit]; None if `lse` already
        masks whole rows.
    """
    keys = pl.ds(key, shape.chunk)
    weight = jnp.exp2(score * (scale * LOG2E) - lse)
    if allowed is not None:
      weight = jnp.where(allowed, weight, 0.0)
    # In float32: dP^T and delta nearly cancel. Only the results are rounded,
    # to the dtype in which the matrix unit multiplies.
    d_score = weight * (d_weight - delta_ref[0, 0, 0, :, at])
    weight, d_score = (x.astype(k_ref.dtype) for x in (weight, d_score))
    dv_acc[:, keys] += dot_transposed(d_out_ref[0, 0, 0, :, at], weight)
    dk_acc[:, keys] += dot_transposed(q_ref[0, 0, 0, :, at], d_score)
    dq_acc[i, :, at] += dot(k_transposed[:, keys], d_score)

  @pl.when(block_schedule.has(block, block_schedule.WHOLE))
  def _() -> None:
    # Rows of other segments are masked by row: exp2(score - NO_KEYS) is 0.
    mine = query_segment[0, 0] == key_only[chunk]
    lse = jnp.where(mine, lse_ref[0, 0, 0], NO_KEYS)
    # Products 1 and 2 run one unit ahead of 3 to 5, as in the forward kernel.
    ahead = products(*shape.units[0])
    for number, (key, at) in enumerate(shape.units):
      now = ahead
      if number + 1 < len(shape.units):
        ahead = products(*shape.units[number + 1])
      add(key, at, *now, lse[:, at])

  @pl.when(block_schedule.has(block, block_schedule.PARTLY))
  def _() -> None:
    query = i + b * shape.query_tiles
    # Index of the tile's first query, counted from the block's first key.
    first = offset[0] + i * shape.queries
    first -= block_schedule.key_tile(block) * shape.keys

    def add_chunk(c: jax.Array, only: jax.Array | None, diagonal: bool) -> None:
      """Adds chunk c; arguments are those of the forward kernel's."""
      key = pl.multiple_of(c * shape.chunk, shape.chunk)
      ids = masks.column(key_segment[0, c]) if only is None else None
      units = shape.row_units
      ahead = products(key, units[0])
      for number, at in enumerate(units):
        now = ahead
        if number + 1 < len(units):
          ahead = products(key, units[number + 1])
        mine, lse = query_segment[0, 0, :, at], lse_ref[0, 0, 0, :, at]
        last = place[:, at] + (first - key) if diagonal else None
        allowed = masks.allowed(ids, only, mine, last, shape.chunk)
        if allowed is None:
          lse = jnp.where(mine == only, lse, NO_KEYS)
        add(key, at, *now, lse, allowed)

    def one_chunk(c: jax.Array, carry: None) -> None:
      j = chunk + c
      low, high = query_low[query], query_high[query]
      meets = (low <= key_high[j]) & (key_low[j] <= high)
      if causal:
        masks.by_kind(
          functools.partial(add_chunk, c),
          meets=meets,
          only=key_only[j],
          first=first - c * shape.chunk,
          shape=shape,
        )
      else:
        pl.when(meets)(lambda: add_chunk(c, None, False))
      return carry

    jax.lax.fori_loop(0, shape.chunks, one_chunk, None)

  @pl.when(block_schedule.has(block, block_schedule.LAST))
  def _() -> None:
    # The scale of the scores, as for dq; dv has none.
    dk_ref[0] = (dk_acc[...] * scale).T.astype(dk_ref.dtype)
    dv_ref[0] = dv_acc[...].T.astype(dv_ref.dtype)

  @pl.when(n == pl.num_programs(2) - 1)
  def _() -> None:
    copy = pltpu.make_async_copy(dq_acc, dq_hbm.at[b, head], sent)
    copy.start()
    # The next KV head sets dq to zero, so the copy has to be done by then.
    copy.wait()
