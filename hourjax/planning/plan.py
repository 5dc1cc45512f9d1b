"""One plan: what a step holds, sends and takes, as plain data."""

import dataclasses
from typing import Any

from hourjax.data.rows import Size
from hourjax.parallel.chips import CLOCK_SHARE, GIB
from hourjax.planning import roofline
from hourjax.planning.compiled_step import Compiled, Memory, device_memory
from hourjax.planning.roofline import Estimate
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Workload
from hourjax.training.config import Experiment

# What an estimate takes for granted, in words.
ASSUMED = (
  "products run at {dense:.0%} of the chip's bf16 peak, MemAug's attention at"
  " {memaug[0]:.0%} forward and {memaug[1]:.0%} backward, the decoder's at"
  " {causal[0]:.0%} and {causal[1]:.0%}: schedules of the compiler (README)"
  f" times {CLOCK_SHARE}, and what large models report; no TPU was"
  " timed",
  "a micro-batch waits for the device whose rows are the most work, and for"
  " the traffic that the compiler's schedule does not run beside other work;"
  " rings use the links that the devices of an axis have on the torus",
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of one configuration on one topology.

  Attributes:
    experiment, topology, workload, price: what was planned.
    compiled: the programs, or why there are none.
    memory: of a device; None if the compiler ran out of it.
    estimate: of the step; None likewise.
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
    return self.memory is not None and self.memory.fits

  @property
  def mesh(self) -> dict[str, int]:
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
  """A plan of what was compiled.

  Args:
    experiment: what runs.
    topology: on what.
    workload: its rows.
    compiled: its programs.
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


def assumptions(plan: Plan) -> list[str]:
  """What the estimate rests on, a sentence each."""
  rates = plan.topology.chip.efficiency._asdict()
  return [
    *plan.workload.assumptions,
    *(line.format(**rates) for line in ASSUMED),
    f"a chip-hour costs ${plan.price:.2f}"
    + ("" if plan.price != plan.topology.chip.price else
       " (an example, on demand in the US; give --price)"),
  ]  # fmt: skip


def as_data(plan: Plan) -> dict[str, Any]:
  """The plan as JSON takes it: what was computed and what is estimated."""
  experiment, topology = plan.experiment, plan.topology
  data = {
    "topology": topology.name,
    "slices": topology.slices,
    "chips": topology.chips,
    "hosts": topology.hosts,
    "mesh": plan.mesh,
    "batch_rows": experiment.batch_rows,
    "accumulate": experiment.accumulate,
    "rows": experiment.rows.__dict__,
    "remat": experiment.model.remat,
    "mu_dtype": experiment.optimizer.mu_dtype,
    "data": plan.workload.name,
    "fits": plan.fits,
    "reason": plan.compiled.reason,
  }
  if plan.memory is None:
    return data | {"needed_gib": plan.compiled.needed / GIB}
  memory, answer = plan.memory, plan.compiled.answer
  traffic = [
    {**line, "program": name, "times": times}
    for name, times in _times(experiment).items()
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
      name: part._asdict() for name, part in plan.estimate.components.items()
    },
    "useful_flops": plan.estimate.useful,
    "samples_a_row": plan.workload.samples / plan.workload.rows,
    "fill": fill(plan),
  }
  estimated = {
    field.name: getattr(plan.estimate, field.name)
    for field in dataclasses.fields(Estimate)
    if field.name not in ("components", "useful")
  }
  return data | {
    "computed": computed,
    "estimated": estimated,
    "assumed": assumptions(plan),
  }


def _times(experiment: Experiment) -> dict[str, int]:
  """How often a step runs each program."""
  return {"accumulate": experiment.accumulate, "update": 1}


def sent_by_axis(plan: Plan) -> dict[str, dict[str, float]]:
  """Bytes that a device sends in a step, by axes: waited for and not."""
  found: dict[str, dict[str, float]] = {}
  for name, times in _times(plan.experiment).items():
    for line in plan.compiled.answer["programs"][name]["traffic"]:
      entry = found.setdefault(line["axes"], {"waited": 0.0, "beside": 0.0})
      key = "beside" if line["asynchronous"] else "waited"
      entry[key] += times * line["sent"]
  return dict(sorted(found.items(), key=lambda x: -sum(x[1].values())))


def fill(plan: Plan) -> dict[str, float]:
  """Share of each capacity of a row that is used on average."""
  used = plan.workload.sizes.mean(axis=0)
  capacity = plan.experiment.rows.astuple()
  return {
    name: float(mean / most)
    for name, mean, most in zip(Size.names(), used, capacity)
    if most
  }
