"""The worker process that compiles a training step for a TPU topology.

`compiled_step` starts it through `compile_pool`. It reads a task as JSON from
standard input and prints the answer as one line of JSON. No TPU is needed.
"""

import concurrent.futures
import json
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from hourjax.errors import UserError
from hourjax.parallel.mesh import make_mesh
from hourjax.planning.compiled_step import read_program, with_links
from hourjax.training.config import build_experiment
from hourjax.training.train_step import lower_programs


def compile_programs(task: dict[str, Any]) -> dict[str, Any]:
  """Compiles every program of a training step.

  Args:
    task: `experiment` (nested, as `build_experiment` takes it), `topology`,
      `slices`, `bounds` (for `get_topology_desc`) and `unknown_trips` (how
      many turns a loop counts whose length only the data decides).

  Returns:
    `mesh` (axes and their sizes), `links` (by axes, see
      `compiled_step.group_links`) and
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


def _compile(
  lowered: jax.stages.Lowered, mesh: Mesh, unknown_trips: float
) -> dict[str, Any]:
  """Returns what is read of a program, and the seconds to compile it."""
  began = time.monotonic()
  compiled = lowered.compile()
  seconds = time.monotonic() - began
  return read_program(compiled, mesh, unknown_trips) | {"seconds": seconds}


def answer(task: dict[str, Any]) -> dict[str, Any]:
  """Returns `compile_programs(task)`, or `user_error`, a user's mistake."""
  try:
    return compile_programs(task)
  except UserError as error:
    return {"user_error": str(error)}


if __name__ == "__main__":
  print(json.dumps(answer(json.load(sys.stdin))))
