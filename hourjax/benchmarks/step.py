"""A training step on the devices at hand, measured beside what is planned.

`step_run` times and traces it, and `step_profile` tells from the trace how long
each component took. From these seconds and the counted operations follow the
constants that `planning.roofline` assumes, and which `plan --calibration`
takes.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hourjax import atomic_file
from hourjax.benchmarks.step_profile import Times
from hourjax.benchmarks.step_run import Prepared, prepare, timed, traced
from hourjax.errors import UserError
from hourjax.models.flops import Flops, Work, count_flops
from hourjax.parallel.chips import GIB, Chip, chip_of
from hourjax.planning import hlo, plan, roofline
from hourjax.planning.calibration import Calibration, Constants
from hourjax.planning.compile_worker import read_program, with_links
from hourjax.planning.compiled_step import Compiled, label_chunks
from hourjax.planning.topology import topology_of
from hourjax.planning.workload import trained
from hourjax.training.config import Experiment

_LEAST = 0.002  # share of a step below which a component is not told
# Products with weights; of the tower what is not its attention.
_DENSE = (
  "tower", "projector", "memaug_projections", "memaug_mlp", "decoder_linears",
  "lm_head",
)  # fmt: skip
_ATTENTION = {
  "memaug": ("memaug_self_attention", "memaug_cross_attention"),
  "causal": ("decoder_attention",),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Says how a step is measured.

  Attributes:
    steps: that are timed.
    peak_tflops: bf16 peak of a device that is no known TPU; None leaves out
      what is relative to a peak.
    out: where a calibration file is written; None writes none.
  """

  steps: int = 5
  peak_tflops: float | None = None
  out: str | None = None


def measure_step(
  experiment: Experiment, options: Options, folder: pathlib.Path
) -> dict[str, Any]:
  """Measures a step, and writes a calibration file if there is a name for it.

  Args:
    experiment: what to measure. A step is its `accumulate` micro-batches.
    options: how it is measured.
    folder: where the trace is written.

  Returns:
    `machine`; `step`, seconds, MFU, and shares of the time that devices wait
    for one another or have nothing to do, beside the planned ones where there
    is a plan; `components`, seconds of a step and TFLOP/s of a device; `hbm`,
    GiB of a device; `constants`, see `calibration.Constants`; and `left_out`,
    why others are none. Figures have four digits.

  Raises:
    UserError: the mesh does not suit the devices, no row holds a sample, the
      step does not fit their memory, or an option makes no sense.
  """
  device = jax.devices()[0]
  chip = chip_of(device.device_kind)
  if chip is not None and options.peak_tflops is not None:
    raise UserError(
      f"--peak_tflops={options.peak_tflops}: the peak of {device.device_kind}"
      f" is known, {chip.device_flops / 1e12:.0f}; leave it out"
    )
  if options.out is not None and not pathlib.Path(options.out).parent.is_dir():
    raise UserError(f"--out={options.out}: its folder does not exist; make it")
  peak = chip.device_flops if chip else (options.peak_tflops or 0.0) * 1e12
  made, seconds, times = _run(experiment, options.steps, folder)
  flops = _step_flops(made)
  planned = _planned(made, chip) if chip else None
  constants, left_out = measured_constants(made, flops, times, peak, planned)
  if options.out is not None:
    _write(options.out, made, constants)
  figures = {
    "machine": _machine(made),
    "step": _step(made, seconds, times, peak, planned),
    "components": _components(made, flops, times, peak, chip),
    "hbm": _memory(made, planned),
    "constants": constants.known(),
    "left_out": left_out,
  }
  return _rounded(figures)


def _run(
  experiment: Experiment, steps: int, folder: pathlib.Path
) -> tuple[Prepared, float, Times]:
  """Returns a step that ran, its seconds, and the times of its parts."""
  try:
    made = prepare(experiment)
    state, seconds = timed(made, steps)
    return made, seconds, traced(made, state, folder)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    first = str(error).splitlines()[0]
    raise UserError(
      f"the step does not fit the memory of the devices ({first}); lower"
      " --config.batch_rows or capacities such as --config.rows.memory, or give"
      " a smaller --config"
    ) from None


def _step_work(made: Prepared) -> Work:
  """Returns the work that the programs do for each row of the step."""
  mesh = dict(made.mesh.shape)
  work = roofline.executed_work(made.experiment, made.workload, mesh)
  rows = len(made.workload.useful)  # the last one is an empty row
  return Work(*(np.broadcast_to(x, rows + 1)[:rows] for x in work))


def _step_flops(made: Prepared) -> dict[str, Flops]:
  """Returns the operations of a step by scope, mean over devices.

  The tower's are divided into those of its attention and the others.
  """
  model = made.experiment.model
  parts = count_flops(
    model, _step_work(made), trained(made.experiment), executed=True
  )
  devices = made.mesh.size
  found = {
    name: Flops(*(float(np.sum(x)) / devices for x in part))
    for name, part in parts.items()
  }
  share = roofline.tower_attention_share(model)
  tower = found["tower"]
  found["tower"] = Flops(*(x * (1 - share) for x in tower))
  found["tower_attention"] = Flops(*(x * share for x in tower))
  return found


def measured_constants(
  made: Prepared,
  flops: Mapping[str, Flops],
  times: Times,
  peak: float,
  planned: plan.Plan | None,
) -> tuple[Constants, dict[str, str]]:
  """Returns the constants that follow from a step, and which do not.

  Args:
    made: what ran.
    flops: operations of a device, of `_step_flops`.
    times: of a step.
    peak: operations a second of a device; 0 if it is not known.
    planned: the plan of the step, where there is one.

  Returns:
    The constants, and by name why others were left out.
  """
  found: dict[str, float] = {}
  left_out: dict[str, str] = {}

  def add(name: str, amount: float, seconds: float, of: float = 1.0) -> None:
    """Adds an amount a second, as a part of `of`."""
    if not of:
      left_out[name] = "the peak of the device is not known"
    elif not amount or seconds < _LEAST * times.total:
      left_out[name] = "too little of the step is of this kind"
    elif of > 1 and amount / seconds > of:
      left_out[name] = f"measured at {amount / seconds / of:.0%} of the peak"
    else:
      found[name] = amount / seconds / of

  def work(names: Sequence[str], direction: str = "") -> tuple[float, float]:
    """Returns operations and seconds of components."""
    amount = sum(_operations(flops[name], direction) for name in names)
    return amount, sum(times.of(name, direction) for name in names)

  add("dense", *work([n for n in _DENSE if flops[n].forward]), peak)
  for kind, names in _ATTENTION.items():
    for direction in ("forward", "backward"):
      add(f"{kind}_{direction}", *work(names, direction), peak)
  add("tower", *work(["tower_attention"]), peak)
  if made.experiment.optimizer.name == "adamw":
    # The update reads and writes the state once, as `roofline` takes it.
    memory = hlo.program_memory(made.programs["update"])
    state = 2.0 * memory.argument_size_in_bytes
    add("hbm_bandwidth", state, times.of("update"))
  else:
    left_out["hbm_bandwidth"] = "only AdamW's update is bound by it"
  if planned is not None and planned.estimate is not None:
    waited = sum(a for a, _ in planned.estimate.axes.values())
    link = planned.topology.chip.link
    add("link", link * waited, times.collectives)
  return Constants(**found), left_out


def _operations(part: Flops, direction: str = "") -> float:
  """Returns a component's operations in a direction, or in both."""
  forward, back = float(part.forward), float(part.backward + part.again)
  return {"forward": forward, "backward": back}.get(direction, forward + back)


def _planned(made: Prepared, chip: Chip) -> plan.Plan:
  """Makes the plan of the step that ran, from the programs that ran."""
  mesh, experiment = made.mesh, made.experiment
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  trips = label_chunks(experiment, made.workload, shards)
  programs = {
    name: read_program(program, mesh, trips)
    for name, program in made.programs.items()
  }
  return plan.evaluate(
    experiment,
    topology_of(list(mesh.devices.flat), chip),
    made.workload,
    Compiled(with_links(programs, mesh)),
  )


def _machine(made: Prepared) -> dict[str, Any]:
  """Returns what ran, in words."""
  device = made.mesh.devices.flat[0]
  return {
    "device": device.device_kind,
    "devices": made.mesh.size,
    "mesh": dict(made.mesh.shape),
    "jax": jax.__version__,
    "libtpu": _version("libtpu") if device.platform == "tpu" else None,
    "configuration": _configuration(made),
  }


def _version(package: str) -> str | None:
  """Returns the version of an installed package, or None."""
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(package)
  return None


def _configuration(made: Prepared) -> str:
  """Returns the model, the rows and the mesh in a line."""
  experiment = made.experiment
  decoder, rows = experiment.model.decoder, experiment.rows
  mesh = ", ".join(f"{k} {v}" for k, v in made.mesh.shape.items())
  return (
    f"decoder {decoder.layers} x {decoder.width}, {made.workload.name},"
    f" {experiment.accumulate} x {experiment.batch_rows} rows of"
    f" {rows.memory} memory tokens, {rows.queries} queries and"
    f" {rows.decoder} positions, {experiment.model.dtype}, remat"
    f" {experiment.model.remat}, mesh {mesh}"
  )


def _step(
  made: Prepared,
  seconds: float,
  times: Times,
  peak: float,
  planned: plan.Plan | None,
) -> dict[str, Any]:
  """Returns figures of the whole step."""
  useful = float(made.workload.useful.sum())
  executed = sum(_operations(x) for x in _step_flops(made).values())
  estimate = planned.estimate if planned else None
  found = {
    "seconds": seconds,
    "traced_seconds": times.total,
    "useful_tflop": useful / 1e12,
    "executed_tflop": executed * made.mesh.size / 1e12,
    "mfu": useful / seconds / made.mesh.size / peak if peak else None,
    "waiting": times.collectives / times.total,
    "idle": times.idle / times.total,
  }
  if estimate is None:
    return found
  waited = sum(a for a, _ in estimate.axes.values())
  return found | {
    "planned_seconds": estimate.step,
    "planned_mfu": estimate.mfu,
    "planned_waiting": waited / estimate.step,
  }


def _components(
  made: Prepared,
  flops: Mapping[str, Flops],
  times: Times,
  peak: float,
  chip: Chip | None,
) -> dict[str, dict[str, float]]:
  """Returns seconds of a step and TFLOP/s of a device by component."""
  planned: dict[str, float] = {}
  if chip is not None:
    model, learnt = made.experiment.model, trained(made.experiment)
    planned = {
      name: float(seconds.sum()) / made.mesh.size
      for name, seconds in roofline.component_seconds(
        model, _step_work(made), learnt, chip
      ).items()
    }
  found: dict[str, dict[str, float]] = {}
  for name in (*flops, "update", "other"):
    seconds = times.of(name)
    if not seconds:
      continue
    part = found[name] = {"seconds": seconds}
    if name not in flops:
      continue
    # The plan knows the tower as a whole.
    if name in planned:
      both = "_with_attention" if name == "tower" else ""
      part[f"planned{both}"] = planned[name]
    for direction in ("forward", "backward"):
      # Loss and gradients of the head are computed together.
      if name != "lm_head":
        part[direction] = times.of(name, direction)
    part["tflop_s"] = _operations(flops[name]) / seconds / 1e12
    if peak:
      part["of_peak"] = _operations(flops[name]) / seconds / peak
  return found


def _memory(made: Prepared, planned: plan.Plan | None) -> dict[str, Any]:
  """Returns GiB of a device: in use, and as the compiler allots them."""
  stats = made.mesh.local_devices[0].memory_stats() or {}
  found: dict[str, Any] = {
    name: stats[key] / GIB
    for name, key in (("peak", "peak_bytes_in_use"), ("limit", "bytes_limit"))
    if key in stats
  }
  for name, program in made.programs.items():
    memory = hlo.program_memory(program)
    most = max(memory.argument_size_in_bytes, memory.peak_memory_in_bytes)
    found[f"compiler_{name}"] = most / GIB
  if planned is not None and planned.memory is not None:
    found["planned"] = planned.memory.total / GIB
  return found


def _rounded(figures: Any) -> Any:
  """Returns nested figures with four digits."""
  if isinstance(figures, Mapping):
    return {key: _rounded(value) for key, value in figures.items()}
  return float(f"{figures:.4g}") if isinstance(figures, float) else figures


def _write(out: str, made: Prepared, constants: Constants) -> None:
  """Writes a calibration file."""
  machine = _machine(made)
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
  atomic_file.write_file(out, found.model_dump_json(indent=2) + "\n")
