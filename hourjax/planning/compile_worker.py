"""The worker process that compiles a training step for a TPU topology.

`compiled_step` starts it through `compile_pool`. It reads a task as JSON from
standard input and prints the answer as one line of JSON. No TPU is needed.
"""

import collections
import concurrent.futures
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from hourjax.errors import UserError
from hourjax.parallel.mesh import make_mesh
from hourjax.planning import hlo, traffic
from hourjax.training.config import build_experiment
from hourjax.training.train_step import lower_programs

# What a parameter of a compiled program belongs to, by its argument's path.
_KINDS = {
  "optimizer": re.compile(r"opt_state"),
  "gradients": re.compile(r"sums|grads|gradients|total"),
  "batches": re.compile(r"batch"),
  "parameters": re.compile(r"trained|frozen|params"),
}


def compile_programs(task: dict[str, Any]) -> dict[str, Any]:
  """Compiles every program of a training step.

  Args:
    task: `experiment` (nested, as `build_experiment` takes it), `topology`,
      `slices`, `bounds` (for `get_topology_desc`) and `unknown_trips` (how
      many turns a loop counts whose length only the data decides).

  Returns:
    `mesh` (axes and their sizes), `links` (by axes, see `group_links`) and
    `programs` by name: what `read_program` returns, and the seconds that
    compiling took. If the compiler ran out of memory, `exhausted`, which is
    its message, and `program`, the name of the program.

  Raises:
    UserError: the configuration does not suit the topology.
  """
  experiment = build_experiment(task["experiment"])
  slices = {"num_slices": task["slices"]} if task["slices"] > 1 else {}
  topology = topologies.get_topology_desc(
    platform="tpu",
    topology_name=task["topology"],
    **slices,
    **task["bounds"],
  )
  mesh = make_mesh(experiment.mesh, topology.devices)
  lowered = lower_programs(experiment, mesh)
  with concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:
    running = {
      name: pool.submit(_compile, each, mesh, task["unknown_trips"])
      for name, each in lowered.items()
    }
  programs = {}
  for name, future in running.items():
    try:
      programs[name] = future.result()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return {"exhausted": str(error), "program": name}
  return with_links(programs, mesh)


def with_links(programs: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
  """Returns programs with the mesh and the links that they use.

  Args:
    programs: by name, as `read_program` returns them.
    mesh: the mesh that they were compiled for.
  """
  used = {
    line["axes"] for each in programs.values() for line in each["traffic"]
  }
  return {
    "mesh": dict(mesh.shape),
    "links": {axes: group_links(mesh, axes.split("+")) for axes in used},
    "programs": programs,
  }


def _compile(
  lowered: jax.stages.Lowered, mesh: Mesh, unknown_trips: float
) -> dict[str, Any]:
  """Returns what is read of a program, and the seconds to compile it."""
  began = time.monotonic()
  compiled = lowered.compile()
  seconds = time.monotonic() - began
  return read_program(compiled, mesh, unknown_trips) | {"seconds": seconds}


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
  program = hlo.parse(hlo.program_text(compiled))
  memory = hlo.program_memory(compiled)
  sent = traffic.collectives(program, traffic.Layout.of(mesh), unknown_trips)
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
    "kinds": argument_kinds(program),
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


def group_links(mesh: Mesh, axes: Sequence[str]) -> dict[str, Any]:
  """Returns where the devices lie that communicate along axes of the mesh.

  Args:
    mesh: devices of the TPU compiler, which have coordinates on the torus.
    axes: names of axes of the mesh.

  Returns:
    For one group of devices that differ along these axes only: `devices`, how
    many there are; `slices`, over how many slices they are spread; and `dims`,
    for each dimension of the torus along which they differ a list of three
    numbers: the places that they take, the distance from the first place to
    the last one (both included), and the places of the whole mesh.
  """
  index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
  group = np.ravel(mesh.devices[index])
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


def answer(task: dict[str, Any]) -> dict[str, Any]:
  """Returns `compile_programs(task)`, or `user_error`, a user's mistake."""
  try:
    return compile_programs(task)
  except UserError as error:
    return {"user_error": str(error)}


if __name__ == "__main__":
  print(json.dumps(answer(json.load(sys.stdin))))
