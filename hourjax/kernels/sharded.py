"""Attention on a mesh: each device has a part of the memory.

Each device attends to the keys that it holds, and the results are merged by
log-sum-exp. With (out_i, lse_i) of device i:

    lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

    device 0   keys 0 2 4 ..   out_0, lse_0  --.
    device 1   keys 1 3 5 ..   out_1, lse_1  ---+--> out, lse of each query
                                                |    on the device that has it

In the backward pass every device recomputes its weights from the global lse,
dq is summed over the devices, and dk and dv stay where the keys are. What is
sent grows with the queries and never with the keys. Positions (RoPE) are
applied before the call, so keys may lie in any order, and a device may hold no
key of a segment.

In self-attention over a split sequence the keys travel instead, since there
are few KV heads: each device has its own queries and gathers all keys. (Causal
self-attention over a split sequence is in `kernels.ulysses`.)

Queries that are split are taken to be in round-robin order, as in
`data.sequence_sharding`: device d of n has the positions d, d + n, d + 2 n, ...
They are gathered to the order of the row, in which neighbours are of one
segment, so that few tiles meet. Another order gives the same results, slower.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hourjax.kernels.constants import NO_KEYS, NO_PART


class Sharding(NamedTuple):
  """Describes over which mesh axes the arrays of an attention call are split.

  Attributes:
    mesh: has all axes below.
    rows: axes of the rows of the batch, B.
    heads: axis of query and KV heads alike.
    memory: axis of the keys, S.
    queries: whether queries are split over `memory` too (else every device
      has all of them).
    sequence: axis of the positions of self-attention, queries and keys alike;
      instead of `memory`.
  """

  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
  rows: tuple[str, ...] = ()
  heads: str | None = None
  memory: str | None = None
  queries: bool = False
  sequence: str | None = None

  def check(self, **sizes: tuple[int, tuple[str, ...]]) -> None:
    """Checks that mesh axes divide the sizes that are split over them.

    Args:
      **sizes: (length, axes) by the name of what is split.

    Raises:
      ValueError: for such a size, or an axis that the mesh lacks.
    """
    for name, (length, axes) in sizes.items():
      missing = [axis for axis in axes if axis not in self.mesh.shape]
      if missing:
        raise ValueError(
          f"attention splits {name} over axis {missing[0]!r}; the mesh has"
          f" {', '.join(map(repr, self.mesh.shape))}"
        )
      parts = 1
      for axis in axes:
        parts *= self.mesh.shape[axis]
      if length % parts:
        raise ValueError(
          f"{length} {name} cannot be split evenly over {parts} devices"
          f" ({' x '.join(axes)}); choose another mesh or capacity"
        )

  @property
  def over_keys(self) -> tuple[str, ...]:
    """Returns the axis of the keys, if they are split."""
    axis = self.memory or self.sequence
    return () if axis is None else (axis,)

  @property
  def over_queries(self) -> tuple[str, ...]:
    """Returns the axis of the queries, if they are split."""
    if self.sequence is not None:
      return (self.sequence,)
    return self.over_keys if self.queries else ()

  def specs(self) -> "Specs":
    """Returns how each kind of array is split."""
    rows, heads = self.rows or None, self.heads
    queries, keys = self.over_queries or None, self.over_keys or None
    return Specs(
      q=P(rows, queries, heads),
      k=P(rows, keys, heads),
      query_segment=P(rows, queries),
      key_segment=P(rows, keys),
    )


class Specs(NamedTuple):
  """Holds partition specs; that of q serves out, lse, delta and d_out too."""

  q: P
  k: P
  query_segment: P
  key_segment: P


class Backend(NamedTuple):
  """Holds the functions of an implementation, which compute on one device.

  Attributes:
    forward: (q, k, v, query_segment, key_segment, out_dtype=) -> (out, lse).
    backward: (q, k, v, query_segment, key_segment, lse, delta, d_out) ->
      (dq, dk, dv).
    takes_out: whether `backward` takes the output in place of delta, the sum
      of out * d_out over C.
  """

  forward: Callable[..., tuple[jax.Array, jax.Array]]
  backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
  takes_out: bool = False


def forward(
  backend: Backend,
  sharding: Sharding | None,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes attention of one device's queries to the keys of all devices.

  Args:
    backend: computes attention to the keys of this device.
    sharding: of the call; None on one device.
    q: the device's queries.
    k: its keys.
    v: its values.
    query_segment: ids of its queries.
    key_segment: ids of its keys.

  Returns:
    The output of its queries in the dtype of q, and their log-sum-exp over
    all keys, float32; `NO_KEYS` where a query sees none.
  """
  if sharding is None or sharding.memory is None:
    k, v, key_segment = (_all_keys(x, sharding) for x in (k, v, key_segment))
    out, lse = backend.forward(
      q, k, v, query_segment, key_segment, out_dtype=q.dtype
    )
    return out, jnp.where(lse <= NO_PART / 2, NO_KEYS, lse)
  axis = sharding.memory
  everyone, mine = _collectives(sharding)
  out, lse = backend.forward(
    everyone(q),
    k,
    v,
    everyone(query_segment),
    key_segment,
    out_dtype=jnp.float32,
  )
  # The largest of the devices' lse is taken off before exponentiating. Where no
  # device has a key for a query all are NO_PART, and the weights are 1 each:
  # zeros are averaged, and the lse stays near NO_PART.
  top = jax.lax.pmax(lse, axis)
  weight = jnp.exp(lse - top)
  total = mine(weight)
  out = mine(out * weight[..., None]) / total[..., None]
  lse = _part(top, sharding) + jnp.log(total)
  return out.astype(q.dtype), jnp.where(lse <= NO_PART / 2, NO_KEYS, lse)


def backward(
  backend: Backend,
  sharding: Sharding | None,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  query_segment: jax.Array,
  key_segment: jax.Array,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes the gradients of the queries, keys and values of one device.

  Args:
    backend: computes gradients for the keys of this device.
    sharding: of the call; None on one device.
    q: the device's queries.
    k: its keys.
    v: its values.
    query_segment: ids of its queries.
    key_segment: ids of its keys.
    out: `forward`'s output.
    lse: `forward`'s log-sum-exp.
    d_out: gradient of the output.

  Returns:
    dq, dk and dv in the dtypes of q, k and v.
  """
  delta = jnp.einsum(
    "bthc,bthc->bth",
    out,
    d_out,
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST,
  )
  everyone, mine = _collectives(sharding)
  dtypes = k.dtype, v.dtype
  k, v, key_segment = (_all_keys(x, sharding) for x in (k, v, key_segment))
  dq, dk, dv = backend.backward(
    everyone(q),
    k,
    v,
    everyone(query_segment),
    key_segment,
    everyone(lse),
    everyone(out if backend.takes_out else delta),
    everyone(d_out),
  )
  # A multiplication between sum and cast. Without it XLA casts first and sums
  # in the narrow type; it does so even through a select or a barrier.
  seen = (lse != NO_KEYS).astype(jnp.float32)
  dq = mine(dq) * seen[..., None]
  dk, dv = (_own_keys(x, sharding) for x in (dk, dv))
  return dq.astype(q.dtype), dk.astype(dtypes[0]), dv.astype(dtypes[1])


def _collectives(sharding: Sharding | None) -> tuple[Callable, Callable]:
  """Returns two functions of arrays of queries.

  The first gathers the queries of all devices, since all of them read this
  device's keys. The second sums over devices and returns this device's part.
  """
  if sharding is None or sharding.memory is None:
    return (lambda x: x), (lambda x: x)
  axis = sharding.memory
  if not sharding.queries:
    return (lambda x: x), (lambda x: jax.lax.psum(x, axis))
  return (
    functools.partial(_join, axis=axis),
    functools.partial(_sum_parts, axis=axis),
  )


def _all_keys(x: jax.Array, sharding: Sharding | None) -> jax.Array:
  """Gathers an array of keys over the devices if the sequence is split."""
  if sharding is None or sharding.sequence is None:
    return x
  return _join(x, sharding.sequence)


def _own_keys(x: jax.Array, sharding: Sharding | None) -> jax.Array:
  """Sums gradients of gathered keys over devices, and keeps the own part."""
  if sharding is None or sharding.sequence is None:
    return x
  return _sum_parts(x.astype(jnp.float32), sharding.sequence)


def _join(x: jax.Array, axis: str) -> jax.Array:
  """Gathers [B, N / n, ...] of n devices to [B, N, ...], in the row's order.

  Devices with [0 2] and [1 3] both get [0 1 2 3].
  """
  x = jax.lax.all_gather(x, axis, axis=2)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _sum_parts(x: jax.Array, axis: str) -> jax.Array:
  """Returns a device's own part of the sum over devices; `_join` transposed."""
  devices = jax.lax.axis_size(axis)
  rows, length, *rest = x.shape
  # Devices outermost and channels in one dimension, else the compiler sums
  # all of it everywhere.
  x = x.reshape(rows, length // devices, devices, -1)
  part = jax.lax.psum_scatter(jnp.moveaxis(x, 2, 0), axis)
  return part.reshape(rows, length // devices, *rest)


def _part(x: jax.Array, sharding: Sharding) -> jax.Array:
  """Returns a device's own queries of an array of all."""
  if not sharding.queries:
    return x
  devices = jax.lax.axis_size(sharding.memory)
  x = x.reshape(x.shape[0], -1, devices, *x.shape[2:])
  place = jax.lax.axis_index(sharding.memory)
  return jax.lax.dynamic_index_in_dim(x, place, 2, keepdims=False)
