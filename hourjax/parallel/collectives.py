"""Collectives for functions that run on each device's own part of arrays.

`local_shard_map` makes such a function, and the others are called within it.
They are named as in `jax.lax`, and take names of mesh axes. Where no mesh is
set the function runs on whole arrays, and its collectives do nothing; axes of
one device are left out likewise.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hourjax.parallel.rules import has_mesh


def local_shard_map(
  function: Callable, in_specs: Any, out_specs: Any
) -> Callable:
  """Wraps a function so that it runs on each device's part of its arrays.

  The result must not be differentiated: define the custom gradient outside,
  and compute it in a `local_shard_map` of its own.

  Args:
    function: of parts of arrays.
    in_specs: partition specs of its arguments.
    out_specs: partition specs of its results.
  """
  if not has_mesh():
    return function
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def all_gather(x: jax.Array, *axes: str, dim: int) -> jax.Array:
  """Joins the parts of all devices along mesh axes, along dimension `dim`."""
  for axis in reversed(_of_several(axes)):
    x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
  return x


def reduce_scatter(x: jax.Array, axis: str, *, dim: int) -> jax.Array:
  """Returns a device's part along `dim` of the sum over a mesh axis."""
  count = axis_size(axis)
  if count == 1:
    return x
  x = x.reshape(*x.shape[:dim], count, -1, *x.shape[dim + 1 :])
  # The devices' dimension is moved to the front. Elsewhere the compiler sums
  # all of x on all devices and then cuts, which sends twice as much.
  return jax.lax.psum_scatter(jnp.moveaxis(x, dim, 0), axis)


def psum(x: jax.Array, *axes: str) -> jax.Array:
  """Returns the sum over mesh axes."""
  return jax.lax.psum(x, _of_several(axes)) if _of_several(axes) else x


def pmax(x: jax.Array, *axes: str) -> jax.Array:
  """Returns the maximum over mesh axes."""
  return jax.lax.pmax(x, _of_several(axes)) if _of_several(axes) else x


def axis_index(*axes: str) -> jax.Array | int:
  """Returns this device's number along mesh axes, the last one fastest."""
  return jax.lax.axis_index(_of_several(axes)) if _of_several(axes) else 0


def axis_size(*axes: str) -> int:
  """Returns the number of devices along mesh axes."""
  if not has_mesh():
    return 1
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[axis] for axis in axes)


def _of_several(axes: tuple[str, ...]) -> tuple[str, ...]:
  """Returns those of the axes that have more than one device."""
  return tuple(axis for axis in axes if axis_size(axis) > 1)
