"""A training step on the devices at hand, measured beside what is planned.

The programs are those of training. Parameters are drawn, and rows generated in
the sizes of the stage's data, so nothing has to be there but the devices. The
step is timed, then traced; `step_profile` tells from the trace how long each
component took. From that and the counted operations follow the constants that
`planning.roofline` assumes, and which `plan --calibration` takes.
"""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from hourjax.batch import Batch
from hourjax.data import synthetic
from hourjax.errors import UserError
from hourjax.models.flops import Flops, Work, count_flops
from hourjax.parallel.chips import GIB, Chip, chip_of
from hourjax.parallel.gpus import peak_flops
from hourjax.parallel.mesh import make_mesh
from hourjax.planning import calibration, plan, roofline, step_profile
from hourjax.planning.calibration import Constants
from hourjax.planning.compiler import hlo
from hourjax.planning.compiler.compiled_step import (
  Compiled,
  label_chunks,
  read_program,
  with_links,
)
from hourjax.planning.step_profile import Times
from hourjax.planning.topology import topology_of
from hourjax.planning.workload import Workload, make_workload, trained
from hourjax.training.adapters import blank_params
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import Experiment
from hourjax.training.train_state import (
  TrainState,
  abstract_state,
  fresh_state,
  state_shardings,
)
from hourjax.training.train_step import TrainStep, check_mesh, lower_programs

_TRACED = 2  # steps in the trace
_STEPS = 1000  # of the learning-rate schedule, which costs the same at any
# Without graphs of kernels, of which a trace has no names.
_NO_GRAPHS: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": ""}
_IN_KEY = "jax_compilation_cache_include_metadata_in_key"


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


class Prepared(NamedTuple):
  """Holds a step that is ready to run.

  Attributes:
    experiment: what is measured.
    workload: the rows of one step.
    mesh: the devices.
    step: the step, compiled.
    programs: its compiled programs.
    state: drawn.
    batches: the micro-batches of one step, on the devices.
  """

  experiment: Experiment
  workload: Workload
  mesh: Mesh
  step: TrainStep
  programs: dict[str, jax.stages.Compiled]
  state: TrainState
  batches: list[Batch]


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
  known = chip.device_flops if chip else peak_flops(device.device_kind)
  if known is not None and options.peak_tflops is not None:
    raise UserError(
      f"--peak_tflops={options.peak_tflops}: the peak of {device.device_kind}"
      f" is known, {known / 1e12:.0f}; leave it out"
    )
  if options.out is not None and not pathlib.Path(options.out).parent.is_dir():
    raise UserError(f"--out={options.out}: its folder does not exist; make it")
  peak = known or (options.peak_tflops or 0.0) * 1e12
  made, seconds, times = _run(experiment, options.steps, folder)
  flops = _step_flops(made)
  planned = _planned(made, chip) if chip else None
  constants, left_out = _constants(made, flops, times, peak, planned)
  if options.out is not None:
    calibration.write(options.out, constants, _machine(made))
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
    made = _prepare(experiment)
    state, seconds = _timed(made, steps)
    return made, seconds, _traced(made, state, folder)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    first = str(error).splitlines()[0]
    raise UserError(
      f"the step does not fit the memory of the devices ({first}); lower"
      " --config.batch_rows or capacities such as --config.rows.memory, or give"
      " a smaller --config"
    ) from None


def _prepare(experiment: Experiment) -> Prepared:
  """Draws and compiles all that a step needs.

  Args:
    experiment: what to measure.

  Raises:
    UserError: the mesh does not suit the devices, or no row holds a sample.
  """
  experiment = dataclasses.replace(
    experiment, batch_samples=0, drop_last=False, init="", stream_rows={}
  )
  devices = jax.devices()
  check_mesh(experiment, len(devices))
  workload, drawn, numbers = _rows(experiment)
  mesh = make_mesh(experiment.mesh, devices)
  like, optimizer = abstract_state(experiment, mesh, _STEPS)
  options = dict(_NO_GRAPHS) if devices[0].platform == "gpu" else None
  with _scopes_in_cache():
    programs = {
      name: lowered.compile(compiler_options=options)
      for name, lowered in lower_programs(experiment, mesh).items()
    }
  step = TrainStep(experiment.model, optimizer, state_shardings(like))
  step.programs.update(programs)
  place = BatchSharding(mesh, experiment.row_spec, experiment.batch_rows)
  batches = []
  for first in range(0, len(numbers), experiment.batch_rows):
    rows = synthetic.build_rows(
      drawn,
      [numbers[first + row] for row in place.local_rows],
      experiment.row_spec,
      experiment.sample_options,
      experiment.model.decoder.vocab,
    )
    batches.append(place(rows))
  blank = blank_params(experiment, like)
  state = fresh_state(experiment, like, optimizer, blank)
  return Prepared(experiment, workload, mesh, step, programs, state, batches)


@contextlib.contextmanager
def _scopes_in_cache() -> Iterator[None]:
  """Lets the cache of compiled programs tell programs apart by their scopes.

  By default it does not, and a program out of it has the names of whichever
  was compiled first.
  """
  before = jax.config.values[_IN_KEY]
  jax.config.update(_IN_KEY, True)
  try:
    yield
  finally:
    jax.config.update(_IN_KEY, before)


def _rows(
  experiment: Experiment,
) -> tuple[Workload, synthetic.DrawnRows, list[int]]:
  """Draws a stage's rows, and chooses those of one step among them.

  They are spread evenly over all rows by the work that these are, so that few
  rows stand for many.

  Returns:
    The workload of the chosen rows, all drawn rows, and which of them are
    chosen.
  """
  every = make_workload(experiment)
  assert every.drawn is not None  # it is a stage's
  count, drawn = experiment.step_rows, len(every.useful)
  place = (np.arange(count) + 0.5) * drawn / count
  # The heaviest and the lightest rows would stand in different shards else.
  place = np.random.default_rng(experiment.seed).permutation(place)
  numbers = np.argsort(every.useful, kind="stable")[place.astype(int)]
  arrays: dict[str, Any] = {
    name: value[numbers]
    for name, value in vars(every).items()
    if isinstance(value, np.ndarray) and len(value) == drawn
  }
  work = Work(*(np.broadcast_to(x, drawn)[numbers] for x in every.work))
  chosen = dataclasses.replace(every, work=work, **arrays)
  return chosen, every.drawn, numbers.tolist()


def _timed(made: Prepared, steps: int) -> tuple[TrainState, float]:
  """Takes a step to warm up, and then those that are timed.

  Args:
    made: the step.
    steps: how many are timed.

  Returns:
    The state after them, and the seconds of one.
  """
  state, _ = made.step(made.state, made.batches)
  jax.block_until_ready(state)
  began = time.perf_counter()
  for _ in range(steps):
    state, _ = made.step(state, made.batches)
  jax.block_until_ready(state)
  return state, (time.perf_counter() - began) / steps


def _traced(made: Prepared, state: TrainState, folder: pathlib.Path) -> Times:
  """Traces steps, and returns the times of one.

  Args:
    made: the step.
    state: that it takes.
    folder: where the trace is written.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(folder, profiler_options=options):
    for _ in range(_TRACED):
      state, _ = made.step(state, made.batches)
    jax.block_until_ready(state)
  labels = dict(
    step_profile.label_program(
      hlo.program_text(program), "update" if name == "update" else ""
    )
    for name, program in made.programs.items()
  )
  times = step_profile.add_up(step_profile.read_trace(folder), labels)
  return Times(
    {label: x / _TRACED for label, x in times.work.items()},
    times.collectives / _TRACED,
    times.idle / _TRACED,
  )


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


def _constants(
  made: Prepared,
  flops: Mapping[str, Flops],
  times: Times,
  peak: float,
  planned: plan.Plan | None,
) -> tuple[Constants, dict[str, str]]:
  """Returns the constants that follow from a step, and why others do not.

  Args:
    made: what ran.
    flops: operations of a device, of `_step_flops`.
    times: of a step.
    peak: operations a second of a device; 0 if it is not known.
    planned: the plan of the step, where there is one.
  """
  state = linked = 0.0
  if made.experiment.optimizer.name == "adamw":
    # Its update is bound by HBM: `roofline` has it read and write the state.
    memory = hlo.program_memory(made.programs["update"])
    state = 2.0 * memory.argument_size_in_bytes
  if planned and planned.estimate and planned.topology.slices == 1:
    waited = sum(a for a, _ in planned.estimate.axes.values())
    linked = waited * planned.topology.chip.link
  return calibration.constants(
    flops,
    times,
    peak=peak,
    state_bytes=state,
    link_bytes=linked,
  )


def _planned(made: Prepared, chip: Chip) -> plan.Plan:
  """Makes the plan of the step that ran, from the programs that ran."""
  mesh, experiment = made.mesh, made.experiment
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  trips = label_chunks(experiment, made.workload, shards)
  programs = {
    name: read_program(program, mesh, trips.get(name, 1.0))
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
  executed = sum(float(x.total) for x in _step_flops(made).values())
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
    part["tflop_s"] = float(flops[name].total) / seconds / 1e12
    if peak:
      part["of_peak"] = float(flops[name].total) / seconds / peak
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
