"""Constants of the estimate that were measured on a chip, in a file.

`python -m hourjax.bench step --out=FILE` writes one, and
`python -m hourjax.plan --calibration=FILE` takes its constants in place of
those of `parallel.chips`. What a run could not measure, because its
configuration has no work of that kind, the file lacks, and the table's value
stays.
"""

import os
from typing import Annotated, Literal

import pydantic

from hourjax import schema
from hourjax.errors import UserError
from hourjax.parallel.chips import Chip, chip_of
from hourjax.planning.topology import Topology

_REMEDY = "write it with `python -m hourjax.bench step --out=FILE`"
Share = Annotated[float, pydantic.Field(gt=0, le=1)]
Rate = Annotated[float, pydantic.Field(gt=0, le=1e15)]


class Constants(schema.Schema):
  """Holds what was measured; None where nothing was.

  Attributes:
    dense: share of the bf16 peak that products with weights reach, forward and
      backward together.
    memaug_forward: share of the peak that MemAug's attention reaches.
    memaug_backward: the same of its backward pass.
    causal_forward: share of the peak that the decoder's attention reaches.
    causal_backward: the same of its backward pass.
    tower: share of the peak that the tower's attention reaches.
    hbm_bandwidth: bytes a second of a device.
    link: bytes a second of one link in one direction.
  """

  dense: Share | None = None
  memaug_forward: Share | None = None
  memaug_backward: Share | None = None
  causal_forward: Share | None = None
  causal_backward: Share | None = None
  tower: Share | None = None
  hbm_bandwidth: Rate | None = None
  link: Rate | None = None

  def known(self) -> dict[str, float]:
    """Returns the constants that were measured, by name."""
    return {name: value for name, value in self.model_dump().items() if value}


class Calibration(schema.Schema):
  """Describes a calibration file.

  Attributes:
    version: of the format.
    device_kind: as jax names the devices.
    devices: how many were used.
    jax: the version of jax.
    libtpu: the version of libtpu; None where there is none.
    date: of the measurement, as 2026-01-31.
    configuration: the model, the rows and the mesh that were measured.
    constants: what was measured.
  """

  version: Literal[1]
  device_kind: str
  devices: int
  jax: str
  libtpu: str | None = None
  date: str
  configuration: str
  constants: Constants


def calibrated(topology: Topology, path: str | os.PathLike | None) -> Topology:
  """Returns a topology whose chip has the constants of a file.

  Args:
    topology: what is planned for.
    path: of the file; None changes nothing.

  Raises:
    UserError: the file cannot be read, is none of ours, or was measured on
      another generation.
  """
  if path is None:
    return topology
  found = schema.read_schema(Calibration, path, remedy=_REMEDY)
  chip, wanted = chip_of(found.device_kind), topology.chip.name
  if chip is None or chip.name != wanted:
    raise UserError(
      f"--calibration={path} was measured on {found.device_kind}, and"
      f" --topology={topology.name} is made of {wanted}; give a file that was"
      f" measured on {wanted}, or none"
    )
  versions = f"jax {found.jax}" + (
    f", libtpu {found.libtpu}" if found.libtpu else ""
  )
  measured = found.constants.known()
  names = ", ".join(measured) if measured else "nothing"
  return topology._replace(
    chip=_replaced(topology.chip, found.constants),
    measured=(
      f"{path} has measured {names} on {found.devices} x {found.device_kind}"
      f" ({found.date}, {versions}, {found.configuration}); all else as"
      " hourjax/parallel/chips.py assumes it"
    ),
  )


def _replaced(chip: Chip, constants: Constants) -> Chip:
  """Returns a chip with measured constants in place of the table's."""
  rates = chip.efficiency
  efficiency = rates._replace(
    dense=constants.dense or rates.dense,
    memaug=(
      constants.memaug_forward or rates.memaug[0],
      constants.memaug_backward or rates.memaug[1],
    ),
    causal=(
      constants.causal_forward or rates.causal[0],
      constants.causal_backward or rates.causal[1],
    ),
    tower=constants.tower or rates.tower,
  )
  bandwidth = chip.hbm_bandwidth
  if constants.hbm_bandwidth:
    bandwidth = constants.hbm_bandwidth * chip.devices
  # By `vars`, since a fact that nobody has entered cannot be read.
  entered = {k: v for k, v in vars(chip).items() if v is not None}
  facts = entered | {
    "efficiency": efficiency,
    "hbm_bandwidth": bandwidth,
    "link": constants.link or chip.link,
  }
  return Chip(**facts)
