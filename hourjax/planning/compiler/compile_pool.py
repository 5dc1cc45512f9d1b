"""Worker processes in which the TPU compiler runs.

An impossible topology ends the process that compiles for it, a large program
may take an hour, and the compiler reads its flags when it is loaded. So every
program is compiled in a worker process: a module of this package is started
with its task as JSON on standard input, and prints its answer as one line of
JSON, the last line. The worker ends with the process that started it.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from hourjax import processes, progress

REASON = 300  # characters of the compiler's reason that are shown
_AT_ONCE = 2  # worker processes that `run_all` lets run beside each other
# Variables of a worker process, unless it is given others.
ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  # A program out of the cache has no compile time and leaves no dumps of the
  # compiler, and both are read.
  "JAX_ENABLE_COMPILATION_CACHE": "false",
  "JAX_PLATFORMS": "cpu",
  # Flags for a CPU or GPU of this machine; LIBTPU_INIT_ARGS are the TPU's.
  "XLA_FLAGS": "",
  "TPU_SKIP_MDS_QUERY": "1",  # no question to a host about its TPU
}
_Key = TypeVar("_Key")
_Result = TypeVar("_Result")


class Outcome(NamedTuple):
  """Describes how a worker process ended.

  Attributes:
    answer: what it printed; None if it gave no answer.
    late: whether it was stopped because its time was over.
    reason: why there is no answer, in one line.
  """

  answer: Any
  late: bool = False
  reason: str = ""


def run_worker(
  module: str,
  task: Any,
  *,
  limit: float,
  flags: str = "",
  environment: Mapping[str, str] = ENVIRONMENT,
) -> Outcome:
  """Runs `python -m module` on a task and returns how it ended.

  Args:
    module: the name of a module that reads its task from standard input.
    task: the task, of values that JSON can hold.
    limit: seconds after which the worker is stopped.
    flags: flags for the TPU compiler.
    environment: variables that it gets beside those of this process.

  Returns:
    The outcome. A worker that crashes or is late raises nothing: that is an
    outcome, too.
  """
  own = {"LIBTPU_INIT_ARGS": flags, **environment}
  # In a session of its own, so that the processes that it starts can be
  # stopped together with it.
  worker = subprocess.Popen(
    processes.module_command(module),
    env=os.environ | own,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  try:
    out, err = worker.communicate(json.dumps(task), timeout=limit)
  except subprocess.TimeoutExpired:
    return Outcome(None, True, f"not compiled within {limit:.0f} s")
  finally:
    _stop(worker)
  if worker.returncode:
    return Outcome(None, False, failure_reason(err))
  return Outcome(json.loads(out.splitlines()[-1]))


def _stop(worker: subprocess.Popen) -> None:
  """Kills a worker that still runs, with all processes of its session."""
  if worker.poll() is None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate()


def failure_reason(stderr: str) -> str:
  """Returns the line on standard error that says why a worker failed."""
  lines = [line.strip() for line in stderr.splitlines() if line.strip()]
  telling = [
    line
    for line in lines
    if re.search(r"^[\w.]*Error: |^[\w.]*Exception: |Check failed", line)
  ]
  return (telling or lines or ["no reason given"])[-1][:REASON]


def run_all(
  name: str, calls: Mapping[_Key, Callable[[], _Result]]
) -> dict[_Key, _Result]:
  """Runs several calls that compile, two at a time, under a progress bar.

  The first error cancels the calls that have not begun.

  Args:
    name: the title of the progress bar.
    calls: by name, functions of no argument, each of which runs a worker.

  Returns:
    The results by name.
  """
  results = {}
  with (
    concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool,
    progress.bar(len(calls), unit="program", desc=name) as bar,
  ):
    waiting = {pool.submit(call): key for key, call in calls.items()}
    try:
      for done in concurrent.futures.as_completed(waiting):
        results[waiting[done]] = done.result()
        bar.set_postfix_str(str(waiting[done]), refresh=False)
        bar.update()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
  return results
