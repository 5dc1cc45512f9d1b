"""What the forward and the backward kernel compute alike."""

import math

import jax
import jax.numpy as jnp

NEVER = -1e30  # finite, so that exp2(NEVER - NEVER) stays a number
UNSEEN = 1e30  # log-sum-exp of a query that sees no key: its weights are 0
LOG2E = math.log2(math.e)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """[m, n] x [n, p], summed in float32; float32 factors are not rounded."""
  return _dot(a, b, 0)


def dot_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
  """[m, n] x [p, n]: as `dot` with b transposed."""
  return _dot(a, b, 1)


def _dot(a, b, axis):
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (axis,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def mask(key_segment: jax.Array, query_segment: jax.Array) -> jax.Array:
  """int32 [1, keys] and [1, rows] to bool [keys, rows]: the same segment?"""
  square = jnp.broadcast_to(key_segment, (128, key_segment.shape[1]))
  column = square.T[:, :1]
  return (column == query_segment) & (column > 0)
