"""Attention on NVIDIA GPUs: cuDNN's fused attention, through JAX.

cuDNN attends within the sequences of a packed row. A sequence is a run of rows
of q and one of k and v, given by where they begin and how long they are. In
the backward pass it takes the output and the log-sum-exp from its caller:

    forward    S = q k^T / sqrt(C)     stats = log sum exp S
               P = exp(S - stats)      out = P v
    backward   P = exp(S - stats)      delta = sum(out * dout)
               dv = P^T dout           dS = P * (dout v^T - delta)
               dq = dS k / sqrt(C)     dk = dS^T q / sqrt(C)

So with the log-sum-exp and the output of all keys of a mesh, each device gets
the exact gradients of the keys that it holds (`kernels.sharded`). JAX's public
function takes neither, therefore the primitives behind it are called here.

Positions are sorted by segment id first, and the results back, so that ids may
come in any order and with gaps:

    ids        2 2 1 0 1 3      sorted    1 1 2 2 3 0
                                begin     0   2   4       length 2 2 1

A call takes M sequences of each row, of which those that are not there have
length 0; rows of more segments take several calls. For each sequence cuDNN's
scratch memory holds float32 dq of the whole row, hence `_SCRATCH`.

For grouped heads it would hold dk and dv of every query head and sequence as
well (14 GiB at one hour and 8 sequences), and jax 0.10.2 would compute wrong
offsets (jax-ml/jax#39521). So heads are ungrouped. Where attention is not
causal, the G query heads of a KV head become G queries of one head, since a
query does not ask where it stands; for causal attention k and v are repeated:

    not causal    q [B, T, K G, C] -> [B, T G, K, C]       k, v as they are
    causal        q as it is        k, v [B, S, K, C] -> [B, S, K G, C]

What cuDNN has not written may hold anything, so it is replaced, not multiplied.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax._src.cudnn import fused_attention_stablehlo as library
from jaxtyping import Array, Float, Int

from hourjax.kernels import chunking
from hourjax.kernels.constants import NO_PART

DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD_DIM = 128  # of the backward pass on Blackwell; Hopper's is 256
CAPABILITY = (9, 0)  # of the first GPUs for which JAX packs sequences
_MAX_ELEMENTS = (1 << 31) - 1  # of sequences together: offsets have 32 bits
_SCRATCH = 1 << 31  # bytes of dq that cuDNN may hold besides its results
_MOST_SEQUENCES = 64  # of a row in one call
_PADDING = jnp.iinfo(jnp.int32).max  # sorts behind all segments


def unsupported(
  dtype: jax.typing.DTypeLike, head_dim: int, capability: str | None
) -> str:
  """Returns why cuDNN cannot compute attention, or "" if it can.

  Args:
    dtype: of queries, keys and values.
    head_dim: C.
    capability: compute capability of the GPU, such as "9.0"; None if it is
      not known, as when a program is only lowered.
  """
  if dtype not in DTYPES:
    return (
      f"cuDNN's attention takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    )
  if head_dim % 8 or head_dim > MAX_HEAD_DIM:
    return (
      f"cuDNN's attention takes head dims that are multiples of 8 up to"
      f" {MAX_HEAD_DIM}, not {head_dim}"
    )
  if capability is None:
    return ""
  parts = capability.split(".")
  # AMD's are names, such as gfx942.
  known = all(part.isdigit() for part in parts)
  if not known or tuple(map(int, parts)) < CAPABILITY:
    needed = ".".join(map(str, CAPABILITY))
    return (
      "cuDNN's attention to packed sequences needs compute capability"
      f" {needed} (H100 and later), and this GPU has {capability}"
    )
  return ""


def forward(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  v: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  *,
  causal: bool = False,
  out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
  """Computes segment-masked grouped-query attention and its log-sum-exp.

  Scores are scaled by C ** -0.5. Products are of the dtype of q, sums and
  softmax float32.

  Args:
    q: queries, bfloat16 or float16. Head h reads KV head h // (H / K).
    k: keys, in the dtype of q.
    v: values, in the dtype of q.
    query_segment: int32; a query sees the keys of its own id, 0 sees nothing.
    key_segment: int32; 0 is padding.
    causal: a query also sees only the keys of its segment up to its own place
      in it, so both ids must be the same.
    out_dtype: of the output, which has been rounded to the dtype of q; None is
      that dtype.

  Returns:
    The output, and in float32 the natural log of the sum of exp(score).
    A query that sees no key has zeros and -1e30.

  Raises:
    ValueError: for what `unsupported` names, mixed dtypes, and causal
      attention of more elements than an offset of 32 bits counts.
  """
  lengths = _check(q, k, v, causal)
  call = functools.partial(_forward, causal=causal)
  inputs = (q, k, v, query_segment, key_segment)
  out_dtype = out_dtype or q.dtype
  return chunking.forward(call, *inputs, **lengths, out_dtype=out_dtype)


def backward(
  q: Float[Array, "B T H C"],
  k: Float[Array, "B S K C"],
  v: Float[Array, "B S K C"],
  query_segment: Int[Array, "B T"],
  key_segment: Int[Array, "B S"],
  lse: Float[Array, "B T H"],
  out: Float[Array, "B T H C"],
  d_out: Float[Array, "B T H C"],
  *,
  causal: bool = False,
) -> tuple[
  Float[Array, "B T H C"], Float[Array, "B S K C"], Float[Array, "B S K C"]
]:
  """Computes the gradients of q, k and v. Errors are those of `forward`.

  Args:
    q: as for `forward`.
    k: as for `forward`, or a part of the keys: then dq is this part's summand
      of the whole.
    v: as for `forward`; the same part.
    query_segment: as for `forward`.
    key_segment: as for `forward`.
    lse: float32 log-sum-exp over all keys, also those that k does not hold;
      1e30 for a query that sees none.
    out: the output over all keys.
    d_out: gradient of that output.
    causal: as for `forward`.

  Returns:
    dq in float32, dk and dv in the dtype of k; each has been rounded to the
    dtype of q.
  """
  lengths = _check(q, k, v, causal)
  call = functools.partial(_backward, causal=causal)
  inputs = (q, k, v, query_segment, key_segment, lse, out, d_out)
  return chunking.backward(call, *inputs, **lengths)


def _check(
  q: jax.Array, k: jax.Array, v: jax.Array, causal: bool
) -> dict[str, Any]:
  """Refuses what cuDNN does not support.

  Returns:
    Most queries and most keys of one part.
  """
  dtypes = q.dtype, k.dtype, v.dtype
  reason = unsupported(q.dtype, q.shape[3], None)
  if not reason and len(set(dtypes)) > 1:
    reason = (
      "cuDNN's attention takes q, k and v of one dtype, not"
      f" {', '.join(map(str, dtypes))}"
    )
  if reason:
    raise ValueError(f"{reason}; convert them, or choose 'triton'")
  # Of causal attention k gets the heads of q.
  heads = {"queries": q.shape[2], "keys": (q if causal else k).shape[2]}
  lengths = {}
  for name, x in (("queries", q), ("keys", k)):
    rows, length, _, dim = x.shape
    most = _MAX_ELEMENTS // (2 * rows * heads[name] * dim)
    if causal and length > most:
      raise ValueError(
        f"causal attention takes at most {most} {name} of {heads[name]} heads"
        f" in {rows} rows, got {length}; shard them over more devices"
      )
    lengths[name] = chunking.even_length(length, most, 1)
  return lengths


def _forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  *,
  causal: bool,
  out_dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array]:
  """Computes what `forward` returns, with offsets of 32 bits."""
  packing = _Packing(q, k, query_segment, key_segment, causal)
  q, k, v = packing.from_queries(q), packing.from_keys(k), packing.from_keys(v)
  none = jnp.zeros(0, q.dtype)  # bias, page tables

  def add(
    call: _Call, state: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    sequences = packing.operands(call, q, k)
    operands = (q, k, v, none, *sequences, none, none)
    out, stats = library._dot_product_attention_fwd_p.bind(
      *operands, is_training=True, **packing.options
    )
    here = packing.computed_queries(call)
    lse = packing.from_stats(call, stats)
    return (
      jnp.where(here, out, state[0]),
      jnp.where(here[..., 0], lse, state[1]),
    )

  lse = jnp.full(q.shape[:3], NO_PART, jnp.float32)
  out, lse = packing.over_calls(add, (jnp.zeros_like(q), lse))
  return packing.to_queries(out).astype(out_dtype), packing.to_queries(lse)


def _backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  lse: jax.Array,
  out: jax.Array,
  d_out: jax.Array,
  *,
  causal: bool,
  grad_dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes what `backward` returns, dk and dv in `grad_dtype`."""
  packing = _Packing(q, k, query_segment, key_segment, causal)
  out, d_out = out.astype(q.dtype), d_out.astype(q.dtype)
  q, lse, out, d_out = map(packing.from_queries, (q, lse, out, d_out))
  k, v = packing.from_keys(k), packing.from_keys(v)
  none = jnp.zeros(0, q.dtype)  # bias, page tables

  def add(call: _Call, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    sequences = packing.operands(call, q, k)
    operands = (q, k, v, none, *sequences, none, none)
    gradients = library._dot_product_attention_bwd_p.bind(
      *operands, packing.to_stats(call, lse), out, d_out, **packing.options
    )
    queries = packing.computed_queries(call)
    keys = call.holds(packing.keys.ids)[..., None, None]
    computed = (queries, keys, keys)
    return tuple(map(jnp.where, computed, gradients, state))

  dq, dk, dv = packing.over_calls(add, tuple(map(jnp.zeros_like, (q, k, v))))
  dq = packing.to_queries(dq).astype(jnp.float32)
  dk, dv = (packing.to_keys(x).astype(grad_dtype) for x in (dk, dv))
  return dq, dk, dv


class _Side(NamedTuple):
  """Describes queries or keys [B, N] as they are sorted by segment.

  Attributes:
    order: the position at each sorted place.
    place: the sorted place of each position.
    ids: segment ids in sorted order, `_PADDING` for padding.
  """

  order: jax.Array
  place: jax.Array
  ids: jax.Array

  @classmethod
  def of(cls, segment: jax.Array) -> "_Side":
    """Sorts positions, those of one segment in the order that they have."""
    ids = jnp.where(segment > 0, segment, _PADDING)
    order = jnp.argsort(ids, axis=1, stable=True)
    here = jnp.arange(segment.shape[1], dtype=order.dtype)[None]
    place = jnp.put_along_axis(
      jnp.zeros_like(order), order, here, axis=1, inplace=False
    )
    return cls(order, place, jnp.take_along_axis(ids, order, axis=1))

  def spans(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where the segments of these ids [B, M] begin, and lengths."""
    # Fused comparisons, reduced at once: nothing of M x N is kept.
    begin = self.ids[:, None] < ids[..., None]
    length = self.ids[:, None] == ids[..., None]
    return begin.sum(-1, dtype=jnp.int32), length.sum(-1, dtype=jnp.int32)


class _Call(NamedTuple):
  """Holds the M sequences of each row that one call computes, [B, M] each.

  Attributes:
    first: rank of the first of them among the segments of its row, a number.
    ids: of their segments; `_PADDING` where there is none.
    query_begin: sorted place of the first query.
    query_length: number of queries; 0 too if the segment has no key here.
    key_begin: sorted place of the first key.
    key_length: number of keys; 0 too if the segment has no query here.
  """

  first: jax.Array
  ids: jax.Array
  query_begin: jax.Array
  query_length: jax.Array
  key_begin: jax.Array
  key_length: jax.Array

  def holds(self, ids: jax.Array) -> jax.Array:
    """Returns which positions of sorted ids [B, N] are computed, boolean."""
    same = ids[..., None] == self.ids[:, None]
    return (same & (self.query_length > 0)[:, None]).any(-1)


class _Packing:
  """Describes the sequences of packed rows, and brings arrays into their order.

  Attributes:
    options: of the primitives, the same in both passes.
    folded: queries of one head that a position of q becomes.
    repeated: heads that a head of k and v becomes.
    queries: the sorted queries.
    keys: the sorted keys.
    most: sequences of a row in one call.
    rank: [B, T], the number of its row's segment, from 0 on, of each sorted
      query.
    calls: how many calls compute all segments.
  """

  def __init__(
    self,
    q: jax.Array,
    k: jax.Array,
    query_segment: jax.Array,
    key_segment: jax.Array,
    causal: bool,
  ):
    """Sorts the positions of a call, which are as for `forward`."""
    groups = q.shape[2] // k.shape[2]
    self.folded, self.repeated = (1, groups) if causal else (groups, 1)
    # To cuDNN an array is as large as if each sequence had its whole length.
    spanned = _MAX_ELEMENTS // max(q.size, k.size * self.repeated)
    most = min(_MOST_SEQUENCES, _SCRATCH // (4 * q.size), spanned)
    self.most = max(2, most)  # with fewer, JAX passes no offsets on
    self.queries, self.keys = _Side.of(query_segment), _Side.of(key_segment)
    kind = library.MaskType
    self.options = {
      "scale": q.shape[3] ** -0.5,
      "seed": 0,
      "dropout_rate": 0.0,
      "variadic_args": (False, False),  # no bias, no gradient of it
      "mask_type": kind.PADDING_CAUSAL if causal else kind.PADDING,
      "layout": library.AttentionLayout.BTNH.value,
      "sliding_window_length": None,
    }
    ids = self.queries.ids
    begins = jnp.diff(ids, axis=1, prepend=0) > 0
    self.rank = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    segments = (begins & (ids != _PADDING)).sum(1, dtype=jnp.int32).max()
    self.calls = -(-segments // self.most)

  def call(self, number: jax.Array) -> _Call:
    """Returns the sequences of call 0, 1, ..."""
    first = number * self.most
    ranks = first + jnp.arange(self.most, dtype=jnp.int32)
    found = self.rank[:, None] == ranks[None, :, None]
    ids = jnp.where(found, self.queries.ids[:, None], _PADDING).min(-1)
    query_begin, query_length = self.queries.spans(ids)
    key_begin, key_length = self.keys.spans(ids)
    there = (ids != _PADDING) & (query_length > 0) & (key_length > 0)
    return _Call(
      first,
      ids,
      query_begin,
      jnp.where(there, query_length, 0),
      key_begin,
      jnp.where(there, key_length, 0),
    )

  def over_calls(
    self, body: Callable[[_Call, Any], Any], start: tuple[jax.Array, ...]
  ) -> tuple[jax.Array, ...]:
    """Calls `body` with the sequences of each call and what it returned."""
    return jax.lax.fori_loop(
      0, self.calls, lambda n, state: body(self.call(n), state), start
    )

  def from_queries(self, x: jax.Array) -> jax.Array:
    """Sorts [B, T, H, ...] and folds it to [B, T f, H / f, ...]."""
    x = _taken(x, self.queries.order)
    return rearrange(x, "b t (n f) ... -> b (t f) n ...", f=self.folded)

  def to_queries(self, x: jax.Array) -> jax.Array:
    """Inverts `from_queries`."""
    x = rearrange(x, "b (t f) n ... -> b t (n f) ...", f=self.folded)
    return _taken(x, self.queries.place)

  def from_keys(self, x: jax.Array) -> jax.Array:
    """Sorts [B, S, K, C] and repeats its heads."""
    return jnp.repeat(_taken(x, self.keys.order), self.repeated, axis=2)

  def to_keys(self, x: jax.Array) -> jax.Array:
    """Transposes `from_keys`: sums over repeated heads, in float32."""
    if self.repeated > 1:
      x = rearrange(x, "b s (k r) c -> b s k r c", r=self.repeated)
      x = x.sum(3, dtype=jnp.float32)
    return _taken(x, self.keys.place)

  def computed_queries(self, call: _Call) -> jax.Array:
    """Returns which folded queries a call computes, [B, T f, 1, 1]."""
    here = jnp.repeat(call.holds(self.queries.ids), self.folded, axis=1)
    return here[..., None, None]

  def from_stats(self, call: _Call, stats: jax.Array) -> jax.Array:
    """Returns the log-sum-exp of folded queries [B, T f, N] that were computed.

    Args:
      call: the sequences.
      stats: [B M, N, T f], of each sequence from index 0 on.
    """
    rows, sequences = call.ids.shape
    sequence = jnp.clip(self.rank - call.first, 0, sequences - 1)
    begin = jnp.take_along_axis(call.query_begin, sequence, axis=1)
    sequence, begin = (
      jnp.repeat(x, self.folded, axis=1)
      for x in (sequence, begin * self.folded)
    )
    length = sequence.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None] - begin
    stats = rearrange(stats, "(b m) n t -> b (m t) n", b=rows)
    return _taken(stats, sequence * length + jnp.maximum(index, 0))

  def to_stats(self, call: _Call, lse: jax.Array) -> jax.Array:
    """Inverts `from_stats`, with finite numbers after each sequence's end."""
    length = lse.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None, None]
    at = call.query_begin[..., None] * self.folded + index
    stats = _taken(lse, jnp.minimum(at, length - 1).reshape(len(at), -1))
    return rearrange(stats, "b (m t) n -> (b m) n t", t=length)

  def operands(
    self, call: _Call, q: jax.Array, k: jax.Array
  ) -> tuple[jax.Array, ...]:
    """Returns lengths and offsets of the sequences, as cuDNN reads them.

    Lengths are [B, M], in queries and keys. Offsets count numbers: cuDNN reads
    the first B M + 1 of [B, M + 1], of which the last one is the end.
    """

    def offsets(begin: jax.Array, x: jax.Array) -> jax.Array:
      rows, length, heads, dim = x.shape
      row = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
      begin = ((row + begin) * (heads * dim)).reshape(-1)
      begin = jnp.pad(begin, (0, rows), constant_values=x.size)
      return begin.reshape(rows, -1)

    return (
      call.query_length * self.folded,
      call.key_length,
      offsets(call.query_begin * self.folded, q),
      offsets(call.key_begin, k),
    )


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
  """Returns x[b, index[b]] of [B, N, ...] for each row b."""
  index = index.reshape(index.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")
