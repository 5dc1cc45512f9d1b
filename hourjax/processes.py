"""Worker processes that end with the process that started them.

They end however that process ends: by an exception, a signal, SIGKILL or a
closed terminal. Otherwise a compiler or a process pool would keep a core busy
forever, with no one left to read its result.

  python -m hourjax.processes PID MODULE [OPTIONS]

runs MODULE while process PID lives.
"""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import runpy
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_POLL = 0.5  # seconds between checks on systems without pidfd
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def module_command(module: str, *options: str) -> list[str]:
  """Returns the command line of `python -m module`, bound to this process.

  Args:
    module: full name.
    *options: of the command line.
  """
  start = [sys.executable, "-m", "hourjax.processes", str(os.getpid())]
  return [*start, module, *options]


def pool(
  workers: int,
  initializer: Callable[..., None] | None = None,
  initargs: tuple[Any, ...] = (),
) -> concurrent.futures.ProcessPoolExecutor:
  """Creates a process pool whose workers end with this process.

  Args:
    workers: number of processes.
    initializer: called in each worker before its first task.
    initargs: its arguments.

  Returns:
    The pool; its workers are spawned, so tasks must be picklable.
  """
  return concurrent.futures.ProcessPoolExecutor(
    workers,
    # A fork of a process with threads can inherit a lock that nobody frees.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start,
    initargs=(os.getpid(), initializer, initargs),
  )


def _start(
  parent: int,
  initializer: Callable[..., None] | None,
  initargs: tuple[Any, ...],
) -> None:
  """Prepares a worker process of a pool."""
  end_with(parent)
  # Ctrl-C reaches every process of a terminal; the parent handles it and ends
  # its workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if initializer is not None:
    initializer(*initargs)


def end_with(pid: int) -> None:
  """Makes this process end, at once and silently, when another one ends.

  Args:
    pid: number of the other process on this machine, usually the parent.
  """
  if sys.platform == "linux" and pid == os.getppid():
    # The kernel kills this process even if no Python thread gets to run. It
    # watches the thread that started us; that thread waits for our result, so
    # it lives as long as its process.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  try:
    wait = _waiting(pid)
  except ProcessLookupError:  # it ended before we could watch it
    _end()
    return
  threading.Thread(target=_watch, args=(wait,), daemon=True).start()


def _watch(wait: Callable[[], object]) -> None:
  wait()
  _end()


def _end() -> None:
  # Without cleaning up: no process is left that would use the result.
  os._exit(1)


def _waiting(pid: int) -> Callable[[], object]:
  """Returns a function that blocks until a process has ended.

  Raises:
    ProcessLookupError: there is no such process.
  """
  try:
    # A handle, since the number may be reused for another process.
    handle = os.pidfd_open(pid)
  except ProcessLookupError:
    raise
  except (AttributeError, OSError):  # not Linux, or an old kernel
    return _polling(pid)
  ended = select.poll()
  ended.register(handle, select.POLLIN)
  return ended.poll


def _polling(pid: int) -> Callable[[], object]:
  """As `_waiting`, on systems without process handles."""
  is_parent = pid == os.getppid()
  os.kill(pid, 0)

  def poll() -> None:
    with contextlib.suppress(ProcessLookupError):
      # The number of a dead parent stays in use until it is waited for.
      while not is_parent or os.getppid() == pid:
        os.kill(pid, 0)
        time.sleep(_POLL)

  return poll


def _main(pid: str, module: str, *options: str) -> None:
  end_with(int(pid))
  sys.argv = [module, *options]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  _main(*sys.argv[1:])
