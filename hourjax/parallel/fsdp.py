"""Weights of which every device stores a part (FSDP, arXiv 2304.11277).

A weight is cast, then gathered for the time of a product, and its gradient is
summed, in float32 unless told otherwise, into the part that each device stores:

    forward    part --cast--> bfloat16 --all-gather--> whole --> product
    backward   gradient of the whole, float32 --reduce-scatter--> part

The collectives are written out. Left to itself, the compiler sums whole
gradients on all devices and drops what a device does not need, which sends
twice as much.

For a TPU it also waits for every reduce-scatter. So along the first axis the
sum is taken while the gradient is computed (a collective product, arXiv
2105.04663): the gradient is cut into a block for each of n devices, and a block
travels round the ring of devices while each of them computes its share of the
next one and adds it:

    device      0    1    2    3
    step 0      3    0    1    2     the block that is computed
    step 1      2    3    0    1     the block that came from the left, plus own
    step 2      1    2    3    0
    step 3      0    1    2    3     the own one, summed over all devices

Half of each block travels the other way round, so that links are used in both
directions.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hourjax.kernels.constants import LANES
from hourjax.parallel import collectives
from hourjax.parallel.chips import chip_of
from hourjax.parallel.rules import RULES, has_mesh, in_use, spec

# Bytes of a gathered weight from which all axes are gathered at once.
_LARGE = 16 << 20
Names = tuple[str | None, ...]
_SUMS: contextvars.ContextVar[str] = contextvars.ContextVar(
  "gradient_dtype", default="float32"
)


@contextlib.contextmanager
def gradients_summed_in(dtype: str) -> Iterator[None]:
  """Makes gradients that are traced inside travel between devices as `dtype`.

  Each device's own part is computed and kept in float32. In bfloat16 half as
  many bytes are sent, and each of the sums is rounded to 8 bits.

  Args:
    dtype: "float32" or "bfloat16".
  """
  token = _SUMS.set(dtype)
  try:
    yield
  finally:
    _SUMS.reset(token)


def gather_weight(
  kernel: Float[Array, "i o"], axes: Names, dtype: DTypeLike
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
  dtype: DTypeLike,
) -> tuple[Float[Array, "i o"], Float[Array, "o"]]:
  """Returns the gradients of kernel and bias of y = x @ kernel + bias.

  Args:
    x: the layer's input.
    d_y: gradient of its output.
    axes: logical axes of the kernel.
    lead: logical axes of a and b.
    dtype: of the gradients; that of the stored kernel. The sums over devices
      are taken in that of `gradients_summed_in`.

  Returns:
    The gradients in `dtype`, split as the parameters are stored.
  """
  sent = jnp.dtype(_SUMS.get())

  def local(x: jax.Array, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    bias = d_y.astype(dtype).sum((0, 1))
    bias = collectives.psum(bias, *_summed(lead, ()))
    split = [
      (dim, names)
      for dim, axis in enumerate(axes)
      if (names := _gathered_axes(axis))
    ]
    if not split:
      kernel = _product(x, d_y, dtype)
    else:
      dim, (first, *rest) = split[0]
      if _rings():
        kernel = _ring_product(x, d_y, dtype, first, dim, sent)
        # What is left is small: an n-th of the gradient.
        split[0] = dim, tuple(rest)
      else:
        kernel = _product(x, d_y, dtype)
      for dim, names in split:
        if names:
          kernel = _scatter(kernel.astype(sent), names, dim).astype(dtype)
    scattered = [name for axis in axes for name in _gathered_axes(axis)]
    if left := _summed(lead, tuple(scattered)):
      kernel = collectives.psum(kernel.astype(sent), *left).astype(dtype)
    return kernel, bias

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


def _product(
  x: Float[Array, "a b i"], d_y: Float[Array, "a b o"], dtype: DTypeLike
) -> Float[Array, "i o"]:
  """Returns one device's share of the gradient of a kernel."""
  return jnp.einsum("abi,abo->io", x, d_y, preferred_element_type=dtype)


def _rings() -> bool:
  """Returns whether gradients are summed on a ring: on TPUs.

  The compiler for GPUs runs a reduce-scatter beside other work. On a CPU the
  loops of several rings run at once, and their threads can wait for one another
  for good.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device is not None and device.platform == "tpu"


def _ring_product(
  x: Float[Array, "a b i"],
  d_y: Float[Array, "a b o"],
  dtype: DTypeLike,
  axis: str,
  dim: int,
  sent: DTypeLike,
) -> Float[Array, "j p"]:
  """Returns a device's block of a kernel's gradient, summed over a mesh axis.

  Args:
    x: the layer's input.
    d_y: gradient of its output.
    dtype: of the sums.
    axis: of the mesh; its n devices get a block each.
    dim: of the gradient `[i, o]` that is cut into blocks; the other one is cut
      in half, one for each direction.
    sent: dtype in which sums travel.
  """
  devices = collectives.axis_size(axis)
  place = jax.lax.axis_index(axis)
  whole, other = (x, d_y) if dim == 0 else (d_y, x)
  size = whole.shape[2] // devices
  half = other.shape[2] // 2

  def share(block: jax.Array, part: jax.Array) -> jax.Array:
    cut = jax.lax.dynamic_slice_in_dim(whole, block % devices * size, size, 2)
    pair = (cut, part) if dim == 0 else (part, cut)
    return _product(*pair, dtype)

  ways = {1: other[..., :half], -1: other[..., half:]}

  def turn(
    totals: tuple[jax.Array, ...], step: jax.Array
  ) -> tuple[tuple[jax.Array, ...], None]:
    found = []
    for total, (sign, part) in zip(totals, ways.items()):
      ring = [(i, (i + sign) % devices) for i in range(devices)]
      came = jax.lax.ppermute(total.astype(sent), axis, ring).astype(dtype)
      found.append(came + share(place - sign * (1 + step), part))
    return tuple(found), None

  first = tuple(share(place - sign, part) for sign, part in ways.items())
  parts, _ = jax.lax.scan(turn, first, jnp.arange(1, devices))
  return jnp.concatenate(parts, axis=1 - dim)


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
