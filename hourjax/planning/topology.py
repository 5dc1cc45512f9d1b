"""Topologies by name: which exist, and how many devices and hosts they are."""

import math
import re
from typing import NamedTuple

from hourjax.errors import UserError
from hourjax.parallel.chips import CHIPS, Chip

_LAYOUT = re.compile(r"\d+(x\d+){1,2}")


class Topology(NamedTuple):
  """Slices of TPU chips.

  Attributes:
    chip: the generation.
    shape: chips along each dimension of a slice.
    slices: how many there are.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """Of one slice, as the compiler wants it."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def chips(self) -> int:
    """Of all slices."""
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """Of all slices, as jax counts them."""
    return self.chips * self.chip.devices

  @property
  def hosts(self) -> int:
    """VMs of all slices."""
    return max(self.slices, self.chips // self.chip.host)

  @property
  def bounds(self) -> dict[str, tuple[int, int, int]]:
    """What the compiler must be told of slices smaller than a host."""
    if math.prod(self.shape) >= self.chip.host:
      return {}
    return {"chips_per_host_bounds": (*self.shape, 1, 1)[:3]}

  def doubled(self) -> "Topology | None":
    """The next larger slice, or None if there is none: 2x2, 2x4, 4x4, ..."""
    bigger = [
      (*self.shape[:i], 2 * size, *self.shape[i + 1 :])
      for i, size in reversed([*enumerate(self.shape)])
    ]
    bigger = [shape for shape in bigger if _exists(self.chip, shape)]
    if not bigger:
      return None
    return self._replace(shape=min(bigger, key=max))


def parse_topology(name: str, slices: int = 1) -> Topology:
  """ "v5e:16x16" to a Topology.

  Raises:
    UserError: an unknown generation, or a shape that does not exist: the
      compiler would end its process.
  """
  generation, _, layout = name.partition(":")
  if generation not in CHIPS:
    raise UserError(
      f"--topology={name}: {generation!r} is no generation of TPU; known are"
      f" {', '.join(CHIPS)}"
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


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
  """Whether chips are sold, or at least compiled for, in this shape."""
  fits = all(
    size in (1, 2) or (0 < size <= most and size % 4 == 0)
    for size, most in zip(sorted(shape), sorted(chip.largest))
  )
  return fits and (math.prod(shape) < 4 or math.prod(shape) % 4 == 0)
