"""Attention in parts, where one call of a kernel does not take all of it.

A kernel may take only so many queries or keys at once: its list of tiles has
to fit into scalar memory, its sums into VMEM, an array's elements into an
index. What is longer is cut here, so that no length is refused. Forward:

    for each part of the queries:            exact: a query does not know others
      for each part of the keys:             merged by log-sum-exp, float32
        out, lse = call(queries, keys)

and backward, from the log-sum-exp over all keys:

    for each part of the keys:               dk and dv are those of the part
      for each part of the queries:          dk and dv are summed, float32
        dq, dk, dv = call(queries, keys)     dq is summed over the keys, float32

Loops, not copies of the program: a kernel is compiled once for all parts. What
fits into one part is one call with the arrays as they are.
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
) -> tuple[jax.Array, jax.Array]:
  """`call` on parts of the queries and keys.

  Args:
    call: attention (q, k, v, query_segment, key_segment, out_dtype=) with the
      contract of `reference.forward`.
    q, k, v, query_segment, key_segment: [B, T, ...] and [B, S, ...].
    queries, keys: of a part, at most.
    out_dtype: of the output.

  Returns:
    out [B, T, H, C] and lse float32 [B, T, H], as of one call.
  """

  def of_all_keys(q, query_segment):
    if k.shape[1] <= keys:
      return call(q, k, v, query_segment, key_segment, out_dtype=out_dtype)

    def step(merged, part):
      k, v, key_segment = part
      found = call(q, k, v, query_segment, key_segment, out_dtype=jnp.float32)
      return _merged(merged, found), None

    nothing = (
      jnp.zeros(q.shape, jnp.float32),
      jnp.full(q.shape[:3], NO_PART, jnp.float32),
    )
    parts = tuple(_cut(x, keys) for x in (k, v, key_segment))
    out, lse = jax.lax.scan(step, nothing, parts)[0]
    return out.astype(out_dtype), lse

  length = q.shape[1]
  if length <= queries:
    return of_all_keys(q, query_segment)
  parts = tuple(_cut(x, queries) for x in (q, query_segment))
  results = jax.lax.map(lambda part: of_all_keys(*part), parts)
  return tuple(_joined(x, length) for x in results)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`call` on parts of the queries and keys.

  Args:
    call: gradients (q, k, v, query_segment, key_segment, lse, delta, d_out,
      grad_dtype=) with the contract of `reference.backward`; `grad_dtype` is
      that of dk and dv.
    q, k, v, query_segment, key_segment, lse, delta, d_out: as there.
    queries, keys: of a part, at most.

  Returns:
    dq float32, dk and dv in the dtype of k, as of one call.
  """
  length = q.shape[1]

  def of_all_queries(k, v, key_segment):
    def gradients(q, query_segment, lse, delta, d_out, grad_dtype):
      arrays = (q, k, v, query_segment, key_segment, lse, delta, d_out)
      return call(*arrays, grad_dtype=grad_dtype)

    arrays = (q, query_segment, lse, delta, d_out)
    if length <= queries:
      return gradients(*arrays, k.dtype)

    def step(sums, part):
      dq, dk, dv = gradients(*part, jnp.float32)
      return (sums[0] + dk, sums[1] + dv), dq

    zeros = jnp.zeros(k.shape, jnp.float32)
    fills = (0, 0, NO_KEYS, 0, 0)
    parts = tuple(_cut(x, queries, fill) for x, fill in zip(arrays, fills))
    (dk, dv), dq = jax.lax.scan(step, (zeros, zeros), parts)
    return _joined(dq, length), dk.astype(k.dtype), dv.astype(k.dtype)

  if k.shape[1] <= keys:
    return of_all_queries(k, v, key_segment)

  def step(total, part):
    dq, *d_keys = of_all_queries(*part)
    return total + dq, d_keys

  parts = tuple(_cut(x, keys) for x in (k, v, key_segment))
  dq, d_keys = jax.lax.scan(step, jnp.zeros(q.shape, jnp.float32), parts)
  return dq, *(_joined(x, k.shape[1]) for x in d_keys)


def even(total: int, most: int, step: int) -> int:
  """Length of the fewest parts of `total` that are alike, a multiple of `step`.

  At most `most`, which is one itself: 100 at most 64 in steps of 8 gives 56.
  """
  parts = -(-total // most)
  return -(-total // (parts * step)) * step


def _merged(one, other):
  """(out, lse) over two parts of the keys, either of which may see nothing.

  A lse of `NO_PART` beside a finite one weighs nothing, and of two the output
  is 0 and the lse `NO_PART` again: a logarithm more does not change it.
  """
  (out, lse), (more, more_lse) = one, other
  top = jnp.maximum(lse, more_lse)
  weight, more_weight = jnp.exp(lse - top), jnp.exp(more_lse - top)
  total = weight + more_weight
  out = out * weight[..., None] + more * more_weight[..., None]
  return out / total[..., None], top + jnp.log(total)


def _cut(x, length, fill=0):
  """[B, N, ...] to [parts, B, length, ...], with `fill` at the end.

  For one row, and a length that divides N, nothing moves.
  """
  parts = -(-x.shape[1] // length)
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, parts * length - x.shape[1])
  x = jnp.pad(x, widths, constant_values=fill)
  return jnp.moveaxis(x.reshape(x.shape[0], parts, length, *x.shape[2:]), 1, 0)


def _joined(x, length):
  """Inverse of `_cut`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
