"""Topologies by name: which exist, and how many devices and hosts they have.

"v5e:4x4" is a slice of TPU chips, "h100:8" a machine of eight GPUs, and
"h100:16" two of them.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hourjax.errors import UserError
from hourjax.parallel.chips import CHIPS, Chip
from hourjax.parallel.gpus import GPUS

_LAYOUT = re.compile(r"\d+(x\d+){1,2}")


class Topology(NamedTuple):
  """Describes one or several slices of TPU chips, or machines with GPUs.

  Attributes:
    chip: the generation.
    shape: chips along each dimension of a slice; the number of GPUs.
    slices: how many slices there are.
    measured: which facts of the chip were measured, and on what, in words;
      empty where all are those of the table.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1
  measured: str = ""

  @property
  def name(self) -> str:
    """Returns the name of one slice as the compiler wants it, "v5e:4x4"."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def gpus(self) -> bool:
    """Returns whether these are GPUs."""
    return self.chip.name in GPUS

  @property
  def chips(self) -> int:
    """Returns the chips of all slices."""
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """Returns the devices of all slices, as jax counts them."""
    return self.chips * self.chip.devices

  @property
  def hosts(self) -> int:
    """Returns the hosts (virtual machines) of all slices."""
    return max(self.slices, self.chips // self.chip.host)

  @property
  def bounds(self) -> dict[str, tuple[int, int, int]]:
    """Returns what the compiler must know of a slice smaller than a host.

    Returns:
      Arguments of `topologies.get_topology_desc`; none for larger slices.
    """
    if self.gpus or math.prod(self.shape) >= self.chip.host:
      return {}
    x, y, z = (*self.shape, 1, 1)[:3]
    return {"chips_per_host_bounds": (x, y, z)}

  def doubled(self) -> "Topology | None":
    """Returns the next larger slice: 2x2, 2x4, 4x4, ...; None after the last.

    The shortest dimension that can be doubled is doubled.
    """
    bigger = [
      (*self.shape[:i], 2 * size, *self.shape[i + 1 :])
      for i, size in reversed([*enumerate(self.shape)])
    ]
    bigger = [shape for shape in bigger if _exists(self.chip, shape)]
    if not bigger:
      return None
    return self._replace(shape=min(bigger, key=max))


def parse_topology(name: str, slices: int = 1) -> Topology:
  """Parses the name of a topology.

  Args:
    name: a generation and the chips of a slice, such as "v5e:16x16", or a GPU
      and how many there are, such as "h100:8".
    slices: how many slices there are.

  Raises:
    UserError: an unknown generation, or a shape that does not exist: the
      compiler would end its process.
  """
  generation, _, layout = name.partition(":")
  if generation in GPUS:
    return _parse_gpus(name, layout, slices)
  if generation not in CHIPS:
    raise UserError(
      f"--topology={name}: {generation!r} is no generation of TPU, and no GPU"
      f" that is known; known are {', '.join([*CHIPS, *GPUS])}"
    )
  chip = CHIPS[generation]
  example = "4x4x4" if chip.dims == 3 else "4x4"
  if not _LAYOUT.fullmatch(layout):
    raise UserError(
      f"--topology={name}: give its chips, such as {generation}:{example}"
    )
  shape = tuple(int(n) for n in layout.split("x"))
  if len(shape) != chip.dims:
    raise UserError(
      f"--topology={name}: {generation} has {chip.dims} dimensions, not"
      f" {len(shape)}; write it as {generation}:{example}"
    )
  if not _exists(chip, shape):
    largest = "x".join(map(str, chip.largest))
    raise UserError(
      f"--topology={name}: there is no such slice; dimensions are 1, 2 or"
      f" multiples of 4, up to {largest}"
    )
  if slices < 1:
    raise UserError(f"--num_slices={slices}: give at least 1")
  return Topology(chip, shape, slices)


def _parse_gpus(name: str, layout: str, slices: int) -> Topology:
  """Parses the number of GPUs in the name of a topology; see above."""
  chip = GPUS[name.partition(":")[0]]
  if slices != 1:
    raise UserError(
      f"--num_slices={slices}: GPUs have no slices; give the number of all,"
      f" such as --topology={chip.name}:{chip.host * max(1, slices)}"
    )
  if not layout.isdecimal() or not _exists(chip, (int(layout),)):
    raise UserError(
      f"--topology={name}: give how many there are, 1, 2, 4 or a multiple of"
      f" {chip.host} up to {chip.largest[0]}, such as {chip.name}:{chip.host}"
    )
  return Topology(chip, (int(layout),))


def topology_of(devices: Sequence[Any], chip: Chip) -> Topology:
  """Returns the slices that devices belong to.

  Args:
    devices: all of the slices', as jax lists them.
    chip: their generation.
  """
  places = np.array([device.coords[: chip.dims] for device in devices])
  slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
  shape = tuple(int(n) for n in np.ptp(places, axis=0) + 1)
  return Topology(chip, shape, len(slices))


_MOST = 256  # chips of a slice that `any` stands for


def parse_topologies(names: str, slices: int = 1) -> list[Topology]:
  """Parses several topologies.

  Args:
    names: separated by commas, such as "v5e:4x4,v6e:2x4"; "v5e:any" is every
      slice of up to 256 chips that comes from doubling the smallest. So is
      "h100:any".
    slices: of each.

  Raises:
    UserError: see `parse_topology`.
  """
  found: list[Topology] = []
  for name in names.split(","):
    generation, _, layout = name.partition(":")
    known = CHIPS | GPUS
    if layout != "any" or generation not in known:
      found.append(parse_topology(name, slices))
      continue
    smallest = "x".join("1" * known[generation].dims)
    each: Topology | None = parse_topology(f"{generation}:{smallest}", slices)
    while each is not None and each.chips <= _MOST * slices:
      found.append(each)
      each = each.doubled()
  return found


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
  """Returns whether there are slices of this shape, or a compiler for it."""
  if chip.name in GPUS:
    return shape[0] in (1, 2, 4) or (
      0 < shape[0] <= chip.largest[0] and shape[0] % chip.host == 0
    )
  fits = all(
    size in (1, 2) or (0 < size <= most and size % 4 == 0)
    for size, most in zip(sorted(shape), sorted(chip.largest))
  )
  return fits and (math.prod(shape) < 4 or math.prod(shape) % 4 == 0)
