"""The compiled training step, and the memory of a device that it takes."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from hourjax import progress
from hourjax.errors import UserError
from hourjax.parallel.vocabulary import CHUNK
from hourjax.planning.compile_pool import run_worker
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Workload, steps_of
from hourjax.training.config import Experiment
from hourjax.training.train_step import accumulate_name, check_mesh

LIMIT = 900  # seconds for the programs of one step
_NEEDED = re.compile(
  r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])"
)
_UNIT = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Holds the result of compiling a step.

  Attributes:
    answer: what `compile_worker.compile_programs` returned; None if memory was
      not enough.
    reason: why there is no answer, in one line.
    needed: bytes of temporaries for which memory was not enough; 0 if the
      compiler did not say.
  """

  answer: dict[str, Any] | None
  reason: str = ""
  needed: int = 0


@dataclasses.dataclass(frozen=True)
class Memory:
  """Holds the bytes of a device while the larger program of a step runs.

  Attributes:
    parameters: bytes of the parameters.
    optimizer: bytes of the optimizer's state, which stays between steps.
    gradients: bytes of the summed gradients, which stay between
      micro-batches.
    batches: bytes of two micro-batches: the one in use and the next one.
    temporaries: bytes of activations and all else that the program needs
      while it runs, its code included.
    program: the name of the program that needs the most.
    limit: bytes that a program may use.
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
    """Returns the sum of all bytes."""
    return (
      self.parameters
      + self.optimizer
      + self.gradients
      + self.batches
      + self.temporaries
    )

  @property
  def fits(self) -> bool:
    """Returns whether all of it fits into the device."""
    return self.total <= self.limit


def label_chunks(
  experiment: Experiment, workload: Workload, shards: int
) -> dict[str, float]:
  """Returns how many turns of the loop over labels a device takes on average.

  It is the one loop of a step whose length only the data decides.

  Args:
    experiment: its micro-batches count.
    workload: the rows, with their labels.
    shards: devices among which rows are split.

  Returns:
    By the name of the program.
  """
  steps = steps_of(experiment, workload)
  empty = np.zeros(len(workload.streams))
  labels = np.append(workload.work.labels, empty)[steps.order].sum(axis=1)
  return {
    accumulate_name(stream): float(
      max(1, math.ceil(labels[steps.stream == number].mean() / shards / CHUNK))
    )
    for number, stream in enumerate(workload.streams)
  }


def compile_step(
  experiment: Experiment,
  topology: Topology,
  workload: Workload,
  *,
  limit: float = LIMIT,
) -> Compiled:
  """Compiles both programs of a step for the topology, in a worker process.

  Args:
    experiment: what to compile.
    topology: what to compile it for.
    workload: the rows, which decide how long the loop over labels is.
    limit: seconds that the compiler may take.

  Raises:
    UserError: rows or parameters cannot be split over the mesh, the compiler
      has not finished in time, or it refuses for another reason than memory.
  """
  sizes = experiment.mesh.sizes(topology.devices)
  # The check that training makes, before the compiler takes minutes.
  check_mesh(experiment, topology.devices, topology.slices)
  task = {
    "experiment": dataclasses.asdict(experiment),
    "streams": workload.streams,
    "topology": topology.name,
    "slices": topology.slices,
    "bounds": topology.bounds,
    "unknown_trips": label_chunks(experiment, workload, sizes[0] * sizes[1]),
  }
  with progress.step(f"compiling the step for {topology.name}"):
    outcome = run_worker("hourjax.planning.compile_worker", task, limit=limit)
  if outcome.late:
    raise UserError(
      f"--topology={topology.name}: the compiler did not finish within"
      f" {limit:.0f} s, so it is not known whether the step fits; give it more"
      f" time, such as --compile_limit={2 * limit:.0f}"
    )
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
  """Returns what a device holds, by what the compiler allots.

  Args:
    answer: what `compile_worker.compile_programs` returned.
    topology: what it was compiled for.
  """
  programs = answer["programs"]
  kinds = {name: each["kinds"] for name, each in programs.items()}
  # A program does not count arguments that it does not read, and they are on
  # the device all the same.
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
