"""Worker processes end with the process that started them, however it ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from hourjax import processes

# Starts a worker of each kind, which write their process numbers into files,
# and waits.
PARENT = """
import pathlib, signal, subprocess, sys
from hourjax import processes
from tests import test_processes as own

if __name__ == "__main__":
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` ignores it
  folder = pathlib.Path(sys.argv[1])
  sleeper = subprocess.Popen(
    processes.module_command("tests.sleeping"),
    stdin=subprocess.PIPE,
    start_new_session=True,
  )
  sleeper.stdin.write(str(folder / "sleeper").encode() + b"\\n")
  sleeper.stdin.flush()
  with processes.pool(2, own.note, (str(folder),)) as pool:
    list(pool.map(own.rest, range(2)))
"""


def note(folder: str) -> None:
  """Initializer of a pool's worker."""
  with open(os.path.join(folder, f"pool-{os.getpid()}"), "w") as file:
    file.write(str(os.getpid()))


def rest(_) -> None:
  time.sleep(300)


def _alive(pid: int) -> bool:
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def _until(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "nothing came of it"
    time.sleep(0.02)


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_all_end_with_their_parent(tmp_path, number):
  parent = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(PARENT), tmp_path],
    stderr=subprocess.DEVNULL,
  )
  try:
    _until(lambda: len([x for x in tmp_path.iterdir() if x.read_text()]) == 3)
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert all(_alive(pid) for pid in pids)
    parent.send_signal(getattr(signal, number))
    _until(lambda: not any(_alive(pid) for pid in pids), 20)
  finally:
    parent.kill()
    parent.wait()


def test_a_parent_that_is_gone_already():
  gone = subprocess.Popen(["true"])
  gone.wait()
  done = subprocess.run(
    [sys.executable, "-m", "hourjax.processes", str(gone.pid), "tests.sleeping"]
  )
  assert done.returncode == 1


def test_without_handles_of_processes(monkeypatch):
  """As on systems other than Linux."""
  monkeypatch.setattr(processes, "_POLL", 0.01)
  monkeypatch.delattr(os, "pidfd_open")
  other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
  wait = processes._waiting(other.pid)
  other.kill()
  other.wait()
  wait()
  with pytest.raises(ProcessLookupError):
    processes._waiting(other.pid)
