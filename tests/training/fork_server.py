"""Starts `python -m hourjax.train` by forking a process that has imported it.

Importing jax, Orbax and the rest costs seconds of a core at every start; here
they are imported once. jax starts its threads when it first touches a device,
which the server never does, so that it may be forked. What is forked runs the
command's file from its first line on, and is a process of its own to signals,
limits, exit handlers and the rest.

`Server` is the test's end. The server's end, `python -m
tests.training.fork_server`, reads a request a line from standard input:

    {"start": arguments, "env": variables, "said": file, "file_bytes": limit,
     "toy": whether the step is that of `toy`}
                    -> process id
    {"poll": id}    -> its status as of subprocess, null while it runs
    {"warm": configuration} traces the shapes of its parameters, which all
                    that is forked later finds done -> null
"""

import collections
import contextlib
import gc
import importlib
import json
import os
import pathlib
import resource
import runpy
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
# What hourjax.train imports, but not itself: its options are made in each
# process that is forked.
_IMPORTED = (
  "hourjax.command",
  "hourjax.parallel.hosts",
  "hourjax.training.loop",
  "ml_collections.config_flags",
  "configs.demo",
)
# These libraries start threads when they are imported.
_NO_THREADS = {
  "OPENBLAS_NUM_THREADS": "1",
  "OMP_NUM_THREADS": "1",
}
_CACHE = {
  "JAX_COMPILATION_CACHE_DIR": "jax_compilation_cache_dir",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": (
    "jax_persistent_cache_min_compile_time_secs"
  ),
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": (
    "jax_persistent_cache_min_entry_size_bytes"
  ),
}


class Server:
  """A server process and the trainings that it has forked."""

  def __init__(self):
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.training.fork_server"],
      cwd=ROOT,
      env={
        **os.environ,
        **_NO_THREADS,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
      },
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def start(self, arguments, *, env, said, file_bytes=None, toy=False):
    """Starts a training; `said` is the path of what it writes to stderr."""
    request = {
      "start": arguments, "env": env, "said": said, "file_bytes": file_bytes,
      "toy": toy,
    }  # fmt: skip
    return Forked(self, self.ask(request))

  def ask(self, request):
    """The answer of the server process."""
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())

  def close(self):
    """Ends the server and what it has started."""
    self._process.stdin.close()
    self._process.wait(60)


class Forked:
  """As much of subprocess.Popen as tests of trainings use."""

  def __init__(self, server: Server, pid: int):
    self._server, self.pid = server, pid
    self.returncode = None

  def poll(self):
    if self.returncode is None:
      self.returncode = self._server.ask({"poll": self.pid})
    return self.returncode

  def wait(self, timeout: float):
    until = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > until:
        raise subprocess.TimeoutExpired("hourjax.train", timeout)
      time.sleep(0.01)
    return self.returncode

  def send_signal(self, number: int):
    if self.poll() is None:
      os.kill(self.pid, number)

  def terminate(self):
    self.send_signal(15)

  def kill(self):
    self.send_signal(9)


def _serve() -> list[str] | None:
  """Answers requests; returns arguments in a process that was forked."""
  running: set[int] = set()
  for line in sys.stdin:
    request = json.loads(line)
    if "warm" in request:
      from hourjax.models.params import param_shapes
      from hourjax.training.config import build_experiment

      param_shapes(build_experiment(request["warm"]).model)
      print("null", flush=True)
      continue
    if "poll" in request:
      pid, status = os.waitpid(request["poll"], os.WNOHANG)
      running.discard(pid)
      answer = os.waitstatus_to_exitcode(status) if pid else None
      print(json.dumps(answer), flush=True)
      continue
    # A process with several threads must not be forked, but for those of a
    # library that provides for it.
    threads = _threads()
    threads.pop("jemalloc_bg_thd", None)
    assert threads.total() == 1, threads
    pid = os.fork()
    if not pid:
      _become(request)
      return request["start"]
    running.add(pid)
    print(pid, flush=True)
  for pid in running:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, 9)
  return None


def _threads() -> collections.Counter:
  """Names of this process's threads, and how many there are of each."""
  names = pathlib.Path("/proc/self/task").glob("*/comm")
  return collections.Counter(name.read_text().strip() for name in names)


def _become(request) -> None:
  """Gives a forked process its files, variables and limits."""
  import jax

  nothing = os.open(os.devnull, os.O_RDWR)
  said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  for number, target in ((0, nothing), (1, nothing), (2, said)):
    os.dup2(target, number)
  os.environ.update(request["env"])
  for variable, name in _CACHE.items():
    if variable in request["env"]:
      kind = type(jax.config.values[name])
      value = request["env"][variable]
      jax.config.update(name, value if kind is type(None) else kind(value))
  if request["toy"]:
    from tests.training import toy

    toy.install()
  if limit := request["file_bytes"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


if __name__ == "__main__":
  for name in _IMPORTED:
    importlib.import_module(name)
  gc.collect()
  gc.freeze()  # else collections copy its memory in every fork
  arguments = _serve()
  if arguments is not None:
    sys.argv = ["hourjax.train", *arguments]
    runpy.run_module("hourjax.train", run_name="__main__", alter_sys=True)
