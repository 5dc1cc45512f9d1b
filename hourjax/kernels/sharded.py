"""Attention on a mesh: the memory dealt to devices, merged by log-sum-exp.

Each device attends to the keys that it holds. With (out_i, lse_i) of device i
and lse = log sum_i exp(lse_i), the whole is sum_i exp(lse_i - lse) out_i. In
the backward every device recomputes its weights from the global lse, dq is
summed, and dk and dv stay where the keys are. What is sent grows with the
queries and never with the keys. Keys carry their positions, so they may be
dealt in any order, and a device may hold none of a segment.

In self-attention over a split sequence the keys travel instead, since there
are few KV heads: each device has its own queries and gathers all keys. (Causal
self-attention: `exchange`.)

What is split is taken to be dealt round-robin, as `data.dealing` deals
queries: joined again it is in the order of the row, where neighbours are of
one segment. Attention does not depend on the order; what it costs does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hourjax.kernels.constants import NO_KEYS, NO_PART


class Sharding(NamedTuple):
  """Mesh axes of the arrays of an attention call.

  Attributes:
    mesh: all axes below are of it.
    rows: of the batch, B.
    heads: of query and KV heads alike.
    memory: of the keys, S.
    queries: whether queries are split over `memory` too (else every device
      has all of them).
    sequence: of the positions of self-attention, queries and keys alike;
      instead of `memory`.
  """

  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
  rows: tuple[str, ...] = ()
  heads: str | None = None
  memory: str | None = None
  queries: bool = False
  sequence: str | None = None

  def check(self, **sizes: tuple[int, tuple[str, ...]]) -> None:
    """Raises ValueError for a size that its axes do not divide.

    Args:
      **sizes: (length, axes) by what is split.
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
    """The axis of the keys, if they are split."""
    axis = self.memory or self.sequence
    return () if axis is None else (axis,)

  @property
  def over_queries(self) -> tuple[str, ...]:
    """The axis of the queries, if they are split."""
    if self.sequence is not None:
      return (self.sequence,)
    return self.over_keys if self.queries else ()

  def specs(self) -> "Specs":
    """How each kind of array is split."""
    rows, heads = self.rows or None, self.heads
    queries, keys = self.over_queries or None, self.over_keys or None
    return Specs(
      q=P(rows, queries, heads),
      k=P(rows, keys, heads),
      query_segment=P(rows, queries),
      key_segment=P(rows, keys),
    )


class Specs(NamedTuple):
  """Partition specs; q's is also that of out, lse, delta and their like."""

  q: P
  k: P
  query_segment: P
  key_segment: P


def forward(backend, sharding, q, k, v, query_segment, key_segment):
  """(out in q's dtype, global lse) of one device's queries.

  `backend` has the functions `forward` and `backward` of `kernels.reference`.
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
  top = jax.lax.pmax(lse, axis)
  weight = jnp.exp(lse - top)
  total = mine(weight)
  out = mine(out * weight[..., None]) / total[..., None]
  lse = _part(top, sharding) + jnp.log(total)
  return out.astype(q.dtype), jnp.where(lse <= NO_PART / 2, NO_KEYS, lse)


def backward(
  backend, sharding, q, k, v, query_segment, key_segment, out, lse, d_out
):
  """(dq, dk, dv) of what one device holds, in the dtypes of q, k and v."""
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
    everyone(delta),
    everyone(d_out),
  )
  # A factor between sum and cast: XLA would else sum in the narrow type, as
  # it does through a select or a barrier.
  seen = (lse != NO_KEYS).astype(jnp.float32)
  dq = mine(dq) * seen[..., None]
  dk, dv = (_own_keys(x, sharding) for x in (dk, dv))
  return dq.astype(q.dtype), dk.astype(dtypes[0]), dv.astype(dtypes[1])


def _collectives(sharding):
  """Functions: all queries from a device's own, and own sums from all."""
  if sharding is None or sharding.memory is None:
    return (lambda x: x), (lambda x: x)
  axis = sharding.memory
  if not sharding.queries:
    return (lambda x: x), (lambda x: jax.lax.psum(x, axis))
  return (
    functools.partial(_join, axis=axis),
    functools.partial(_sum_parts, axis=axis),
  )


def _all_keys(x, sharding):
  """Of all positions, from a device's own, where keys travel."""
  if sharding is None or sharding.sequence is None:
    return x
  return _join(x, sharding.sequence)


def _own_keys(x, sharding):
  """A device's own of the sum of all devices' gradients of all keys."""
  if sharding is None or sharding.sequence is None:
    return x
  return _sum_parts(x.astype(jnp.float32), sharding.sequence)


def _join(x, axis):
  """[B, N / n, ...] of n devices to [B, N, ...], undoing the dealing.

  Devices with [0 2] and [1 3] both get [0 1 2 3].
  """
  x = jax.lax.all_gather(x, axis, axis=2)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _sum_parts(x, axis):
  """A device's own part of the sum over devices; the inverse of `_join`."""
  devices = jax.lax.axis_size(axis)
  rows, length, *rest = x.shape
  # Devices outermost and channels in one dimension, else the compiler sums
  # all of it everywhere.
  x = x.reshape(rows, length // devices, devices, -1)
  part = jax.lax.psum_scatter(jnp.moveaxis(x, 2, 0), axis)
  return part.reshape(rows, length // devices, *rest)


def _part(x, sharding):
  """A device's own queries of an array of all."""
  if not sharding.queries:
    return x
  devices = jax.lax.axis_size(sharding.memory)
  x = x.reshape(x.shape[0], -1, devices, *x.shape[2:])
  place = jax.lax.axis_index(sharding.memory)
  return jax.lax.dynamic_index_in_dim(x, place, 2, keepdims=False)
