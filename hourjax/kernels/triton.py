"""Attention on NVIDIA GPUs: Pallas kernels that Triton compiles.

FlashAttention-2 (arXiv 2307.08691) with segments and grouped heads. The
backward takes the log-sum-exp from outside, so that the keys may be one
device's part. There are no atomics: the same inputs give the same bits.

  kernel     one program per          loops over
  forward    query tile and head      key tiles
  dq         query tile and head      key tiles
  dk and dv  key tile and KV head     query tiles, and in each the G heads

  forward, one program:                   dk and dv, one program:
    q [query, C] in registers               k, v [key, C] in registers
    for key tiles low .. high:              for query tiles and heads:
      S = q k^T        [query, key]           S^T = k q^T    [key, query]
      raise top, shrink total, acc            P^T = exp2(S^T - lse)
      P = exp2(S - top)                       dv += P^T dO
      acc += P v                              dS^T = P^T * (v dO^T - delta)
    out = acc / total                         dk += dS^T q

dq's program is as forward's: dS = P * (dO v^T - delta), dq += dS k.

The G heads of a group are programs of their own, not rows of one tile: either
way T * H / tile programs read their keys once each, and G may be 7, while
tiles are powers of two. They are launched side by side, to share keys in L2.

What has more elements than an index of 32 bits has numbers for, such as 18
hours of video for 7B, is computed in parts (`kernels.chunking`).

A program loops only over the tiles between the first and the last whose
segment ids can match its own: a row packed with short samples costs about the
sum of its T_i x S_i.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from hourjax.kernels import chunking
from hourjax.kernels.constants import NO_PART


class Tile(NamedTuple):
  """Holds the sizes of a kernel's tiles, and how Triton compiles it.

  Attributes:
    query: queries of a tile.
    key: keys of a tile.
    warps: of 32 threads, that work on a program.
    stages: of the pipeline that loads tiles ahead of their use.
  """

  query: int
  key: int
  warps: int
  stages: int


# By kernel and bytes of a number. Shared memory of sm_90 at C = 128, of the
# 227 KiB of an H100 or H200, and registers spilled, as Triton 3.6 compiles it:
TILES = {
  # q 32 KiB + 3 stages of k and v, 16 KiB each = 128 KiB; none spilled.
  ("forward", 2): Tile(128, 64, warps=8, stages=3),
  # q and d_out 32 KiB each + 3 stages of k and v = 160 KiB; none spilled.
  ("dq", 2): Tile(128, 64, warps=8, stages=3),
  # k and v 32 KiB each + 2 stages of q and d_out = 128 KiB; 116 bytes spilled.
  ("dkv", 2): Tile(64, 128, warps=8, stages=2),
  # Exact and slow, without tensor cores: to check with. At most 69 KiB.
  **{(name, 4): Tile(32, 32, 8, 2) for name in ("forward", "dq", "dkv")},
}
_MAX_HEAD_DIM = 128  # what TILES leaves shared memory for
_MAX_ELEMENTS = 2**31 - 1  # of one row of the batch and one call
_LOG2_E = math.log2(math.e)  # the GPU has exp2, not exp


def forward(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  v: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  *,
  causal: bool = False,
  out_dtype: jax.typing.DTypeLike | None = None,
  interpret: bool = False,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
  """Computes segment-masked grouped-query attention and its log-sum-exp.

  FlashAttention-2, algorithm 1.

  Scores are scaled by C ** -0.5. Products are of the dtype of q (float32 at
  full precision), sums and softmax float32.

  Args:
    q: queries, bfloat16 or float32. Head h reads KV head h // (H / K).
    k: keys, in the dtype of q.
    v: values, in the dtype of q.
    query_segment: int32; a query sees the keys of its own id, 0 sees nothing.
    key_segment: int32; 0 is padding.
    causal: query t also sees only the keys at index s <= t (needs T == S).
    out_dtype: of the output; None is the dtype of q.
    interpret: run on any device, slowly.

  Returns:
    The output, and in float32 the natural log of the sum of exp(score).
    A query that sees no key has zeros and -1e30.

  Raises:
    ValueError: for other dtypes, a head dim above 128, and causal attention
      of more elements than an index of 32 bits counts.
  """
  lengths = _check(q, k, v, causal)

  def call(
    *inputs: jax.Array, out_dtype: jax.typing.DTypeLike
  ) -> tuple[jax.Array, jax.Array]:
    outputs = (("BTHC", out_dtype), ("BHT", jnp.float32))
    out, lse = _run("forward", inputs, outputs, causal, interpret)
    return out, jnp.swapaxes(lse, 1, 2)

  inputs = (q, k, v, query_segment, key_segment)
  out_dtype = out_dtype or q.dtype
  return chunking.forward(
    call,
    *inputs,
    queries=lengths["queries"],
    keys=lengths["keys"],
    out_dtype=out_dtype,
  )


def backward(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  v: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  lse: Float[Array, "B T H"],
  delta: Float[Array, "B T H"],
  d_out: Float[Array, "B T H C"],
  *,
  causal: bool = False,
  interpret: bool = False,
) -> tuple[
  Float[Array, "B T H C"], Float[Array, "B S K C"], Float[Array, "B S K C"]
]:
  """Computes the gradients of q, k and v; FlashAttention-2, algorithm 2.

  Errors are those of `forward`.

  Args:
    q: as for `forward`.
    k: as for `forward`, or a part of the keys: then dq is this part's summand
      of the whole.
    v: as for `forward`; the same part.
    query_segment: as for `forward`.
    key_segment: as for `forward`.
    lse: float32 log-sum-exp over all keys, also those that k does not hold;
      any finite number for a query that sees none.
    delta: float32 sum over C of out * d_out, of the output over all keys.
    d_out: gradient of that output; products take it in the dtype of q.
    causal: as for `forward`.
    interpret: as for `forward`.

  Returns:
    dq in float32, dk and dv in the dtype of k.
  """
  lengths = _check(q, k, v, causal)

  def call(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *others: jax.Array,
    grad_dtype: jax.typing.DTypeLike,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    *segments, lse, delta, d_out = others
    stats = (jnp.swapaxes(x, 1, 2) for x in (lse * _LOG2_E, delta))
    inputs = (q, k, v, *segments, d_out.astype(q.dtype), *stats)
    (dq,) = _run("dq", inputs, [("BTHC", jnp.float32)], causal, interpret)
    dk, dv = _run("dkv", inputs, [("BSKC", grad_dtype)] * 2, causal, interpret)
    return dq, dk, dv

  inputs = (q, k, v, query_segment, key_segment, lse, delta, d_out)
  return chunking.backward(
    call, *inputs, queries=lengths["queries"], keys=lengths["keys"]
  )


def _check(
  q: jax.Array, k: jax.Array, v: jax.Array, causal: bool
) -> dict[str, int]:
  """Refuses what the kernels do not support.

  Returns:
    Most queries and most keys of one part.
  """
  dtypes = q.dtype, k.dtype, v.dtype
  if len(set(dtypes)) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      "q, k and v must all be bfloat16 or all float32, got"
      f" {', '.join(map(str, dtypes))}; convert them"
    )
  if q.shape[3] > _MAX_HEAD_DIM:
    raise ValueError(
      f"head dim {q.shape[3]} > {_MAX_HEAD_DIM}, for which the tiles fit"
      " shared memory; add smaller ones to TILES"
    )
  lengths = {}
  tiles = [TILES[name, q.dtype.itemsize] for name in _KERNELS]
  for name, x, step in (
    ("queries", q, max(tile.query for tile in tiles)),
    ("keys", k, max(tile.key for tile in tiles)),
  ):
    each = x.shape[2] * _padded_dim(x.shape[3])
    most = _MAX_ELEMENTS // (each * step) * step
    if causal and x.shape[1] > most:
      raise ValueError(
        f"causal attention takes at most {most} {name} of {x.shape[2]} heads,"
        f" got {x.shape[1]}; shard them over more devices"
      )
    lengths[name] = chunking.even_length(x.shape[1], most, step)
  return lengths


def _padded_dim(dim: int) -> int:
  return max(16, pl.next_power_of_2(dim))  # 16: Triton's least dot


# In the kernels, masked scores are -inf less something finite, so that their
# weights are exactly 0: `top` starts at NO_PART and lse is finite.


def _forward_kernel(
  tile: Tile, causal: bool, scale: float, *refs: jax.Ref
) -> None:
  """Computes one query tile of one head; see the module's docstring."""
  range_ref, q_ref, k_ref, v_ref, query_ref, key_ref, out_ref, lse_ref = refs
  q = q_ref[...]
  queries = _places(query_ref[...], pl.program_id(1), 1)

  def step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    top, total, acc = carry
    here = pl.ds(j * tile.key, tile.key)
    v = v_ref[here, :]
    score = _dot(q, k_ref[here, :].T) * (scale * _LOG2_E)
    score = _masked(score, queries, _places(key_ref[here], j, 0), causal)
    new_top = jnp.maximum(top, jnp.max(score, 1))
    weight = jnp.exp2(score - new_top[:, None])
    shrink = jnp.exp2(top - new_top)
    acc = acc * shrink[:, None] + _dot(weight.astype(v.dtype), v)
    return new_top, total * shrink + jnp.sum(weight, 1), acc

  none = jnp.zeros((tile.query,), jnp.float32)
  start = (none + NO_PART, none, jnp.zeros(q.shape, jnp.float32))
  top, total, acc = jax.lax.fori_loop(range_ref[0], range_ref[1], step, start)
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
  lse_ref[...] = jnp.where(seen, (top + jnp.log2(total)) / _LOG2_E, NO_PART)


def _dq_kernel(tile: Tile, causal: bool, scale: float, *refs: jax.Ref) -> None:
  """Computes dq of one query tile of one head."""
  range_ref, q_ref, k_ref, v_ref, query_ref, key_ref = refs[:6]
  d_out_ref, lse_ref, delta_ref, dq_ref = refs[6:]
  q, d_out = q_ref[...], d_out_ref[...]
  lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]
  queries = _places(query_ref[...], pl.program_id(1), 1)

  def step(j: jax.Array, dq: jax.Array) -> jax.Array:
    here = pl.ds(j * tile.key, tile.key)
    k, v = k_ref[here, :], v_ref[here, :]
    score = _dot(q, k.T) * (scale * _LOG2_E)
    score = _masked(score, queries, _places(key_ref[here], j, 0), causal)
    d_score = jnp.exp2(score - lse) * (_dot(d_out, v.T) - delta)
    return dq + _dot(d_score.astype(k.dtype), k)

  zeros = jnp.zeros(q.shape, jnp.float32)
  dq = jax.lax.fori_loop(range_ref[0], range_ref[1], step, zeros)
  dq_ref[...] = dq * scale


def _dkv_kernel(tile: Tile, causal: bool, scale: float, *refs: jax.Ref) -> None:
  """Computes dk and dv of one key tile of one KV head."""
  range_ref, q_ref, k_ref, v_ref, query_ref, key_ref = refs[:6]
  d_out_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs[6:]
  k, v = k_ref[...], v_ref[...]
  keys = _places(key_ref[...], pl.program_id(1), 1)
  groups = q_ref.shape[1]

  # Scores are transposed, [key, query], so that the next products have them
  # on the left, where tensor cores read registers.
  def step(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    dk, dv = carry
    i, g = jax.lax.div(n, groups), jax.lax.rem(n, groups)
    here = pl.ds(i * tile.query, tile.query)
    q, d_out = q_ref[here, g, :], d_out_ref[here, g, :]
    score = _dot(k, q.T) * (scale * _LOG2_E)
    score = _masked(score, _places(query_ref[here], i, 0), keys, causal)
    weight = jnp.exp2(score - lse_ref[g, here][None])
    dv += _dot(weight.astype(q.dtype), d_out)
    d_score = weight * (_dot(v, d_out.T) - delta_ref[g, here][None])
    return dk + _dot(d_score.astype(q.dtype), q), dv

  # One loop over tiles and heads, not two: its pipeline fills once.
  low, high = range_ref[0] * groups, range_ref[1] * groups
  zeros = jnp.zeros(k.shape, jnp.float32)
  dk, dv = jax.lax.fori_loop(low, high, step, (zeros, zeros))
  dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
  dv_ref[...] = dv.astype(dv_ref.dtype)


def _places(
  ids: jax.Array, tile_index: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
  """Returns ids and indices of a tile, to broadcast along `axis` of scores."""
  index = tile_index * ids.size + jnp.arange(ids.size, dtype=jnp.int32)
  return jnp.expand_dims(ids, axis), jnp.expand_dims(index, axis)


def _masked(
  score: jax.Array,
  queries: tuple[jax.Array, jax.Array],
  keys: tuple[jax.Array, jax.Array],
  causal: bool,
) -> jax.Array:
  """Returns the scores, -inf where they do not count."""
  (query_ids, query_index), (key_ids, key_index) = queries, keys
  seen = query_ids == key_ids
  if causal:
    seen &= key_index <= query_index
  return jnp.where(seen, score, -jnp.inf)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  # HIGHEST keeps float32 from being cut to tf32; bfloat16 has one precision.
  return jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)


_KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkv": _dkv_kernel}
# The inputs in order; forward takes the first five.
_AXES = ("BTHC", "BSKC", "BSKC", "BT", "BS", "BTHC", "BHT", "BHT")


def _run(
  name: str,
  inputs: Sequence[jax.Array],
  outputs: Sequence[tuple[str, jax.typing.DTypeLike]],
  causal: bool,
  interpret: bool,
) -> list[jax.Array]:
  """Runs a kernel on inputs of any length.

  Args:
    name: of the kernel, in `_KERNELS`.
    inputs: in the order of `_AXES`.
    outputs: (axes, dtype) of each output.
    causal: whether a query sees only the keys up to its own index.
    interpret: whether to run on any device, slowly.
  """
  q, k = inputs[:2]
  tile = TILES[name, q.dtype.itemsize]
  axes = _AXES[: len(inputs)]
  sizes: dict[str, int] = dict(zip("BTHCSK", (*q.shape, *k.shape[1:3])))
  grid_sizes = sizes | {
    "T": pl.cdiv(q.shape[1], tile.query) * tile.query,
    "S": pl.cdiv(k.shape[1], tile.key) * tile.key,
    "C": _padded_dim(q.shape[3]),
  }

  def pad(axes: str, x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, grid_sizes[a] - sizes[a]) for a in axes])

  def cut(axes: str, x: jax.Array) -> jax.Array:
    return x[tuple(slice(sizes[a]) for a in axes)]

  def full(axes: str, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(grid_sizes[a] for a in axes), dtype)

  arrays = [pad(*pair) for pair in zip(axes, inputs)]
  # Other padding than the keys': the kernels need one comparison, not two.
  arrays[3] = jnp.where(arrays[3] > 0, arrays[3], -1)
  grid, spec = _programs(tile, grid_sizes, by_key=name == "dkv")
  ranges = _ranges(arrays[3], arrays[4], tile, causal, by_key=name == "dkv")
  results = pl.pallas_call(
    functools.partial(_KERNELS[name], tile, causal, q.shape[3] ** -0.5),
    grid=grid,
    in_specs=[spec("BN2"), *map(spec, axes)],
    out_specs=[spec(axes) for axes, _ in outputs],
    out_shape=[full(*output) for output in outputs],
    compiler_params=plgpu.CompilerParams(tile.warps, tile.stages),
    interpret=interpret,
  )(ranges, *arrays)
  return [cut(axes, x) for (axes, _), x in zip(outputs, results)]


def _programs(
  tile: Tile, sizes: dict[str, int], by_key: bool
) -> tuple[tuple[int, ...], Callable[[str], pl.BlockSpec]]:
  """Returns the grid, and a function from an array's axes to its block spec.

  Program (g, i, kv, b) has query tile i of head kv * G + g and all keys; by
  key, key tile i and all queries of group kv. Triton's fastest axis is first.
  """
  groups = sizes["H"] // sizes["K"]
  block = sizes | {"B": None, "N": None, "K": None, "2": 2}  # None: squeezed
  if by_key:
    block |= {"H": groups, "S": tile.key}
    grid = (1, sizes["S"] // tile.key, sizes["K"], sizes["B"])
  else:
    block |= {"H": None, "T": tile.query}
    grid = (groups, sizes["T"] // tile.query, sizes["K"], sizes["B"])

  def spec(axes: str) -> pl.BlockSpec:
    def index(g: jax.Array, i: jax.Array, kv: jax.Array, b: jax.Array) -> tuple:
      t, h, s = (0, kv, i) if by_key else (i, kv * groups + g, 0)
      at = {"B": b, "T": t, "H": h, "S": s, "K": kv, "N": i}
      return tuple(at.get(a, 0) for a in axes)

    return pl.BlockSpec(tuple(block[a] for a in axes), index)

  return grid, spec


def _ranges(
  query_segment: jax.Array,
  key_segment: jax.Array,
  tile: Tile,
  causal: bool,
  by_key: bool,
) -> jax.Array:
  """Returns which tiles a program loops over, int32 [B, n, 2].

  These are the first one and the one after the last, by query or by key tile.
  Ids 1 1 | 1 2 | 0 0 of queries and 1 1 | 2 2 of keys, tiles of two: the query
  tiles loop over [0, 1), [0, 2) and none; the key tiles over [0, 2) and [1, 2).
  """
  query_low, query_high = _bounds(query_segment, tile.query)
  key_low, key_high = _bounds(key_segment, tile.key)
  shared = query_low[:, :, None] <= key_high[:, None]
  shared &= key_low[:, None] <= query_high[:, :, None]
  if causal:
    first_key = jnp.arange(shared.shape[2]) * tile.key
    last_query = (jnp.arange(shared.shape[1]) + 1) * tile.query - 1
    shared &= (first_key[None] <= last_query[:, None])[None]
  shared = jnp.swapaxes(shared, 1, 2) if by_key else shared
  low = jnp.argmax(shared, -1)
  high = shared.shape[-1] - jnp.argmax(shared[..., ::-1], -1)
  high = jnp.where(shared.any(-1), high, low)
  return jnp.stack([low, high], -1).astype(jnp.int32)


def _bounds(segment: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Returns the least and largest id > 0 of each tile, [B, n] each.

  Of a tile of padding they are the largest integer and 0.
  """
  ids = segment.reshape(segment.shape[0], -1, size)
  least = jnp.where(ids > 0, ids, jnp.iinfo(ids.dtype).max).min(-1)
  return least, jnp.maximum(ids, 0).max(-1)
