"""Compiles a training step for a TPU topology; started by `step`.

Reads a task as JSON from standard input and prints the answer as one line of
JSON (see `children`). No TPU is needed.
"""

import collections
import concurrent.futures
import json
import re
import sys
import time
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


def compile_step(task: dict[str, Any]) -> dict[str, Any]:
  """Compiles every program of a step.

  Args:
    task: `experiment` (nested, as `build_experiment` takes it), `topology`,
      `slices`, `bounds` (for `get_topology_desc`) and `unknown_trips`.

  Returns:
    `mesh` (axes and sizes), `links` (see `_links`) and `programs` by name:
    bytes, traffic and the seconds that compiling took; or `exhausted`, the
    compiler's message and the program's name; or `user_error`.
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
    began = {
      name: pool.submit(_compiled, each, mesh, task["unknown_trips"])
      for name, each in lowered.items()
    }
  found = {}
  for name, running in began.items():
    try:
      found[name] = running.result()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return {"exhausted": str(error), "program": name}
  used = {line["axes"] for each in found.values() for line in each["traffic"]}
  return {
    "mesh": dict(mesh.shape),
    "links": {axes: group_links(mesh, axes.split("+")) for axes in used},
    "programs": found,
  }


def _compiled(lowered: jax.stages.Lowered, mesh, unknown_trips):
  """What is read of a program, and the seconds that compiling it took."""
  began = time.monotonic()
  compiled = lowered.compile()
  seconds = time.monotonic() - began
  return read_program(compiled, mesh, unknown_trips) | {"seconds": seconds}


def read_program(
  compiled: jax.stages.Compiled, mesh: Mesh, unknown_trips: float
) -> dict[str, Any]:
  """Bytes of one device by kind of argument, and what the program sends."""
  program = hlo.parse(compiled.as_text())
  memory = compiled.memory_analysis()
  sent = traffic.collectives(program, traffic.Layout.of(mesh), unknown_trips)
  return {
    "arguments": memory.argument_size_in_bytes,
    # All that is there beside the arguments while it runs, and its code. The
    # compiler's own `temp_size` is no limit: a program of 18.4 GiB of them
    # compiled for a device of 15.75, with a peak of 12.1. Where it refuses
    # one for want of memory it names the peak, to 3 %.
    "temporaries": max(
      0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    )
    + memory.generated_code_size_in_bytes,
    "kinds": argument_kinds(program),
    "traffic": traffic.by_axis(sent),
  }


def argument_kinds(program: hlo.Program) -> dict[str, int]:
  """Bytes of the program's arguments by what they are, padding included."""
  found = collections.Counter()
  for each in program.computations[program.entry]:
    if each.opcode != "parameter":
      continue
    name = re.search(r'op_name="([^"]*)"', each.rest)
    path = name[1] if name else ""
    kind = next((k for k, p in _KINDS.items() if p.search(path)), "other")
    found[kind] += sum(array.padded_bytes for array in each.arrays())
  return dict(found)


def group_links(mesh: Mesh, axes: list[str]) -> dict[str, Any]:
  """Where the devices lie that communicate along these axes of the mesh.

  Returns:
    For one group of them `devices`; `slices` that they are spread over; and
    `dims`, for each dimension of the torus along which they differ [places
    taken, distance from the first to the last, devices of the whole mesh
    along it].
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
  """`compile_step`, with a user's mistake as part of the answer."""
  try:
    return compile_step(task)
  except UserError as error:
    return {"user_error": str(error)}


if __name__ == "__main__":
  print(json.dumps(answer(json.load(sys.stdin))))
