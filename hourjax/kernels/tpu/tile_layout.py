"""How the model's arrays become tiles, and the products of tiles.

The model has queries as [B, T, H, C]; head h belongs to the KV head h // G.
All G query heads of a KV head read the same keys, so a tile holds them side by
side, and a key that is fetched from HBM once serves all of them. With G = 2
heads and tiles of n = 3 queries, the columns of one tile are

    head 0 of t0 t1 t2 | head 1 of t0 t1 t2        "rows" of the tile: G * n

Queries, and all arrays that have a number for each query, are transposed: a
tile is [C, rows]. So scores are [keys, rows], and the statistics of the
softmax (one number a row) lie along the lanes of a register. They are called
rows because they are rows of the score matrix as papers write it.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from hourjax.kernels.tpu.tiles import Shape

NEVER = -1e30  # finite, so that exp2(NEVER - NEVER) stays a number
LOG2E = math.log2(math.e)  # the TPU has exp2; exp(x) = exp2(x * LOG2E)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """Multiplies [m, n] and [n, p], summed in float32.

  float32 factors are not rounded to bfloat16.
  """
  return _dot(a, b, 0)


def dot_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
  """Multiplies [m, n] and the transpose of [p, n], as `dot` does."""
  return _dot(a, b, 1)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """Contracts the last dimension of a with dimension `axis` of b."""
  # The precision is set here: under a global "highest", which a caller may
  # have set, the compiler refuses bfloat16 products.
  choice = jax.lax.Precision
  precision = choice.HIGHEST if a.dtype == jnp.float32 else choice.DEFAULT
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (axis,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def fold(x: jax.Array, shape: Shape) -> jax.Array:
  """Turns [B, T, H, C] into [B, K, tiles, C, rows], padded with zeros."""
  x = pad(x, 1, shape.query_tiles * shape.queries)
  x = pad(x, 3, shape.dim)
  return rearrange(
    x, "b (n t) (k g) c -> b k n c (g t)", t=shape.queries, g=shape.groups
  )


def unfold(x: jax.Array, shape: Shape, queries: int, dim: int) -> jax.Array:
  """Inverts `fold`, without the padding after `queries` and `dim`."""
  x = rearrange(x, "b k n c (g t) -> b (n t) (k g) c", g=shape.groups)
  return x[:, :queries, :, :dim]


def fold_numbers(x: jax.Array, shape: Shape, fill: float) -> jax.Array:
  """Turns [B, T, H] into [B, K, tiles, 1, rows], padded with `fill`."""
  x = pad(x, 1, shape.query_tiles * shape.queries, fill)
  return rearrange(
    x, "b (n t) (k g) -> b k n 1 (g t)", t=shape.queries, g=shape.groups
  )


def unfold_numbers(x: jax.Array, shape: Shape, queries: int) -> jax.Array:
  """Inverts `fold_numbers`, without the padding after `queries`."""
  x = rearrange(x, "b k n 1 (g t) -> b (n t) (k g)", g=shape.groups)
  return x[:, :queries]


def fold_segments(segment: jax.Array, shape: Shape) -> jax.Array:
  """Turns ids of queries, int32 [B, T], into [B, tiles, 1, rows].

  Every head of a group has the ids of its queries, hence the repetition.
  """
  segment = pad(segment, 1, shape.query_tiles * shape.queries)
  segment = rearrange(segment, "b (n t) -> b n 1 t", t=shape.queries)
  return jnp.tile(segment, (1, 1, 1, shape.groups))


def places(shape: Shape) -> jax.Array:
  """Returns which query of its tile each row is, int32 [1, rows]."""
  return jnp.tile(jnp.arange(shape.queries, dtype=jnp.int32), shape.groups)[
    None
  ]


def flat_keys(x: jax.Array, shape: Shape) -> jax.Array:
  """Turns [B, S, K, C] into [B, S, K * C]: a KV head is a range of lanes.

  Nothing is copied unless S is no multiple of the tiles or C none of the
  lanes; a transposed layout would copy all keys of an hour.
  """
  x = pad(x, 1, shape.key_tiles * shape.keys)
  x = pad(x, 3, shape.dim)
  return x.reshape(*x.shape[:2], -1)


def unflat_keys(x: jax.Array, heads: int, keys: int, dim: int) -> jax.Array:
  """Inverts `flat_keys`, without the padding after `keys` and `dim`."""
  return x.reshape(*x.shape[:2], heads, -1)[:, :keys, :, :dim]


def tile_segments(segment: jax.Array, shape: Shape) -> jax.Array:
  """Turns ids of keys, int32 [B, S], into [B, chunks of all tiles, 1, chunk].

  A chunk's ids are then read by its number, without a slice of lanes.
  """
  segment = pad(segment, 1, shape.key_tiles * shape.keys)
  return segment.reshape(segment.shape[0], -1, 1, shape.chunk)


def pad(x: jax.Array, axis: int, length: int, fill: float = 0) -> jax.Array:
  """Returns x with `fill` after its end along `axis`, up to `length`."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths, constant_values=fill)
