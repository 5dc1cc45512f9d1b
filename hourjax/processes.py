"""Worker processes that end with the process that started them.

However it ends: by an exception, a signal, SIGKILL or a closed terminal. Else a
compiler or a pool would go on for good, with nobody to give its answer to.

  python -m hourjax.processes PID MODULE   runs MODULE until PID is gone
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

_POLL = 0.5  # seconds, where the system cannot tell of a process's end
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def module_command(module: str) -> list[str]:
  """The command line of `python -m module`, bound to this process."""
  return [sys.executable, "-m", "hourjax.processes", str(os.getpid()), module]


def pool(
  workers: int,
  initializer: Callable[..., None] | None = None,
  initargs: tuple[Any, ...] = (),
) -> concurrent.futures.ProcessPoolExecutor:
  """A process pool whose workers end with this process."""
  return concurrent.futures.ProcessPoolExecutor(
    workers,
    # A forked child of a process with threads may wait for a lock forever.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start,
    initargs=(os.getpid(), initializer, initargs),
  )


def _start(parent: int, initializer, initargs) -> None:
  end_with(parent)
  # A terminal interrupts all of its processes; this one's parent sees to it.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if initializer is not None:
    initializer(*initargs)


def end_with(pid: int) -> None:
  """Ends this process, at once and without a word, when another one is gone.

  Args:
    pid: of the other one, on this machine; its parent as a rule.
  """
  if sys.platform == "linux" and pid == os.getppid():
    # The kernel sees to it even where no thread of ours gets to run. It looks
    # at the thread that started us, which waits for our answer.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  try:
    wait = _waiting(pid)
  except ProcessLookupError:  # gone before we asked
    _end()
  threading.Thread(target=_watch, args=(wait,), daemon=True).start()


def _watch(wait: Callable[[], None]) -> None:
  wait()
  _end()


def _end() -> None:
  # No cleaning up: whoever would read of it is gone.
  os._exit(1)


def _waiting(pid: int) -> Callable[[], None]:
  """What to call to wait for the end of a process.

  Raises:
    ProcessLookupError: there is no such process.
  """
  try:
    # A handle of the process: its number may be given away again.
    handle = os.pidfd_open(pid)
  except ProcessLookupError:
    raise
  except (AttributeError, OSError):  # not Linux, or an old one
    return _polling(pid)
  ended = select.poll()
  ended.register(handle, select.POLLIN)
  return ended.poll


def _polling(pid: int) -> Callable[[], None]:
  is_parent = pid == os.getppid()
  os.kill(pid, 0)

  def poll() -> None:
    with contextlib.suppress(ProcessLookupError):
      # A parent that nobody has waited for still has its number.
      while not is_parent or os.getppid() == pid:
        os.kill(pid, 0)
        time.sleep(_POLL)

  return poll


def _main(pid: str, module: str) -> None:
  end_with(int(pid))
  sys.argv = [module]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  _main(*sys.argv[1:])
