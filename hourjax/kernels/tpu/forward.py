"""The forward kernel: transposed scores, and a maximum that is taken once.

One block of the schedule, of a query tile Q^T [C, rows] and a key tile with
K [keys, C] and V [keys, C]:

                     rows = G heads x queries
                   +--------------------------+
                   |  Q^T                     | C       stays for all blocks of
                   +--------------------------+         the query tile
         C         +--------------------------+
      +-----+      |                          |
      |  K  |      |  S^T = K Q^T             | keys    P^T = exp2(S^T - top)
      +-----+      +--------------------------+
                   +--------------------------+
                   |  acc += V^T P^T          | C       float32, in VMEM
                   +--------------------------+
                   |  sum += column sums, P^T | 1       float32, in VMEM
                   +--------------------------+

    for each row of the batch b, KV head, block n of the schedule:    (grid)
      if FIRST:   top, sum, acc = begin, 0, 0
      if WHOLE:   if NEW: take top of the rows that have none yet
                  for each unit: P^T = exp2(S^T - top), add to sum and acc
      if PARTLY:  for each chunk that meets the query tile:
                    mask S^T; online softmax: raise top, shrink sum and acc
      if LAST:    out = acc / sum; lse = top + log(sum)

`begin` is NEVER, or in causal attention the score of each query's own key.
Then NEW takes no maximum, and PARTLY keeps `top` as well.

It departs from FlashAttention (arXiv 2205.14135) in two ways.

Scores are transposed, [keys, rows], so that the probabilities are the
stationary operand of the second product, V^T P^T. Its contraction is over the
keys and fills the matrix unit, also the 256-wide one of v6e and TPU7x. The
other way round the stationary operand is V, whose width is the head dim, 128:
half of a 256-wide unit stays empty. The price is that probabilities have to be
pushed into the unit as weights, which it does beside the running product.

The maximum is taken once. FlashAttention rescales its sums whenever the
maximum of a row grows. Here the reference of a row, `top`, is the maximum over
the first chunk of keys that it sees, and stays. Softmax does not depend on the
reference, and float32 and bfloat16 have 8 bits of exponent: they hold weights
up to 2 ** 127 with the same relative precision as those up to 1. Only if a sum
passes `LARGEST` (scores more than 69 above the reference) or is not a number,
the kernel marks its log-sum-exp as infinite, and the whole call is repeated
with a running maximum. At worst it costs three times as much; it is never
wrong. In causal attention the reference is the score of a query's own key, so
that a sum is at least 1; where it is smaller than 1 / `LARGEST`, the query does
not see that key, and the call is repeated, too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hourjax.kernels.tpu import block_schedule, masks, tile_layout
from hourjax.kernels.tpu.tile_layout import LOG2E, NEVER, dot
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
  offset: jax.Array | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes segment-masked attention and its log-sum-exp.

  Args:
    q: queries [B, T, H, C].
    k: keys [B, S, K, C].
    v: values [B, S, K, C].
    query_segment: int32 [B, T]; 0 is padding.
    key_segment: int32 [B, S]; 0 is padding.
    shape: how the call is cut into tiles.
    vmem: bytes of VMEM that the kernel may take.
    out_dtype: of the output.
    offset: int32 [], for causal attention: the index of the first query in
      the row less that of the first key. None if it is not causal.
    interpret: False, or `pltpu.InterpretParams` to run without a TPU.

  Returns:
    out [B, T, H, C] and lse float32 [B, T, H]; a query that sees no key has
    zeros and `NEVER`.
  """
  schedule = block_schedule.make_schedule(
    tile_layout.pad(query_segment, 1, shape.query_tiles * shape.queries),
    tile_layout.pad(key_segment, 1, shape.key_tiles * shape.keys),
    query_tiles=shape.query_tiles,
    key_tiles=shape.key_tiles,
    chunks=shape.chunks,
    by_key=False,
    offset=offset,
  )
  arrays = (
    tile_layout.fold(q, shape),
    tile_layout.flat_keys(k, shape),
    tile_layout.flat_keys(v, shape),
    tile_layout.fold_segments(query_segment, shape),
    tile_layout.tile_segments(key_segment, shape),
    tile_layout.places(shape),
  )
  nothing = jnp.full(q.shape[:3], NEVER, jnp.float32)
  begin = nothing if offset is None else _own_scores(q, k, offset) * LOG2E
  begin, nothing = (
    tile_layout.fold_numbers(x, shape, fill=0.0) for x in (begin, nothing)
  )
  call = functools.partial(
    _call,
    shape=shape,
    causal=offset is not None,
    scale=q.shape[-1] ** -0.5,
    kv_heads=k.shape[2],
    vmem=vmem,
    out_dtype=out_dtype,
    interpret=interpret,
  )
  out, lse = call(schedule, (*arrays, begin), running=False)
  # The check and the repetition of which the module's docstring speaks. Both
  # kernels are in the program; the second runs only where it is needed.
  out, lse = jax.lax.cond(
    jnp.isfinite(lse).all(),
    lambda *_: (out, lse),
    functools.partial(call, running=True),
    schedule,
    (*arrays, nothing),
  )
  length, dim = q.shape[1], q.shape[3]
  return (
    tile_layout.unfold(out, shape, length, dim),
    tile_layout.unfold_numbers(lse, shape, length),
  )


def _own_scores(q: jax.Array, k: jax.Array, offset: jax.Array) -> jax.Array:
  """Returns each query's score for the key of its own index, [B, T, H]."""
  if q.shape[1] != k.shape[1]:
    index = jnp.arange(q.shape[1]) + offset
    k = jnp.take(k, index, axis=1, mode="clip")
  groups = q.shape[2] // k.shape[2]
  q, k = (x.astype(jnp.float32) for x in (q, k))
  q = q.reshape(*k.shape[:3], groups, -1)
  score = (q * k[:, :, :, None]).sum(-1)
  return score.reshape(*q.shape[:2], -1) * q.shape[-1] ** -0.5


def _call(
  schedule: block_schedule.BlockSchedule,
  arrays: tuple[jax.Array, ...],
  *,
  running: bool,
  causal: bool,
  shape: Shape,
  scale: float,
  kv_heads: int,
  vmem: int,
  out_dtype: jax.typing.DTypeLike,
  interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
  """Runs the kernel.

  Args:
    schedule: its grid.
    arrays: q, k, v and segment ids, in tiles, and `tile_layout.places`.
    running: whether the maximum runs in every block.
    causal: whether a query sees only keys up to its own index.
    shape: how the call is cut into tiles.
    scale: of the scores.
    kv_heads: K.
    vmem: bytes of VMEM that the kernel may take.
    out_dtype: of the output.
    interpret: as for `forward`.

  Returns:
    out [B, K, tiles, C, rows] and lse [B, K, tiles, 1, rows].
  """
  q, k = arrays[:2]
  rows, most = schedule.blocks.shape
  at = block_schedule.index_maps(most)
  queries = pl.BlockSpec((1, 1, 1, shape.dim, shape.rows), at.query)
  numbers = pl.BlockSpec((1, 1, 1, 1, shape.rows), at.query)
  keys = pl.BlockSpec((1, shape.keys, shape.dim), at.key)
  pairs = rows * kv_heads * shape.query_tiles * shape.rows * k.shape[1]
  pairs //= 2 if causal else 1
  return pl.pallas_call(
    functools.partial(
      _kernel,
      shape=shape,
      most=most,
      to_power=scale * LOG2E,
      running=running,
      causal=causal,
    ),
    out_shape=(
      jax.ShapeDtypeStruct(q.shape, out_dtype),
      jax.ShapeDtypeStruct((*q.shape[:3], 1, shape.rows), jnp.float32),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=7,  # what `schedule.scalars` returns
      # As long as the longest schedule of all rows, known when it runs.
      grid=(rows, kv_heads, schedule.count),
      in_specs=[
        queries,
        keys,
        keys,
        pl.BlockSpec((1, 1, 1, shape.rows), at.query_segment),
        pl.BlockSpec((1, shape.chunks, 1, shape.chunk), at.key_segment),
        pl.BlockSpec((1, shape.rows), at.place),
        numbers,
      ],
      out_specs=(queries, numbers),
      scratch_shapes=[
        pltpu.VMEM((1, shape.rows), jnp.float32),  # top
        pltpu.VMEM((1, shape.rows), jnp.float32),  # sum
        pltpu.VMEM((shape.dim, shape.rows), jnp.float32),  # acc
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      # Blocks of one query tile add to the same scratch, so in order.
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem,
    ),
    cost_estimate=pl.CostEstimate(
      flops=4 * pairs * shape.dim,  # two products, a multiply and an add each
      transcendentals=pairs,
      bytes_accessed=2 * q.nbytes + 2 * shape.query_tiles * k.nbytes,
    ),
    interpret=interpret,
    name="attention_forward" + "_causal" * causal + "_running" * running,
  )(*schedule.scalars(), *arrays)


def _kernel(
  blocks_ref: jax.Ref,  # the schedule and its ranges, in scalar memory, flat
  offset: jax.Ref,
  query_low: jax.Ref,
  query_high: jax.Ref,
  key_low: jax.Ref,
  key_high: jax.Ref,
  key_only: jax.Ref,
  q_ref: jax.Ref,  # [1, 1, 1, C, rows]
  k_ref: jax.Ref,  # [1, keys, C]
  v_ref: jax.Ref,  # [1, keys, C]
  query_segment: jax.Ref,  # [1, 1, 1, rows]
  key_segment: jax.Ref,  # [1, chunks, 1, chunk]
  place: jax.Ref,  # [1, rows]
  begin: jax.Ref,  # [1, 1, 1, 1, rows]
  out_ref: jax.Ref,  # [1, 1, 1, C, rows]
  lse_ref: jax.Ref,  # [1, 1, 1, 1, rows]
  top_ref: jax.Ref,  # [1, rows]: the reference, in powers of two
  sum_ref: jax.Ref,  # [1, rows]
  acc_ref: jax.Ref,  # [C, rows]
  *,
  shape: Shape,
  most: int,
  to_power: float,
  running: bool,
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
    k_ref: a key tile.
    v_ref: its values.
    query_segment: ids of the query tile.
    key_segment: ids of the key tile.
    place: which query of its tile a row is.
    begin: the reference to begin with, in powers of two.
    out_ref: the output tile.
    lse_ref: its log-sum-exp.
    top_ref: scratch.
    sum_ref: scratch.
    acc_ref: scratch.
    shape: how the call is cut into tiles.
    most: blocks for which each row of the schedule has room.
    to_power: factor from scores to powers of two: the scale, and log2(e).
    running: whether the maximum runs in every block.
    causal: whether a query sees only keys up to its own index.
  """
  kept = causal and not running  # references are those of `begin`
  b = pl.program_id(0)
  block = blocks_ref[b * most + pl.program_id(2)]
  # Number of this tile's first chunk in the flat ranges of all rows.
  chunk = (block_schedule.key_tile(block) + b * shape.key_tiles) * shape.chunks

  @pl.when(block_schedule.has(block, block_schedule.FIRST))
  def _() -> None:
    top_ref[...] = begin[0, 0, 0]
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def scores(key: int | jax.Array, at: slice) -> jax.Array:
    """Returns a unit's scores [chunk, unit] in powers of two, float32."""
    keys = k_ref[0, pl.ds(key, shape.chunk)]
    # Scaled here, in float32: scaling q before the product would round it.
    return dot(keys, q_ref[0, 0, 0, :, at]) * to_power

  def values(key: int | jax.Array) -> jax.Array:
    """Returns a chunk's values, transposed to [C, chunk]."""
    return v_ref[0, pl.ds(key, shape.chunk)].T

  def add(
    at: slice,
    weight: jax.Array,
    value: jax.Array,
    shrink: jax.Array | float = 1.0,
  ) -> None:
    """Adds a unit's weights [chunk, unit] to the sums of its rows."""
    # The sum, which divides all channels, is of the float32 weights; only the
    # product takes them rounded to the dtype of the values.
    sum_ref[:, at] = sum_ref[:, at] * shrink + weight.sum(0, keepdims=True)
    more = dot(value, weight.astype(value.dtype))
    acc_ref[:, at] = acc_ref[:, at] * shrink + more

  def one_segment() -> None:
    """Adds a block whose keys are all of one segment.

    No score needs a mask of its own: a row is either of this segment or not.
    """
    mine = query_segment[0, 0] == key_only[chunk]

    def find_reference() -> None:
      for at in shape.row_units:
        top = scores(0, at).max(0, keepdims=True)
        fresh = mine[:, at] & (top_ref[:, at] == NEVER)
        top_ref[:, at] = jnp.where(fresh, top, top_ref[:, at])

    # Rows without a reference exist only in the first key tile of a segment.
    if not causal:
      pl.when(block_schedule.has(block, block_schedule.NEW))(find_reference)
    # For rows of other segments the reference is huge: exp2(score + NEVER) is
    # 0. So masking costs one operation a row, and none a score.
    reference = jnp.where(mine, top_ref[...], -NEVER)
    # The scores of a unit are multiplied one unit ahead, so that the matrix
    # unit works while the vector units exponentiate.
    ahead, value = scores(*shape.units[0]), None
    for number, (key, at) in enumerate(shape.units):
      score = ahead
      if number + 1 < len(shape.units):
        ahead = scores(*shape.units[number + 1])
      if value is None or at.start == 0:  # units of a chunk share its values
        value = values(key)
      add(at, jnp.exp2(score - reference[:, at]), value)

  def some_chunks() -> None:
    """Adds a block chunk by chunk, each with the masks that it needs."""
    tile = block_schedule.query_tile(block)
    i = tile + b * shape.query_tiles
    # Index of the tile's first query, counted from the block's first key.
    first = offset[0] + tile * shape.queries
    first -= block_schedule.key_tile(block) * shape.keys

    def add_chunk(c: jax.Array, only: jax.Array | None, diagonal: bool) -> None:
      """Adds chunk c.

      Args:
        c: its number.
        only: the segment of all its keys, or None.
        diagonal: whether some of its keys may lie after some of the queries.
      """
      key = pl.multiple_of(c * shape.chunk, shape.chunk)
      value = values(key)
      ids = masks.column(key_segment[0, c]) if only is None else None
      units = shape.row_units
      ahead = scores(key, units[0])
      for number, at in enumerate(units):
        score = ahead
        if number + 1 < len(units):
          ahead = scores(key, units[number + 1])
        mine = query_segment[0, 0, :, at]
        last = place[:, at] + (first - key) if diagonal else None
        allowed = masks.allowed(ids, only, mine, last, shape.chunk)
        if allowed is not None:
          score = jnp.where(allowed, score, NEVER)
        old = top_ref[:, at]
        if kept:
          # NEVER less a reference is far below 0: no weight, as it should be.
          if allowed is None:
            old = jnp.where(mine == only, old, -NEVER)
          add(at, jnp.exp2(score - old), value)
          continue
        # The online softmax: raise the reference to the chunk's maximum, and
        # shrink what was summed with the old one. A row that sees nothing
        # here keeps its reference, and its weights are exp2(. + NEVER) = 0.
        peak = score.max(0, keepdims=True)
        seen = mine == only if allowed is None else peak > NEVER
        top = jnp.where(seen, jnp.maximum(old, peak), old)
        top_ref[:, at] = top
        weight = jnp.exp2(score - jnp.where(seen, top, -NEVER))
        add(at, weight, value, jnp.exp2(old - top))

    def one_chunk(c: jax.Array, carry: None) -> None:
      j = chunk + c
      meets = (query_low[i] <= key_high[j]) & (key_low[j] <= query_high[i])
      only = key_only[j]
      if causal:
        masks.by_kind(
          functools.partial(add_chunk, c),
          meets=meets,
          only=only,
          first=first - c * shape.chunk,
          shape=shape,
        )
      else:
        pl.when(meets & (only > 0))(lambda: add_chunk(c, only, False))
        pl.when(meets & (only == 0))(lambda: add_chunk(c, None, False))
      return carry

    # A loop, not unrolled as in `one_segment`: few blocks come here, and each
    # chunk asks first whether it meets the query tile at all.
    jax.lax.fori_loop(0, shape.chunks, one_chunk, None)

  if running:
    pl.when(
      block_schedule.has(block, block_schedule.WHOLE | block_schedule.PARTLY)
    )(some_chunks)
  else:
    pl.when(block_schedule.has(block, block_schedule.WHOLE))(one_segment)
    pl.when(block_schedule.has(block, block_schedule.PARTLY))(some_chunks)

  @pl.when(block_schedule.has(block, block_schedule.LAST))
  def _() -> None:
    total = sum_ref[...]
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out_ref[0, 0, 0] = (acc_ref[...] / safe).astype(out_ref.dtype)
    lse = top_ref[...] / LOG2E + jnp.log(safe)
    # Infinite where the sum is not a number or too large, which happens when
    # scores rise far above the reference: `forward` then repeats the call.
    lse = jnp.where(total <= LARGEST, lse, jnp.inf)
    lse = jnp.where(total == 0, NEVER, lse)
    if kept:
      # The reference was a key that the query does not see, and its own sum
      # is lost in rounding; or it sees none, which only the repetition knows.
      lost = (query_segment[0, 0] > 0) & (total < 1 / LARGEST)
      lse = jnp.where(lost, jnp.inf, lse)
    lse_ref[0, 0, 0] = lse
