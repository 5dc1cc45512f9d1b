"""Attention on a mesh: the memory dealt to devices, merged by log-sum-exp.

Each device attends to the keys that it holds. With (out_i, lse_i) of device i
and lse = log sum_i exp(lse_i), the whole is sum_i exp(lse_i - lse) out_i. In
the backward every device recomputes its weights from the global lse, dq is
summed, and dk and dv stay where the keys are. What is sent grows with the
queries and never with the keys. Keys carry their positions, so they may be
dealt in any order, and a device may hold none of a segment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hourjax.kernels.common import NO_KEYS, NO_PART


class Sharding(NamedTuple):
  """Mesh axes of the arrays of an attention call.

  Attributes:
    mesh: all axes below are of it.
    rows: of the batch, B.
    heads: of query and KV heads alike.
    memory: of the keys, S.
    queries: whether queries are split over `memory` too (else every device
      has all of them).
  """

  mesh: jax.sharding.Mesh
  rows: tuple[str, ...] = ()
  heads: str | None = None
  memory: str | None = None
  queries: bool = False

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
  def over_memory(self) -> tuple[str, ...]:
    """The axis of the keys, if they are split."""
    return () if self.memory is None else (self.memory,)

  def specs(self) -> "Specs":
    """How each kind of array is split."""
    rows, heads = self.rows or None, self.heads
    queries = self.memory if self.queries else None
    return Specs(
      q=P(rows, queries, heads),
      k=P(rows, self.memory, heads),
      query_segment=P(rows, queries),
      key_segment=P(rows, self.memory),
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
  return dq.astype(q.dtype), dk, dv


def _collectives(sharding):
  """Functions: all queries from a device's own, and own sums from all."""
  if sharding is None or sharding.memory is None:
    return (lambda x: x), (lambda x: x)
  axis = sharding.memory
  if not sharding.queries:
    return (lambda x: x), (lambda x: jax.lax.psum(x, axis))
  return (
    lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True),
    lambda x: jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True),
  )


def _part(x, sharding):
  """A device's own queries of an array of all."""
  if not sharding.queries:
    return x
  devices = jax.lax.axis_size(sharding.memory)
  length = x.shape[1] // devices
  start = jax.lax.axis_index(sharding.memory) * length
  return jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)
