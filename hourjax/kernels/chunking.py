"""Attention in parts, where one kernel call cannot take all queries and keys.

A kernel call is limited: its block schedule has to fit into scalar memory, its
sums into VMEM, and indices into 32 bits. Longer calls are cut here into parts,
so that no length is refused. Forward:

    for each part of the queries:            exact: queries do not affect others
      for each part of the keys:             merged by log-sum-exp, float32
        out, lse = call(queries, keys)

and backward, from the log-sum-exp over all keys:

    for each part of the keys:               dk and dv are those of the part
      for each part of the queries:          dk and dv are summed, float32
        dq, dk, dv = call(queries, keys)     dq is summed over the keys, float32

These are loops in the program (`lax.scan`), not copies of it: a kernel is
compiled once for all parts. A call that fits is passed on as it is. Causal
attention is told where its parts begin.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hourjax.kernels.constants import NO_KEYS, NO_PART


def forward(
  call: Callable,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  *,
  queries: int,
  keys: int,
  out_dtype: jax.typing.DTypeLike,
  causal: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes attention by `call` on parts of the queries and keys.

  Args:
    call: attention (q, k, v, query_segment, key_segment, out_dtype=) with the
      contract of `reference.forward`. If it is causal it also takes `offset`,
      int32 []: the index of its first query less that of its first key.
    q: queries [B, T, H, C].
    k: keys [B, S, K, C].
    v: values [B, S, K, C].
    query_segment: ids of the queries [B, T].
    key_segment: ids of the keys [B, S].
    queries: most queries of a part.
    keys: most keys of a part.
    out_dtype: of the output.
    causal: whether a query sees only the keys up to its own index.

  Returns:
    out [B, T, H, C] and lse float32 [B, T, H], as of one call.
  """

  def of_all_keys(
    q: jax.Array, query_segment: jax.Array, first: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Attends to all keys, part by part; `first` is the first query."""
    if k.shape[1] <= keys:
      how = {"out_dtype": out_dtype, **_offset(causal, first)}
      return call(q, k, v, query_segment, key_segment, **how)

    def step(
      merged: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
      k, v, key_segment, first_key = part
      # float32, so that merging many parts rounds no more than one call does.
      how = {"out_dtype": jnp.float32, **_offset(causal, first - first_key)}
      found = call(q, k, v, query_segment, key_segment, **how)
      return _merged(merged, found), None

    nothing = (
      jnp.zeros(q.shape, jnp.float32),
      jnp.full(q.shape[:3], NO_PART, jnp.float32),
    )
    parts = tuple(_cut(x, keys) for x in (k, v, key_segment))
    out, lse = jax.lax.scan(step, nothing, (*parts, _firsts(k, keys)))[0]
    return out.astype(out_dtype), lse

  length = q.shape[1]
  if length <= queries:
    return of_all_keys(q, query_segment, jnp.int32(0))
  parts = tuple(_cut(x, queries) for x in (q, query_segment))
  parts = (*parts, _firsts(q, queries))
  results = jax.lax.map(lambda part: of_all_keys(*part), parts)
  out, lse = (_joined(x, length) for x in results)
  return out, lse


def backward(
  call: Callable,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  d_out: jax.Array,
  *,
  queries: int,
  keys: int,
  causal: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes gradients by `call` on parts of the queries and keys.

  Args:
    call: gradients (q, k, v, query_segment, key_segment, lse, delta, d_out,
      grad_dtype=) with the contract of `reference.backward`; `grad_dtype` is
      that of dk and dv. If it is causal it also takes `offset`, as for
      `forward`.
    q: queries [B, T, H, C].
    k: keys [B, S, K, C].
    v: values [B, S, K, C].
    query_segment: ids of the queries [B, T].
    key_segment: ids of the keys [B, S].
    lse: as for `reference.backward`.
    delta: as for `reference.backward`.
    d_out: gradient of the output [B, T, H, C].
    queries: most queries of a part.
    keys: most keys of a part.
    causal: as for `forward`.

  Returns:
    dq float32, dk and dv in the dtype of k, as of one call.
  """
  length = q.shape[1]

  def of_all_queries(
    k: jax.Array, v: jax.Array, key_segment: jax.Array, first_key: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of some keys, and their part of all of dq."""

    def gradients(
      q: jax.Array,
      query_segment: jax.Array,
      lse: jax.Array,
      delta: jax.Array,
      d_out: jax.Array,
      first: jax.Array,
      *,
      grad_dtype: jax.typing.DTypeLike,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      arrays = (q, k, v, query_segment, key_segment, lse, delta, d_out)
      how = _offset(causal, first - first_key)
      return call(*arrays, grad_dtype=grad_dtype, **how)

    arrays = (q, query_segment, lse, delta, d_out)
    if length <= queries:
      return gradients(*arrays, jnp.int32(0), grad_dtype=k.dtype)

    def step(
      sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
      dq, dk, dv = gradients(*part, grad_dtype=jnp.float32)
      return (sums[0] + dk, sums[1] + dv), dq

    zeros = jnp.zeros(k.shape, jnp.float32)
    # Queries that pad the last part must weigh nothing: their lse is NO_KEYS.
    fills = (0, 0, NO_KEYS, 0, 0)
    parts = tuple(_cut(x, queries, fill) for x, fill in zip(arrays, fills))
    parts = (*parts, _firsts(q, queries))
    (dk, dv), dq = jax.lax.scan(step, (zeros, zeros), parts)
    return _joined(dq, length), dk.astype(k.dtype), dv.astype(k.dtype)

  if k.shape[1] <= keys:
    return of_all_queries(k, v, key_segment, jnp.int32(0))

  def step(
    total: jax.Array, part: tuple[jax.Array, ...]
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    dq, dk, dv = of_all_queries(*part)
    return total + dq, (dk, dv)

  parts = tuple(_cut(x, keys) for x in (k, v, key_segment))
  parts = (*parts, _firsts(k, keys))
  dq, (dk, dv) = jax.lax.scan(step, jnp.zeros(q.shape, jnp.float32), parts)
  return dq, _joined(dk, k.shape[1]), _joined(dv, k.shape[1])


def even_length(total: int, most: int, step: int) -> int:
  """Returns the length of the fewest parts of `total` that are of one length.

  100 in parts of at most 64, in steps of 8, are two parts of 56.

  Args:
    total: what is cut.
    most: longest length that is allowed, a multiple of `step`.
    step: what the length is a multiple of.
  """
  parts = -(-total // most)
  return -(-total // (parts * step)) * step


def _merged(
  one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Merges (out, lse) over two parts of the keys.

  A query may see no key of either part. A lse of `NO_PART` beside a finite one
  weighs nothing. Beside another `NO_PART`, the output stays 0, and the lse is
  `NO_PART` again: log(2) is lost in the rounding of such a number.
  """
  (out, lse), (more, more_lse) = one, other
  top = jnp.maximum(lse, more_lse)
  weight, more_weight = jnp.exp(lse - top), jnp.exp(more_lse - top)
  total = weight + more_weight
  out = out * weight[..., None] + more * more_weight[..., None]
  return out / total[..., None], top + jnp.log(total)


def _offset(causal: bool, offset: jax.Array) -> dict[str, jax.Array]:
  """Returns the argument that only causal calls take."""
  return {"offset": offset} if causal else {}


def _firsts(x: jax.Array, length: int) -> jax.Array:
  """Returns the index of the first position of each part of [B, N, ...]."""
  return jnp.arange(0, x.shape[1], length, dtype=jnp.int32)


def _cut(x: jax.Array, length: int, fill: float = 0) -> jax.Array:
  """Cuts [B, N, ...] into [parts, B, length, ...], with `fill` at the end.

  For one row, and a length that divides N, nothing is copied.
  """
  parts = -(-x.shape[1] // length)
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, parts * length - x.shape[1])
  x = jnp.pad(x, widths, constant_values=fill)
  return jnp.moveaxis(x.reshape(x.shape[0], parts, length, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array, length: int) -> jax.Array:
  """Inverts `_cut`, without the padding after `length`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
