"""Runs the TPU compiler in a process of its own.

An impossible topology ends the process in which it is compiled for, a program
too large may take an hour, and the compiler reads its flags when it is
loaded. So a module of ours is started with its task as JSON on standard input,
and prints its answer as one line of JSON, the last one. It ends with the
process that started it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
from typing import Any, NamedTuple

from hourjax import processes

REASON = 300  # characters of the compiler's reason that are shown
_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  # What is read of a program, its compiler's dumps and the time that it took
  # among it, comes of compiling it.
  "JAX_ENABLE_COMPILATION_CACHE": "false",
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",  # no question to a host about its TPU
}


class Outcome(NamedTuple):
  """How a child ended.

  Attributes:
    answer: what it printed, or None.
    late: whether it was stopped because its time was over.
    reason: why there is no answer, in one line.
  """

  answer: Any
  late: bool = False
  reason: str = ""


def ask_child(module: str, task: Any, *, limit: float, flags: str = ""):
  """Runs `python -m module` on a task.

  Args:
    module: reads the task from standard input.
    task: anything that JSON takes.
    limit: seconds after which the child is stopped.
    flags: for the TPU compiler.

  Returns:
    An `Outcome`; a crash is one, too.
  """
  environment = os.environ | _ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags}
  # A session of its own: what the child starts is stopped with it.
  child = subprocess.Popen(
    processes.module_command(module),
    env=environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  try:
    out, err = child.communicate(json.dumps(task), timeout=limit)
  except subprocess.TimeoutExpired:
    return Outcome(None, True, f"not compiled within {limit:.0f} s")
  finally:
    _stop(child)
  if child.returncode:
    return Outcome(None, False, reason(err))
  return Outcome(json.loads(out.splitlines()[-1]))


def _stop(child: subprocess.Popen) -> None:
  if child.poll() is None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def reason(stderr: str) -> str:
  """The line of a failed child that says why."""
  lines = [line.strip() for line in stderr.splitlines() if line.strip()]
  telling = [
    line
    for line in lines
    if re.search(r"^[\w.]*Error: |^[\w.]*Exception: |Check failed", line)
  ]
  return (telling or lines or ["no reason given"])[-1][:REASON]
