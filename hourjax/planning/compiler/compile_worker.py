"""The worker process that compiles a program of a step for a topology.

`compiled_step` starts it through `compile_pool`. It reads a task as JSON from
standard input and prints the answer as one line of JSON. No TPU is needed.

The compiler first decides what runs when, which takes seconds, and then writes
the instructions of every fusion and kernel, which takes minutes. A plan needs
only the first: the schedule with all collectives, and whether memory suffices,
which the compiler says just before. It leaves the scheduled program in a folder
(flag `xla_jf_dump_to`); the worker reads it there and ends, and the compiler
with it. For GPUs the compiler for CPUs does the same, see
`compiled_step.compile_step`.
"""

import glob
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from hourjax import jax_environment
from hourjax.atomic_file import write_file
from hourjax.errors import UserError
from hourjax.parallel.mesh import make_mesh
from hourjax.planning.compiler import hlo
from hourjax.planning.compiler.compiled_step import (
  memory_of,
  read_schedule,
  with_links,
)
from hourjax.training.config import build_experiment
from hourjax.training.train_step import lower_programs

_POLL = 0.1  # seconds between two looks at what the compiler has left
_KEPT = 200  # programs in the cache


def compile_program(task: dict[str, Any]) -> dict[str, Any]:
  """Compiles one program of a training step.

  Args:
    task: `experiment` (nested, as `build_experiment` takes it), `program` (its
      name), `streams` (those of `row_specs` to lower for), `topology`,
      `slices`, `bounds` (for `get_topology_desc`), `machine` (GPUs of a
      machine; 0 for TPUs), `unknown_trips` (how many turns a loop counts whose
      length only the data decides) and `folder`, in which the compiler leaves
      the schedule; empty to compile to the end.

  Returns:
    `mesh` (axes and their sizes), `links` (by axes, see
    `compiled_step.group_links`) and `programs`: by name what `read_schedule`
    returns, and the seconds that compiling took. If the compiler ran out of
    memory, `exhausted`, which is its message, and `program`.

  Raises:
    UserError: the configuration does not suit the topology.
  """
  experiment = build_experiment(task["experiment"])
  mesh = make_mesh(experiment.mesh, _devices(task))
  name = task["program"]
  lowered = lower_programs(experiment, mesh, task["streams"])[name]
  try:
    found = _compiled(lowered, mesh, task)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {"exhausted": str(error), "program": name}
  if task["machine"]:
    found["traffic"] = [_on_gpus(line) for line in found["traffic"]]
  return with_links({name: found}, mesh, task["machine"])


def _devices(task: dict[str, Any]) -> Sequence[jax.Device]:
  """Returns the devices to compile for; CPU devices stand in for GPUs."""
  if task["machine"]:
    return jax.devices()
  slices = {"num_slices": task["slices"]} if task["slices"] > 1 else {}
  return topologies.get_topology_desc(
    platform="tpu",
    topology_name=task["topology"],
    **slices,
    **task["bounds"],
  ).devices


def _on_gpus(line: dict[str, Any]) -> dict[str, Any]:
  """Returns a line of traffic as XLA runs it on GPUs.

  Its latency-hiding scheduler (`jax_environment` switches it on) starts the
  gathering of weights and the summing of gradients beside products.
  """
  beside = line["kind"] in ("all-gather", "reduce-scatter")
  return line | {"asynchronous": beside}


def _compiled(
  lowered: jax.stages.Lowered, mesh: Mesh, task: dict[str, Any]
) -> dict[str, Any]:
  """Returns what is read of a program, compiled now or before."""
  path = _cache_path(lowered, task)
  if path is not None and path.exists():
    found = json.loads(gzip.decompress(path.read_bytes()))
  else:
    began = time.monotonic()
    found = _schedule(lowered, task["folder"])
    found["seconds"] = time.monotonic() - began
    if path is not None:
      _keep(path, found)
  read = read_schedule(found["text"], mesh, task["unknown_trips"])
  return read | found["memory"] | {"seconds": found["seconds"]}


def _schedule(lowered: jax.stages.Lowered, folder: str) -> dict[str, Any]:
  """Compiles a program until its schedule is there, or to the end.

  Args:
    lowered: the program.
    folder: in which the compiler leaves the schedule; empty to compile to the
      end.

  Returns:
    `text`, the scheduled program, and `memory`, what `memory_of` returns of a
    program that was compiled to the end.
  """
  ended: list[jax.stages.Compiled | Exception] = []

  def run() -> None:
    try:
      ended.append(lowered.compile())
    except Exception as error:
      ended.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  while thread.is_alive():
    if folder and (text := _left_in(folder)):
      return {"text": text, "memory": {}}
    thread.join(_POLL)
  (result,) = ended
  if isinstance(result, Exception):
    # The compiler for CPUs refuses bfloat16 once it has left the schedule.
    text = _left_in(folder) if folder and "UNIMPLEMENTED" in str(result) else ""
    if text:
      return {"text": text, "memory": {}}
    raise result
  text = hlo.program_text(result)
  return {"text": text, "memory": {} if folder else memory_of(result)}


def _left_in(folder: str) -> str | None:
  """Returns the scheduled program that the compiler has left, if it has."""
  for path in [
    *glob.glob(f"{folder}/*-TLP-hlo.txt"),
    *glob.glob(f"{folder}/*.cpu_after_optimizations.txt"),
  ]:
    text = pathlib.Path(path).read_text()
    # It may still be written: the entry computation comes last.
    if "\nENTRY " in text and text.endswith("\n}\n\n"):
      return text
  return None


def _cache_path(
  lowered: jax.stages.Lowered, task: dict[str, Any]
) -> pathlib.Path | None:
  """Returns where the result of a program is kept; None without a cache."""
  folder = jax_environment.cache_folder(os.environ)
  if folder is None:
    return None
  flags = os.environ.get("LIBTPU_INIT_ARGS", "").split()
  parts = (
    lowered.as_text(),
    task["topology"],
    str(task["slices"]),
    str(bool(task["folder"])),
    *sorted(flag for flag in flags if "xla_jf_dump" not in flag),
    importlib.metadata.version("libtpu"),
    jax.__version__,
  )
  name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
  return folder.parent / "schedules" / f"{name}.json.gz"


def _keep(path: pathlib.Path, found: dict[str, Any]) -> None:
  """Puts a result into the cache, and drops the oldest ones."""
  try:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(path, gzip.compress(json.dumps(found).encode()))
    for old in sorted(path.parent.iterdir(), key=os.path.getmtime)[:-_KEPT]:
      old.unlink()
  except OSError as error:  # a full disk: it costs the next plan seconds
    print(f"the schedule is not kept: {error}", file=sys.stderr)


def answer(task: dict[str, Any]) -> dict[str, Any]:
  """Returns `compile_program(task)`, or `user_error`, a user's mistake."""
  try:
    return compile_program(task)
  except UserError as error:
    return {"user_error": str(error)}


if __name__ == "__main__":
  print(json.dumps(answer(json.load(sys.stdin))), flush=True)
  # The compiler may still run, and nobody waits for what it makes.
  os._exit(0)
