"""One plan as plain data: memory, traffic, time and cost of a step."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.parallel.chips import CLOCK_SHARE, GIB
from hourjax.planning import roofline
from hourjax.planning.compiler.compiled_step import (
  Compiled,
  Memory,
  compile_step,
  device_memory,
)
from hourjax.planning.roofline import Estimate
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Workload, steps_of
from hourjax.training.config import Experiment
from hourjax.training.train_step import accumulate_name

# What an estimate takes for granted, in words.
ASSUMED = (
  "products run at {dense:.0%} of the chip's bf16 peak, MemAug's attention at"
  " {memaug[0]:.0%} forward and {memaug[1]:.0%} backward, the decoder's at"
  " {causal[0]:.0%} and {causal[1]:.0%}: {source}"
)
_WAITED = (
  "a micro-batch waits for the device whose rows are the most work, and for"
  " the traffic that the compiler's schedule does not run beside other work;"
  " rings use the links that the devices of an axis have on the torus"
)
_TABLE = (
  "schedules of the compiler (hourjax/benchmarks/README.md) times"
  f" {CLOCK_SHARE}, and what large models report; no TPU was timed"
)
_GPU_WAITED = (
  "the program is that of the compiler for CPUs, split over as many devices:"
  " its traffic is what XLA sends between GPUs, its temporaries are counted"
  " without the GPU compiler's fusions and are rather too many",
  "a micro-batch waits for the device whose rows are the most work; weights are"
  " gathered and gradients summed beside products, all other traffic is waited"
  " for",
)
_GPU_TABLE = (
  "what cuDNN and large models are reported to reach"
  " (hourjax/parallel/gpus.py); no GPU was timed"
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Holds what is known of one configuration on one topology.

  Attributes:
    experiment: the configuration.
    topology: what it runs on.
    workload: the rows that it trains on.
    price: $ of a chip-hour.
    compiled: the programs, or why there are none.
    memory: the memory of a device; None if the compiler ran out of it.
    estimate: the time of a step; None if the compiler ran out of memory.
  """

  experiment: Experiment
  topology: Topology
  workload: Workload
  price: float
  compiled: Compiled
  memory: Memory | None
  estimate: Estimate | None

  @property
  def fits(self) -> bool:
    """Returns whether a device holds the step."""
    return self.memory is not None and self.memory.fits

  @property
  def unit_hour(self) -> str:
    """Returns what has a price, in words."""
    return "a GPU-hour" if self.topology.gpus else "a chip-hour"

  @property
  def mesh(self) -> dict[str, int]:
    """Returns the sizes of the mesh's axes by name."""
    names = ("data", "fsdp", "seq", "tensor")
    sizes = self.experiment.mesh.sizes(self.topology.devices)
    return dict(zip(names, sizes))


def evaluate(
  experiment: Experiment,
  topology: Topology,
  workload: Workload,
  compiled: Compiled,
  price: float | None = None,
) -> Plan:
  """Makes the plan of a step that was compiled.

  Args:
    experiment: the configuration.
    topology: what it was compiled for.
    workload: the rows that it trains on.
    compiled: the result of compiling it.
    price: $ of a chip-hour; None takes the example of the generation.
  """
  price = topology.chip.price if price is None else price
  memory = estimate = None
  if compiled.answer is not None:
    memory = device_memory(compiled.answer, topology)
    estimate = roofline.estimate(
      experiment, topology, workload, compiled.answer, price
    )
  return Plan(experiment, topology, workload, price, compiled, memory, estimate)


def of_one(
  experiment: Experiment,
  topologies: Sequence[Topology],
  workload: Workload,
  *,
  price: float | None = None,
  limit: float,
  whole: bool = False,
) -> Plan:
  """Makes the plan of one configuration on one topology.

  Args:
    experiment: the configuration.
    topologies: one of them.
    workload: the rows that it trains on.
    price: $ of a chip-hour; None takes the example of the generation.
    limit: see `compile_step`.
    whole: see `compile_step`.

  Raises:
    UserError: there are several topologies, or the step cannot be compiled.
  """
  if len(topologies) > 1:
    raise UserError("--topology names several slices; give --search, or one")
  compiled = compile_step(
    experiment, topologies[0], workload, limit=limit, whole=whole
  )
  return evaluate(experiment, topologies[0], workload, compiled, price)


def assumptions(plan: Plan) -> list[str]:
  """Returns what the estimate takes for granted, a sentence each."""
  topology = plan.topology
  rates = topology.chip.efficiency._asdict()
  table = _GPU_TABLE if topology.gpus else _TABLE
  rates["source"] = topology.measured or table
  return [
    *plan.workload.assumptions,
    ASSUMED.format(**rates),
    *(_GPU_WAITED if topology.gpus else (_WAITED,)),
    f"{plan.unit_hour} costs ${plan.price:.2f}"
    + ("" if plan.price != plan.topology.chip.price else
       " (an example, on demand in the US; give --price)"),
  ]  # fmt: skip


def as_data(plan: Plan) -> dict[str, Any]:
  """Returns a plan as data for JSON.

  Args:
    plan: the plan.

  Returns:
    The configuration, and whether it fits. If the compiler had memory enough,
    also `computed`, what was compiled and counted; `estimated`, the fields of
    `roofline.Estimate`; and `assumed`, what the estimate takes for granted. If
    not, `needed_gib`.
  """
  experiment, topology = plan.experiment, plan.topology
  data = {
    "topology": topology.name,
    "slices": topology.slices,
    "chips": topology.chips,
    "hosts": topology.hosts,
    "mesh": plan.mesh,
    "batch_rows": experiment.batch_rows,
    "accumulate": experiment.accumulate,
    "batch_samples": experiment.batch_samples,
    "rows": dataclasses.asdict(experiment.rows),
    "stream_rows": dataclasses.asdict(experiment)["stream_rows"],
    "remat": experiment.model.remat,
    "mu_dtype": experiment.optimizer.mu_dtype,
    "data": plan.workload.name,
    "fits": plan.fits,
    "reason": plan.compiled.reason,
  }
  memory, estimate, answer = plan.memory, plan.estimate, plan.compiled.answer
  if memory is None or estimate is None or answer is None:
    return data | {"needed_gib": plan.compiled.needed / GIB}
  traffic = [
    {**line, "program": name, "times": times}
    for name, times in _times(plan).items()
    for line in answer["programs"][name]["traffic"]
  ]
  computed = {
    "memory_bytes": dataclasses.asdict(memory) | {"total": memory.total},
    "traffic": traffic,
    "sent_by_axis": sent_by_axis(plan),
    "compile_seconds": {
      name: each["seconds"] for name, each in answer["programs"].items()
    },
    "flops": {
      name: part._asdict() for name, part in estimate.components.items()
    },
    "useful_flops": estimate.useful,
    "samples_a_row": plan.workload.samples / plan.workload.rows,
    "fill": fill(plan),
  }
  estimated = {
    field.name: getattr(estimate, field.name)
    for field in dataclasses.fields(Estimate)
    if field.name not in ("components", "useful")
  }
  return data | {
    "computed": computed,
    "estimated": estimated,
    "assumed": assumptions(plan),
  }


def _times(plan: Plan) -> dict[str, float]:
  """Returns how often a step runs each program, on average."""
  steps = steps_of(plan.experiment, plan.workload)
  share = np.bincount(
    steps.stream, minlength=len(plan.workload.streams)
  ) / len(steps.stream)  # fmt: skip
  times = {
    accumulate_name(stream): float(steps.micro_batches * part)
    for stream, part in zip(plan.workload.streams, share)
  }
  return times | {"update": 1.0}


def sent_by_axis(plan: Plan) -> dict[str, dict[str, float]]:
  """Returns the bytes that a device sends in a step, by axes of the mesh.

  Args:
    plan: the plan.

  Returns:
    By axes, those that send the most first: `waited`, bytes for which the
    device waits, and `beside`, bytes that travel beside other work. Empty if
    the step was not compiled.
  """
  found: dict[str, dict[str, float]] = {}
  programs = plan.compiled.answer["programs"] if plan.compiled.answer else {}
  for name, times in _times(plan).items():
    for line in programs.get(name, {}).get("traffic", ()):
      entry = found.setdefault(line["axes"], {"waited": 0.0, "beside": 0.0})
      key = "beside" if line["asynchronous"] else "waited"
      entry[key] += times * line["sent"]
  return dict(sorted(found.items(), key=lambda x: -sum(x[1].values())))


def fill(plan: Plan) -> dict[str, float]:
  """Returns the share of each capacity of a row that is used on average."""
  workload, specs = plan.workload, plan.experiment.row_specs
  used = workload.sizes.mean(axis=0)
  most = [specs[name].capacity.astuple() for name in workload.streams]
  capacity = np.array(most)[workload.stream].mean(axis=0).tolist()
  return {
    name: float(mean / most)
    for name, mean, most in zip(Size.names(), used, capacity)
    if most
  }
