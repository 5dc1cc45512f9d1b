"""What the forward and the backward kernel compute alike."""
# MERGED hourjax.kernels.tpu.folding:
# Between the model's arrays and the kernels' tiles.
#
# Queries, and all that is theirs, are transposed: a tile is [C, rows], and row
# g * n + t of a tile of n queries holds head g of its group at query t. So
# softmax statistics are rows of lanes, and scores are [keys, rows].

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from hourjax.kernels.constants import LANES
from hourjax.kernels.tpu.tiles import Shape

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


def fold(x: jax.Array, shape: Shape) -> jax.Array:
  """[B, T, H, C] to [B, K, tiles, C, rows], padded with zeros."""
  x = pad(x, 1, shape.query_tiles * shape.queries)
  x = pad(x, 3, shape.dim)
  return rearrange(
    x, "b (n t) (k g) c -> b k n c (g t)", t=shape.queries, g=shape.groups
  )


def unfold(x: jax.Array, shape: Shape, queries: int, dim: int) -> jax.Array:
  """Inverse of `fold`."""
  x = rearrange(x, "b k n c (g t) -> b (n t) (k g) c", g=shape.groups)
  return x[:, :queries, :, :dim]


def fold_numbers(x: jax.Array, shape: Shape, fill: float) -> jax.Array:
  """[B, T, H] to [B, K, tiles, 1, rows], padded with `fill`."""
  x = pad(x, 1, shape.query_tiles * shape.queries, fill)
  return rearrange(
    x, "b (n t) (k g) -> b k n 1 (g t)", t=shape.queries, g=shape.groups
  )


def unfold_numbers(x: jax.Array, shape: Shape, queries: int) -> jax.Array:
  """Inverse of `fold_numbers`."""
  x = rearrange(x, "b k n 1 (g t) -> b (n t) (k g)", g=shape.groups)
  return x[:, :queries]


def fold_segments(segment: jax.Array, shape: Shape) -> jax.Array:
  """Ids of the queries, int32 [B, T] to [B, tiles, 1, rows]."""
  segment = pad(segment, 1, shape.query_tiles * shape.queries)
  segment = rearrange(segment, "b (n t) -> b n 1 t", t=shape.queries)
  return jnp.tile(segment, (1, 1, 1, shape.groups))


def flat_keys(x: jax.Array, shape: Shape) -> jax.Array:
  """[B, S, K, C] to [B, S, K * C]: a KV head is a range of lanes.

  Nothing moves unless S is off the tiles or C off the lanes.
  """
  x = pad(x, 1, shape.key_tiles * shape.keys)
  x = pad(x, 3, shape.dim)
  return x.reshape(*x.shape[:2], -1)


def unflat_keys(x: jax.Array, heads: int, keys: int, dim: int) -> jax.Array:
  """Inverse of `flat_keys`."""
  return x.reshape(*x.shape[:2], heads, -1)[:, :keys, :, :dim]


def tile_segments(segment: jax.Array, shape: Shape) -> jax.Array:
  """Ids of the keys, int32 [B, S] to [B, chunks of all tiles, 1, chunk]."""
  segment = pad(segment, 1, shape.key_tiles * shape.keys)
  return segment.reshape(segment.shape[0], -1, 1, shape.chunk)


def pad(x: jax.Array, axis: int, length: int, fill: float = 0) -> jax.Array:
  """x with `fill` after its end along `axis`, up to `length`."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths, constant_values=fill)
