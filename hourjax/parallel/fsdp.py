"""Weights that every device stores a part of (FSDP, arXiv 2304.11277).

They are cast, then gathered for the time of a product, and their gradients are
summed in float32 into the part that each device stores. Written out as
collectives: left to itself, the compiler sums whole gradients and drops what
it does not need, at twice the traffic.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hourjax.kernels.constants import LANES
from hourjax.parallel import collectives as over
from hourjax.parallel.chips import chip_of
from hourjax.parallel.rules import RULES, has_mesh, in_use, spec

_LARGE = 16 << 20  # bytes
Names = tuple[str | None, ...]


def gather_weight(
  kernel: Float[Array, "i o"], axes: Names, dtype: jax.typing.DTypeLike
) -> Float[Array, "i o"]:
  """The weight in `dtype`, whole but for the axes that stay split in use."""
  if not has_mesh():
    return kernel.astype(dtype)

  def here(part):
    part = part.astype(dtype)
    for dim, axis in enumerate(axes):
      names = _travelling(axis)
      if names:
        part = _join(part, names, dim)
    return part

  return over.local_shard_map(here, (spec(*axes),), in_use(*axes))(kernel)


def weight_gradients(
  x: Float[Array, "a b i"],
  d_y: Float[Array, "a b o"],
  axes: Names,
  lead: Names,
  dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, "i o"], Float[Array, "o"]]:
  """Gradients of kernel and bias of y = x @ kernel + bias, in `dtype`.

  Args:
    x: the layer's input.
    d_y: gradient of its output.
    axes: logical axes of the kernel.
    lead: logical axes of a and b.
    dtype: of the sums; the kernel's.
  """

  def here(x, d_y):
    kernel = jnp.einsum("abi,abo->io", x, d_y, preferred_element_type=dtype)
    bias = d_y.astype(dtype).sum((0, 1))
    bias = over.total(bias, *_summed(lead, ()))
    scattered = ()
    for dim, axis in enumerate(axes):
      names = _travelling(axis)
      if names:
        kernel = _scatter(kernel, names, dim)
        scattered += names
    return over.total(kernel, *_summed(lead, scattered)), bias

  inputs, outputs = (in_use(axis) for axis in axes)
  function = over.local_shard_map(
    here,
    (spec(*lead, None), spec(*lead, None))
    if lead[0] == "images"
    else (_with_last(lead, inputs), _with_last(lead, outputs)),
    (spec(*axes), outputs if lead[0] != "images" else spec(None)),
  )
  return function(x, d_y)


def _with_last(lead, last):
  return jax.sharding.PartitionSpec(*spec(*lead), *last)


def _travelling(axis: str | None) -> tuple[str, ...]:
  """Mesh axes of more than one device that a dimension is gathered over."""
  if axis is None:
    return ()
  stay = set(jax.tree.leaves(tuple(in_use(axis))))
  return tuple(n for n in RULES[axis] if n not in stay and over.size(n) > 1)


def _summed(lead, scattered) -> tuple[str, ...]:
  names = [name for axis in lead if axis for name in RULES[axis]]
  return tuple(name for name in names if name not in scattered)


def _join(part, names, dim):
  """All parts along `dim`."""
  front = jnp.moveaxis(part, dim, 0)
  whole = _lines(front)
  length = front.shape[0] * math.prod(over.size(name) for name in names)
  for each in _at_once(names, length * front.nbytes // front.shape[0]):
    whole = jax.lax.all_gather(whole, each)
  return jnp.moveaxis(whole.reshape(length, *front.shape[1:]), 0, dim)


def _at_once(names, size):
  """Mesh axes to gather over together, the innermost first.

  On a two-dimensional torus all of them, which uses all its links. On one of
  three dimensions, or for few bytes, the compiler then sums zeros instead, at
  twice the traffic.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  chip = device and chip_of(device.device_kind)
  if chip is None or (chip.dims < 3 and size >= _LARGE):
    return [names]
  return [(name,) for name in reversed(names)]


def _scatter(whole, names, dim):
  """A device's part along `dim` of the sum over devices.

  One mesh axis after the other: over two at once the compiler sums all of it
  everywhere, which sends twice as much.
  """
  front = jnp.moveaxis(whole, dim, 0)
  sizes = [over.size(name) for name in names]
  shape = (front.shape[0] // math.prod(sizes), *front.shape[1:])
  part = jax.vmap(_lines)(front.reshape(-1, *shape))
  part = part.reshape(*sizes, *part.shape[1:])
  for name in names:
    part = jax.lax.psum_scatter(part, name)
  return jnp.moveaxis(part.reshape(shape), 0, dim)


def _lines(part):
  """As whole tiles where that is possible.

  A few rows of a matrix are no whole tile: they would be padded, or summed
  with the rows of all other devices.
  """
  return part.reshape(-1, LANES if part.size % LANES == 0 else part.size)
