"""The compiled training step, and the memory of a device that it takes."""

import collections
import dataclasses
import functools
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hourjax import jax_environment
from hourjax.errors import UserError
from hourjax.parallel.vocabulary import CHUNK
from hourjax.planning.compiler import hlo, peak_memory, traffic
from hourjax.planning.compiler.compile_pool import (
  ENVIRONMENT,
  Outcome,
  run_all,
  run_worker,
)
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Workload, steps_of
from hourjax.training.config import Experiment
from hourjax.training.train_step import accumulate_name, check_mesh

LIMIT = 900  # seconds for a program of a step
# Bytes of a program's instructions, about, where it was not compiled to the
# end: those of 3B took 0.1 to 0.3 GiB.
_CODE = 150 << 20
_DUMP = "--xla_jf_dump_to={} --xla_jf_dump_hlo_text=true"
_NEEDED = re.compile(
  r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])"
)
_UNIT = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# What a parameter of a compiled program belongs to, by its argument's path.
_KINDS = {
  "optimizer": re.compile(r"opt_state"),
  "gradients": re.compile(r"sums|grads|gradients|total"),
  "batches": re.compile(r"batch"),
  "parameters": re.compile(r"trained|frozen|params"),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Holds the result of compiling a step.

  Attributes:
    answer: what `compile_worker.compile_program` returned, with all programs;
      None if memory was
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
  whole: bool = False,
) -> Compiled:
  """Compiles the programs of a step for the topology, in worker processes.

  Args:
    experiment: what to compile.
    topology: what to compile it for.
    workload: the rows, which decide how long the loop over labels is.
    limit: seconds that the compiler may take for a program.
    whole: whether to compile to the end, which takes minutes and gives the
      temporaries as the compiler allots them; else they are counted from the
      schedule (`peak_memory`).

  Raises:
    UserError: rows or parameters cannot be split over the mesh, the compiler
      has not finished in time, or it refuses for another reason than memory.
  """
  sizes = experiment.mesh.sizes(topology.devices)
  # The check that training makes, before the compiler takes long.
  check_mesh(experiment, topology.devices, topology.slices)
  task = {
    "experiment": dataclasses.asdict(experiment),
    "streams": workload.streams,
    "topology": topology.name,
    "slices": topology.slices,
    "bounds": topology.bounds,
    "machine": topology.chip.host if topology.gpus else 0,
  }
  if whole and topology.gpus:
    raise UserError(
      f"--exact: no program for {topology.name} can be compiled to the end"
      " without a GPU; leave it out"
    )
  flags = jax_environment.flags_of(topology.chip.name, os.environ)
  trips = label_chunks(experiment, workload, sizes[0] * sizes[1])

  def run(program: str) -> dict[str, Any]:
    own = {"program": program, "unknown_trips": trips.get(program, 1.0)}
    with tempfile.TemporaryDirectory() as folder:
      outcome = run_worker(
        "hourjax.planning.compiler.compile_worker",
        task | own | {"folder": "" if whole else folder},
        limit=limit,
        flags=f"{flags} {'' if whole else _DUMP.format(folder)}".strip(),
        **_for_gpus(topology, folder),
      )
    return _answer(outcome, topology, limit)

  names = [*map(accumulate_name, workload.streams), "update"]
  answers = run_all(
    f"compiling the step for {topology.name}",
    {name: functools.partial(run, name) for name in names},
  )
  for answer in answers.values():
    if "exhausted" in answer:
      message = answer["exhausted"]
      found = _NEEDED.search(message)
      needed = int(float(found[1]) * _UNIT[found[2]]) if found else 0
      first = message.splitlines()[0]
      return Compiled(None, f"{answer['program']}: {first}", needed)
  merged = answers[names[0]]
  for answer in answers.values():
    merged["programs"] |= answer["programs"]
    merged["links"] |= answer["links"]
  return Compiled(merged)


def _for_gpus(topology: Topology, folder: str) -> dict[str, Any]:
  """Returns options of `run_worker` for a program for GPUs.

  The compiler for CPUs stands in for the one for GPUs, which needs a GPU. It
  splits the program over as many devices in the same way, and schedules it.
  bfloat16 is kept, though it can then make no instructions of it.

  Args:
    topology: the GPUs; with any other nothing is returned.
    folder: where the compiler leaves the scheduled program.
  """
  if not topology.gpus:
    return {}
  options = (
    f"--xla_force_host_platform_device_count={topology.devices}",
    "--xla_disable_hlo_passes=float-normalization-bf16,all-reduce-promotion",
    f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
  )
  return {"environment": ENVIRONMENT | {"XLA_FLAGS": " ".join(options)}}


def _answer(
  outcome: Outcome, topology: Topology, limit: float
) -> dict[str, Any]:
  """Returns the answer of a worker.

  Raises:
    UserError: it gave none, or found a mistake of the user.
  """
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
  if "user_error" in outcome.answer:
    raise UserError(outcome.answer["user_error"])
  return outcome.answer


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


def read_program(
  compiled: jax.stages.Compiled, mesh: Mesh, unknown_trips: float
) -> dict[str, Any]:
  """Returns the memory that a program takes and the bytes that it sends.

  Args:
    compiled: the program.
    mesh: the mesh that it was compiled for.
    unknown_trips: how many turns a loop counts whose length only the data
      decides.

  Returns:
    `arguments`, `temporaries` and `kinds` (see `argument_kinds`) in bytes of
    one device, and `traffic` as `traffic.by_axis` lists it.
  """
  found = read_schedule(hlo.program_text(compiled), mesh, unknown_trips)
  return found | memory_of(compiled)


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns `arguments`, `temporaries` and `code`, in bytes of a device.

  The code is part of the temporaries.
  """
  memory = hlo.program_memory(compiled)
  return {
    "arguments": memory.argument_size_in_bytes,
    # Everything beside the arguments while the program runs, and its code.
    # The compiler's own `temp_size` is no limit: a program with 18.4 GiB of
    # temporaries compiled for a device of 15.75 GiB, with a peak of 12.1.
    # Where the compiler refuses a program for want of memory it names the
    # peak, to within 3 %.
    "temporaries": max(
      0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    )
    + memory.generated_code_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
  }


def read_schedule(
  text: str, mesh: Mesh, unknown_trips: float
) -> dict[str, Any]:
  """Returns the same as `read_program`, from the text of a scheduled program.

  The temporaries are counted by `peak_memory`.

  Args:
    text: of the program.
    mesh: see `read_program`.
    unknown_trips: see `read_program`.
  """
  program = hlo.parse(text)
  sent = traffic.collectives(program, traffic.Layout.of(mesh), unknown_trips)
  kinds = argument_kinds(program)
  return {
    "arguments": sum(kinds.values()),
    "temporaries": peak_memory.peak_bytes(program) + _CODE,
    "code": _CODE,
    "kinds": kinds,
    "traffic": traffic.by_axis(sent),
  }


def argument_kinds(program: hlo.Program) -> dict[str, int]:
  """Returns the bytes of a program's arguments by what they are.

  Args:
    program: a compiled program of a step.

  Returns:
    Bytes of one device, padding included, by "parameters", "optimizer",
    "gradients", "batches" and "other".
  """
  found = collections.Counter()
  for each in program.computations[program.entry]:
    if each.opcode != "parameter":
      continue
    name = re.search(r'op_name="([^"]*)"', each.rest)
    path = name[1] if name else ""
    kind = next((k for k, p in _KINDS.items() if p.search(path)), "other")
    found[kind] += sum(array.padded_bytes for array in each.arrays())
  return dict(found)


def with_links(
  programs: dict[str, Any], mesh: Mesh, machine: int = 0
) -> dict[str, Any]:
  """Returns programs with the mesh and the links that they use.

  Args:
    programs: by name, as `read_program` returns them.
    mesh: the mesh that they were compiled for.
    machine: devices of a machine with GPUs; 0 for TPUs.
  """
  used = {
    line["axes"] for each in programs.values() for line in each["traffic"]
  }
  return {
    "mesh": dict(mesh.shape),
    "links": {
      axes: group_links(mesh, axes.split("+"), machine) for axes in used
    },
    "programs": programs,
  }


def group_links(
  mesh: Mesh, axes: Sequence[str], machine: int = 0
) -> dict[str, Any]:
  """Returns where the devices lie that communicate along axes of the mesh.

  Args:
    mesh: devices of the TPU compiler, which have coordinates on the torus.
    axes: names of axes of the mesh.
    machine: devices of a machine with GPUs, which are listed machine by
      machine; 0 for TPUs.

  Returns:
    For one group of devices that differ along these axes only: `devices`, how
    many there are; `slices`, over how many slices or machines they are spread;
    and `dims`, for each dimension of the torus along which they differ a list
    of three numbers: the places that they take, the distance from the first
    place to the last one (both included), and the places of the whole mesh.
    The GPUs of a machine are one closed ring.
  """
  index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
  group = np.ravel(mesh.devices[index])
  if machine:
    return machine_links([device.id for device in group], machine)
  everyone = np.array([device.coords for device in mesh.devices.ravel()])
  slices = {getattr(device, "slice_index", 0) or 0 for device in group}
  first = getattr(group[0], "slice_index", 0)
  near = [d for d in group if getattr(d, "slice_index", 0) == first]
  coords = np.array([device.coords for device in near])
  dims = []
  for dim in range(coords.shape[1]):
    places = np.unique(coords[:, dim])
    if len(places) > 1:
      whole = len(np.unique(everyone[:, dim]))
      dims.append([len(places), int(places[-1] - places[0]) + 1, whole])
  return {"devices": len(group), "slices": len(slices), "dims": dims}


def machine_links(ids: Sequence[int], machine: int) -> dict[str, Any]:
  """Returns what `group_links` does, of a group of GPUs.

  Args:
    ids: of the GPUs, which are numbered machine by machine.
    machine: GPUs of a machine.
  """
  machines = len({i // machine for i in ids})
  return {"devices": len(ids), "slices": machines, "dims": [[len(ids)] * 3]}
