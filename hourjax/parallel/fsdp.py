"""Weights of which every device stores a part (FSDP, arXiv 2304.11277).

A weight is cast, then gathered for the time of a product, and its gradient is
summed in float32 into the part that each device stores:

    forward    part --cast--> bfloat16 --all-gather--> whole --> product
    backward   gradient of the whole, float32 --reduce-scatter--> part

The collectives are written out. Left to itself, the compiler sums whole
gradients on all devices and drops what a device does not need, which sends
twice as much.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hourjax.kernels.constants import LANES
from hourjax.parallel import collectives
from hourjax.parallel.chips import chip_of
from hourjax.parallel.rules import RULES, has_mesh, in_use, spec

# Bytes of a gathered weight from which all axes are gathered at once.
_LARGE = 16 << 20
Names = tuple[str | None, ...]


def gather_weight(
  kernel: Float[Array, "i o"], axes: Names, dtype: jax.typing.DTypeLike
) -> Float[Array, "i o"]:
  """Returns the weight in `dtype`, gathered for a product.

  Args:
    kernel: of which each device stores a part.
    axes: logical axes of its dimensions.
    dtype: of the product.

  Returns:
    The whole weight, but for the axes that stay split in use.
  """
  if not has_mesh():
    return kernel.astype(dtype)

  def local(part: jax.Array) -> jax.Array:
    # Cast first: a bfloat16 number takes half the traffic of a float32 one.
    part = part.astype(dtype)
    for dim, axis in enumerate(axes):
      names = _gathered_axes(axis)
      if names:
        part = _join(part, names, dim)
    return part

  return collectives.local_shard_map(local, (spec(*axes),), in_use(*axes))(
    kernel
  )


def weight_gradients(
  x: Float[Array, "a b i"],
  d_y: Float[Array, "a b o"],
  axes: Names,
  lead: Names,
  dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, "i o"], Float[Array, "o"]]:
  """Returns the gradients of kernel and bias of y = x @ kernel + bias.

  Args:
    x: the layer's input.
    d_y: gradient of its output.
    axes: logical axes of the kernel.
    lead: logical axes of a and b.
    dtype: of the sums; that of the stored kernel.

  Returns:
    The gradients in `dtype`, split as the parameters are stored.
  """

  def local(x: jax.Array, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = jnp.einsum("abi,abo->io", x, d_y, preferred_element_type=dtype)
    bias = d_y.astype(dtype).sum((0, 1))
    bias = collectives.psum(bias, *_summed(lead, ()))
    scattered = ()
    for dim, axis in enumerate(axes):
      names = _gathered_axes(axis)
      if names:
        kernel = _scatter(kernel, names, dim)
        scattered += names
    return collectives.psum(kernel, *_summed(lead, scattered)), bias

  inputs, outputs = (in_use(axis) for axis in axes)
  function = collectives.local_shard_map(
    local,
    (spec(*lead, None), spec(*lead, None))
    if lead[0] == "images"
    else (_with_last(lead, inputs), _with_last(lead, outputs)),
    (spec(*axes), outputs if lead[0] != "images" else spec(None)),
  )
  return function(x, d_y)


def _with_last(
  lead: Names, last: jax.sharding.PartitionSpec
) -> jax.sharding.PartitionSpec:
  """Returns the spec of the leading axes and of the last dimension."""
  return jax.sharding.PartitionSpec(*spec(*lead), *last)


def _gathered_axes(axis: str | None) -> tuple[str, ...]:
  """Returns the mesh axes over which a dimension is gathered for its use."""
  if axis is None:
    return ()
  stay = set(jax.tree.leaves(tuple(in_use(axis))))
  return tuple(
    name
    for name in RULES[axis]
    if name not in stay and collectives.axis_size(name) > 1
  )


def _summed(lead: Names, scattered: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the mesh axes of the leading dimensions, without the scattered."""
  names = [name for axis in lead if axis for name in RULES[axis]]
  return tuple(name for name in names if name not in scattered)


def _join(part: jax.Array, names: tuple[str, ...], dim: int) -> jax.Array:
  """Gathers all parts along dimension `dim` over mesh axes."""
  front = jnp.moveaxis(part, dim, 0)
  whole = _as_tiles(front)
  length = front.shape[0] * math.prod(
    collectives.axis_size(name) for name in names
  )
  for each in _gather_steps(names, length * front.nbytes // front.shape[0]):
    whole = jax.lax.all_gather(whole, each)
  return jnp.moveaxis(whole.reshape(length, *front.shape[1:]), 0, dim)


def _gather_steps(names: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
  """Returns which mesh axes are gathered over together, the innermost first.

  On a two-dimensional torus all axes are gathered at once, which uses all its
  links. On a three-dimensional torus, and for few bytes, the compiler would
  turn that into a sum over all devices of parts padded with zeros, which sends
  twice as much; there one axis is gathered after the other.

  Args:
    names: of the mesh axes.
    size: bytes of the gathered array.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  chip = device and chip_of(device.device_kind)
  if chip is None or (chip.dims < 3 and size >= _LARGE):
    return [names]
  return [(name,) for name in reversed(names)]


def _scatter(whole: jax.Array, names: tuple[str, ...], dim: int) -> jax.Array:
  """Returns a device's part along `dim` of the sum over mesh axes.

  One mesh axis after the other: over two at once the compiler sums all of the
  array on all devices, which sends twice as much.
  """
  front = jnp.moveaxis(whole, dim, 0)
  sizes = [collectives.axis_size(name) for name in names]
  shape = (front.shape[0] // math.prod(sizes), *front.shape[1:])
  part = jax.vmap(_as_tiles)(front.reshape(-1, *shape))
  part = part.reshape(*sizes, *part.shape[1:])
  for name in names:
    part = jax.lax.psum_scatter(part, name)
  return jnp.moveaxis(part.reshape(shape), 0, dim)


def _as_tiles(part: jax.Array) -> jax.Array:
  """Reshapes a part to rows of 128 numbers where that is possible.

  The TPU stores arrays in tiles of 8 x 128 numbers. A few rows of a matrix do
  not fill a tile: they would be padded before they are sent, or summed together
  with the rows of all other devices.
  """
  return part.reshape(-1, LANES if part.size % LANES == 0 else part.size)
