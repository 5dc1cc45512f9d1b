"""The compiled training step: starts `child`, and what a device holds."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from hourjax import progress
from hourjax.errors import UserError
from hourjax.parallel.vocabulary import CHUNK
from hourjax.planning.compile_pool import ask_child
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Workload
from hourjax.training.config import Experiment
from hourjax.training.train_step import check_mesh

LIMIT = 900  # seconds for the programs of one step
_NEEDED = re.compile(
  r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])"
)
_UNIT = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What came of compiling a step.

  Attributes:
    answer: as `child.compile_step` gives it; None if it was not compiled.
    reason: why then, in one line.
    needed: bytes of temporaries that ran out of memory, if the compiler said.
  """

  answer: dict[str, Any] | None
  reason: str = ""
  needed: int = 0


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a device while the larger of a step's two programs runs.

  Attributes:
    parameters, optimizer, gradients: what stays between steps and
      micro-batches.
    batches: two micro-batches, one in use and one that has been placed.
    temporaries: activations and all else that the program needs meanwhile,
      its code included.
    program: which one needs the most.
    limit: that a program may use.
  """

  parameters: int
  optimizer: int
  gradients: int
  batches: int
  temporaries: int
  program: str
  limit: int

  @property
  def total(self) -> int:
    return (
      self.parameters
      + self.optimizer
      + self.gradients
      + self.batches
      + self.temporaries
    )

  @property
  def fits(self) -> bool:
    return self.total <= self.limit


def label_chunks(experiment: Experiment, workload: Workload, shards: int):
  """Turns of the loop over label positions that a device takes, on average.

  The one loop of a step whose length only the data tells.
  """
  labels = workload.work.labels.mean() * experiment.batch_rows / shards
  return float(max(1, math.ceil(labels / CHUNK)))


def compile_step(
  experiment: Experiment,
  topology: Topology,
  workload: Workload,
  *,
  limit: float = LIMIT,
) -> Compiled:
  """Compiles both programs for the topology, in a process of its own.

  Raises:
    UserError: rows or parameters cannot be split over the mesh, or the
      compiler refuses for another reason than memory.
  """
  sizes = experiment.mesh.sizes(topology.devices)
  # As training would, and at once: the compiler takes its time.
  check_mesh(experiment, topology.devices, topology.slices)
  task = {
    "experiment": dataclasses.asdict(experiment),
    "topology": topology.name,
    "slices": topology.slices,
    "bounds": topology.bounds,
    "unknown_trips": label_chunks(experiment, workload, sizes[0] * sizes[1]),
  }
  with progress.step(f"compiling the step for {topology.name}"):
    outcome = ask_child("hourjax.planning.compile_worker", task, limit=limit)
  if outcome.late:
    return Compiled(None, outcome.reason)
  if outcome.answer is None:
    raise UserError(
      f"--topology={topology.name}: the compiler gave up: {outcome.reason}"
    )
  answer = outcome.answer
  if "user_error" in answer:
    raise UserError(answer["user_error"])
  if "exhausted" in answer:
    message = answer["exhausted"]
    found = _NEEDED.search(message)
    needed = int(float(found[1]) * _UNIT[found[2]]) if found else 0
    first = message.splitlines()[0]
    return Compiled(None, f"{answer['program']}: {first}", needed)
  return Compiled(answer)


def device_memory(answer: Mapping[str, Any], topology: Topology) -> Memory:
  """What a device holds, from the compiler's allotments."""
  programs = answer["programs"]
  kinds = {name: each["kinds"] for name, each in programs.items()}
  # A program does not count arguments that it does not read; all of them
  # are on the device nevertheless.
  held = {
    kind: max(found.get(kind, 0) for found in kinds.values())
    for kind in ("parameters", "optimizer", "gradients", "batches")
  }
  held["batches"] *= 2

  program = max(programs, key=lambda name: programs[name]["temporaries"])
  return Memory(
    **held,
    temporaries=programs[program]["temporaries"],
    program=program,
    limit=topology.chip.limit,
  )
