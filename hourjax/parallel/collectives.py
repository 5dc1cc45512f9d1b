"""Collectives of functions that run on each device's own part.

`local_shard_map` makes such a function. Where no mesh is set it runs on whole
arrays, and its collectives do nothing.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hourjax.parallel.rules import has_mesh


def local_shard_map(function: Callable, in_specs, out_specs) -> Callable:
  """Wraps a function so that it runs on each device's part of its arrays.

  The result must not be differentiated: define the custom gradient outside,
  and compute it in a `local_shard_map` of its own.
  """
  if not has_mesh():
    return function
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def gather(x: jax.Array, *axes: str, dim: int) -> jax.Array:
  """The parts of all devices along mesh axes, joined along `dim`."""
  for axis in reversed(_there(axes)):
    x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
  return x


def scatter_sum(x: jax.Array, axis: str, *, dim: int) -> jax.Array:
  """A device's part along `dim` of the sum over a mesh axis."""
  count = size(axis)
  if count == 1:
    return x
  x = x.reshape(*x.shape[:dim], count, -1, *x.shape[dim + 1 :])
  # The outermost dimension, else the compiler sums all of it everywhere.
  return jax.lax.psum_scatter(jnp.moveaxis(x, dim, 0), axis)


def total(x: jax.Array, *axes: str) -> jax.Array:
  """The sum over mesh axes."""
  return jax.lax.psum(x, _there(axes)) if _there(axes) else x


def largest(x: jax.Array, *axes: str) -> jax.Array:
  """The maximum over mesh axes."""
  return jax.lax.pmax(x, _there(axes)) if _there(axes) else x


def place(*axes: str) -> jax.Array | int:
  """This device's number along mesh axes, the last one fastest."""
  return jax.lax.axis_index(_there(axes)) if _there(axes) else 0


def size(*axes: str) -> int:
  """Devices along mesh axes."""
  if not has_mesh():
    return 1
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[axis] for axis in axes)


def _there(axes: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(axis for axis in axes if size(axis) > 1)
