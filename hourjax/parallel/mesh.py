"""The mesh of devices: axes data, fsdp, seq and tensor."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from hourjax.errors import UserError

AXES = ("data", "fsdp", "seq", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Describes how many devices lie along each axis.

  One of data and fsdp may be -1: it takes what the others leave.

  Attributes:
    data: copies of the parameters; rows are split over it.
    fsdp: rows and parameters are split over it.
    seq: memory, queries, decoder positions and parameters are split over it.
    tensor: heads, MLP width and vocabulary are split over it.
    slices: slices of a multi-slice job, all along `data`: between slices
      only gradients are sent. 0 takes the number that the devices report.
  """

  data: int = 1
  fsdp: int = -1
  seq: int = 1
  tensor: int = 1
  slices: int = 0

  def __post_init__(self) -> None:
    for axis in AXES:
      size = getattr(self, axis)
      if size < 1 and not (size == -1 and axis in ("data", "fsdp")):
        raise UserError(
          f"config.mesh.{axis} is {size}; it must be at least 1 (data or fsdp"
          " may be -1, for all devices that are left)"
        )
    if self.data == self.fsdp == -1:
      raise UserError(
        "config.mesh.data and config.mesh.fsdp are both -1; only one of them"
        " can take the devices that are left"
      )
    if self.slices < 0:
      raise UserError(
        f"config.mesh.slices is {self.slices}; it must be 0 (as the devices"
        " tell) or more"
      )

  def sizes(self, devices: int, slices: int = 1) -> tuple[int, int, int, int]:
    """Returns the sizes of the four axes.

    Args:
      devices: of the job.
      slices: of the job, as the devices report.

    Raises:
      UserError: they do not fill the devices, or data is not split by slices.
    """
    sizes = [getattr(self, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size > 0)
    filled = [devices // known if size == -1 else size for size in sizes]
    if math.prod(filled) != devices:
      raise UserError(
        f"config.mesh ({self}) takes {known if -1 in sizes else ''}"
        f"{' x n' if -1 in sizes else math.prod(filled)} devices and there are"
        f" {devices}; choose sizes whose product is {devices}"
      )
    wanted = self.slices or slices
    if slices not in (1, wanted):
      raise UserError(
        f"config.mesh.slices is {wanted} and the devices are of {slices}"
        " slices; set it to that number or to 0"
      )
    if filled[0] % wanted:
      raise UserError(
        f"config.mesh.data={filled[0]} cannot be split over {wanted} slices;"
        " make it a multiple: only gradients should travel between slices"
      )
    data, fsdp, seq, tensor = filled
    return data, fsdp, seq, tensor

  def __str__(self) -> str:
    return ", ".join(f"{axis}={getattr(self, axis)}" for axis in AXES)


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Arranges devices in a mesh, neighbours of an axis near one another.

  Args:
    config: sizes of the axes.
    devices: all of them by default; those of a topology to compile for it.

  Raises:
    UserError: the sizes do not fill the devices, or slices do not fit.
  """
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  sizes = config.sizes(len(devices), slices)
  if slices > 1:
    array = mesh_utils.create_hybrid_device_mesh(
      (sizes[0] // slices, *sizes[1:]),
      (slices, 1, 1, 1),
      devices,
      allow_split_physical_axes=True,
    )
  else:
    array = _arranged(sizes, devices)
  return Mesh(array, AXES)


def _arranged(
  sizes: tuple[int, ...], devices: Sequence[jax.Device]
) -> np.ndarray:
  """Returns the devices of one slice as an array of these sizes."""
  if devices[0].platform != "tpu":
    return np.array(devices).reshape(sizes)
  return mesh_utils.create_device_mesh(
    sizes, devices, allow_split_physical_axes=True
  )


def divisors(n: int) -> list[int]:
  """Returns the sizes that an axis of n devices can have, ascending."""
  return [d for d in range(1, n + 1) if n % d == 0]
