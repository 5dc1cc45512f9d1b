"""What the forward and the backward kernel compute alike."""

import math

import jax
import jax.numpy as jnp

from hourjax.kernels.common import LANES

NEVER = -1e30  # finite, so that exp2(NEVER - NEVER) stays a number
LOG2E = math.log2(math.e)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """[m, n] x [n, p], summed in float32; float32 factors are not rounded."""
  return _dot(a, b, 0)


def dot_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
  """[m, n] x [p, n]: as `dot` with b transposed."""
  return _dot(a, b, 1)


def _dot(a, b, axis):
  # Said outright: the compiler refuses bfloat16 under a global "highest".
  choice = jax.lax.Precision
  precision = choice.HIGHEST if a.dtype == jnp.float32 else choice.DEFAULT
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (axis,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def mask(key_segment: jax.Array, query_segment: jax.Array) -> jax.Array:
  """int32 [1, keys] and [1, rows] to bool [keys, rows]: the same segment?"""
  # Ids lie along lanes and are wanted down a column: a whole register's width
  # of them is what the transpose unit takes.
  square = jnp.broadcast_to(key_segment, (LANES, key_segment.shape[1]))
  column = square.T[:, :1]
  return (column == query_segment) & (column > 0)
