"""Constants of the estimate that were measured on a chip, in a file.

`python -m hourjax.bench step --out=FILE` writes one, and
`python -m hourjax.plan --calibration=FILE` takes its constants in place of
those of `parallel.chips`. What a run could not measure, because its
configuration has no work of that kind, the file lacks, and the table's value
stays.
"""

import datetime
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from hourjax import atomic_file, schema
from hourjax.errors import UserError
from hourjax.models.flops import Flops
from hourjax.parallel.chips import Chip
from hourjax.parallel.gpus import device_facts
from hourjax.planning.step_profile import Times
from hourjax.planning.topology import Topology

_REMEDY = "write it with `python -m hourjax.bench step --out=FILE`"
_LEAST = 0.002  # share of all work below which a kind of work tells nothing
# Products with weights; of the tower what is not its attention.
_DENSE = (
  "tower", "projector", "memaug_projections", "memaug_mlp", "decoder_linears",
  "lm_head",
)  # fmt: skip
_ATTENTION = {
  "memaug": ("memaug_self_attention", "memaug_cross_attention"),
  "causal": ("decoder_attention",),
}
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
  chip, wanted = device_facts(found.device_kind), topology.chip.name
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


def constants(
  flops: Mapping[str, Flops],
  times: Times,
  *,
  peak: float,
  state_bytes: float,
  link_bytes: float,
) -> tuple[Constants, dict[str, str]]:
  """Returns the constants that follow from the times of a step.

  Args:
    flops: operations of a device by scope, see `step_profile.SCOPES`.
    times: of the step.
    peak: bf16 operations a second of a device; 0 if it is not known.
    state_bytes: that the optimizer moves from and to HBM in its update; 0 if
      it is not bound by that.
    link_bytes: that go over a link while a device waits; 0 if not known.

  Returns:
    The constants, and by name why others were left out.
  """
  found: dict[str, float] = {}
  left_out: dict[str, str] = {}
  least = _LEAST * sum(times.work.values())

  def add(name: str, amount: float, took: float, of: float = 1.0) -> None:
    """Adds an amount a second, as a part of `of`."""
    if not of:
      left_out[name] = "the peak of the device is not known"
    elif not amount or took <= least:
      left_out[name] = "too little of the step is of this kind"
    elif of > 1 and amount / took > of:
      left_out[name] = f"measured at {amount / took / of:.0%} of the peak"
    else:
      found[name] = amount / took / of

  dense = [name for name in _DENSE if flops[name].forward]
  amount = sum(float(flops[name].total) for name in dense)
  add("dense", amount, sum(times.of(name) for name in dense), peak)
  for kind, names in _ATTENTION.items():
    parts = [flops[name] for name in names]
    amounts = {
      "forward": sum(float(part.forward) for part in parts),
      "backward": sum(float(part.backward + part.again) for part in parts),
    }
    for way, amount in amounts.items():
      took = sum(times.of(name, way) for name in names)
      add(f"{kind}_{way}", amount, took, peak)
  tower = float(flops["tower_attention"].total)
  add("tower", tower, times.of("tower_attention"), peak)
  add("hbm_bandwidth", state_bytes, times.of("update"))
  add("link", link_bytes, times.collectives)
  return Constants(**found), left_out


def write(
  path: str | os.PathLike, constants: Constants, machine: Mapping[str, Any]
) -> None:
  """Writes a calibration file.

  Args:
    path: of the file.
    constants: what was measured.
    machine: `device`, `devices`, `jax`, `libtpu` and `configuration`.

  Raises:
    OSError: it cannot be written.
  """
  found = Calibration(
    version=1,
    device_kind=machine["device"],
    devices=machine["devices"],
    jax=machine["jax"],
    libtpu=machine["libtpu"],
    date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    configuration=machine["configuration"],
    constants=constants,
  )
  atomic_file.write_file(path, found.model_dump_json(indent=2) + "\n")
