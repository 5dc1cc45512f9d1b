"""The hosts of a TPU: set up, started, stopped, and their states and logs.

Each worker has a connection of its own, several at a time, so that every
answer, error and retry belongs to one worker; gcloud's `--worker=all` does not
keep them apart.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from tpu.errors import LaunchError
from tpu.gcloud import Gcloud
from tpu.slices import Tpu

_SCRIPT = "hourjax/code/launch/tpu/worker.sh"
_TARBALL = "hourjax-code.tar.gz"
_MARK = "hourjax-state: "
_ENV = "hourjax-env"


class Worker(NamedTuple):
  """Names one host: a slice's node, and the host's number in it."""

  node: str
  index: int

  def __str__(self) -> str:
    return f"{self.node}:{self.index}"


class Job(NamedTuple):
  """Describes what every worker runs.

  Attributes:
    command: the command line.
    env_file: local file of lines KEY=VALUE for its environment, "" for none.
    prepare: shell command to run before it, "" for none; it must be
      repeatable.
  """

  command: list[str]
  env_file: str = ""
  prepare: str = ""


class State(NamedTuple):
  """Describes what a worker is doing.

  Attributes:
    what: absent (not set up), none, running, ended or lost (died silently).
    run: id of its newest run, "" if there was none.
    code: exit status once it has ended.
    note: "stopped" by `stop`, "signalled" by a machine that shut down, or "".
  """

  what: str
  run: str = ""
  code: int = 0
  note: str = ""


def parse_state(text: str) -> State:
  """Parses the line that `worker.sh state` prints among other output.

  Raises:
    LaunchError: there is no such line.
  """
  for line in text.splitlines():
    if line.startswith(_MARK):
      what, *rest = line[len(_MARK) :].split()
      run = rest[0] if rest else ""
      code = int(rest[1]) if what == "ended" else 0
      return State(what, run, code, rest[2] if len(rest) > 2 else "")
  raise LaunchError(f"a worker answered {text.strip()!r}; run `setup` again")


class Workers:
  """Controls all hosts of a TPU."""

  def __init__(self, gcloud: Gcloud, tpu: Tpu, parallel: int):
    self.all = [
      Worker(piece.node, index)
      for piece in tpu.slices
      for index in range(piece.workers)
    ]
    self._gcloud, self._parallel = gcloud, parallel

  def setup(self, tarball: str) -> None:
    """Copies the code to every worker and installs it in .venv.

    Args:
      tarball: local path at which the packed code is written.

    Raises:
      LaunchError: a worker failed, or is training.
    """
    self._gcloud.local(["bash", _here("pack.sh"), tarball])

    def one(worker: Worker) -> None:
      self._gcloud.copy(tarball, worker.node, worker.index, _TARBALL)
      self._ssh(
        worker,
        "rm -rf hourjax/next && mkdir -p hourjax/next && tar -xzf"
        f" {_TARBALL} -C hourjax/next &&"
        " bash hourjax/next/launch/tpu/worker.sh install",
      )

    # The very first connection may create and register an ssh key; several at
    # once would overwrite one another's.
    self._gcloud.say(f"setting up {self.all[0]}, some minutes the first time")
    one(self.all[0])
    if self.all[1:]:
      self._gcloud.say(f"setting up the other {len(self.all) - 1} workers")
      self.each(one, self.all[1:])

  def states(self) -> dict[Worker, State]:
    """Returns the state of every worker."""
    command = (
      f"if [ -e {_SCRIPT} ]; then bash {_SCRIPT} state;"
      f" else echo {_MARK}absent; fi"
    )
    return self._answers(command)

  def start(self, run: str, job: Job) -> None:
    """Starts a job on every worker, detached, under the name of a run.

    Args:
      run: name of the run.
      job: what to run.

    Raises:
      LaunchError: a worker is not set up or already runs; the workers that
        were started are then stopped again.
    """
    prefix = []
    if job.prepare:
      line = shlex.quote(job.prepare)
      self.each(lambda x: self._ssh(x, f"bash {_SCRIPT} prepare {line}"))
    if job.env_file:
      prefix = ["bash", "launch/tpu/worker.sh", "with", f"../{_ENV}"]
      self.each(
        lambda x: self._gcloud.copy(
          job.env_file, x.node, x.index, f"hourjax/{_ENV}"
        )
      )
    words = shlex.join([*prefix, *job.command])
    try:
      self._answers(f"bash {_SCRIPT} start {run} {words}")
    except LaunchError:
      with contextlib.suppress(LaunchError):  # the first error is reported
        states = self.states()
        mine = [x for x in self.all if states[x] == State("running", run)]
        self._answers(f"bash {_SCRIPT} stop 20 kill", mine)
      raise

  def stop(self, seconds: int, kill: bool) -> dict[Worker, State]:
    """Sends SIGTERM to every run and waits for its end.

    Args:
      seconds: longest time to wait.
      kill: send SIGKILL afterwards.

    Returns:
      The state of every worker.
    """
    force = " kill" if kill else ""
    return self._answers(f"bash {_SCRIPT} stop {seconds}{force}", self.all)

  def logs(self, folder: str) -> list[str]:
    """Writes each worker's log into a folder; returns the paths."""

    def one(worker: Worker) -> str:
      text = self._ssh(worker, f"bash {_SCRIPT} log 1")
      path = os.path.join(folder, f"{worker.node}-{worker.index}.log")
      if not self._gcloud.dry_run:
        with open(path, "w", encoding="utf-8") as file:
          file.write(text)
      return path

    if not self._gcloud.dry_run:
      os.makedirs(folder, exist_ok=True)
    return list(self.each(one).values())

  def tail(self, worker: Worker, lines: int) -> str:
    """Returns the last lines of a worker's log."""
    text = self._ssh(worker, f"bash {_SCRIPT} log 1 | tail -n {lines}")
    return text.rstrip()

  def follow_command(self, worker: Worker, line: int) -> list[str]:
    """Returns the command that prints a log from a line until the run ends."""
    command = f"bash {_SCRIPT} follow {line}"
    return self._gcloud.ssh_command(worker.node, worker.index, command)

  def each(
    self,
    function: Callable[[Worker], Any],
    workers: list[Worker] | None = None,
  ) -> dict[Worker, Any]:
    """Calls `function` for every worker, several at a time.

    Args:
      function: what to call.
      workers: some of the workers; all if None.

    Returns:
      The results by worker.

    Raises:
      LaunchError: after all calls have ended, the first error; its message
        says how many failed.
    """
    workers = self.all if workers is None else workers
    if self._gcloud.dry_run:  # in order
      return {worker: function(worker) for worker in workers}
    pool = concurrent.futures.ThreadPoolExecutor(self._parallel)
    with pool:
      futures = {worker: pool.submit(function, worker) for worker in workers}
    failed: list[LaunchError] = []
    for future in futures.values():
      error = future.exception()
      if isinstance(error, LaunchError):
        failed.append(error)
      elif error is not None:
        raise error
    if failed:
      first = failed[0]
      message = str(first)
      if len(workers) > 1:
        message = f"{len(failed)} of {len(workers)} workers failed: {first}"
      raise LaunchError(message, kind=first.kind, line=first.line)
    return {worker: future.result() for worker, future in futures.items()}

  def _answers(
    self, command: str, workers: list[Worker] | None = None
  ) -> dict[Worker, State]:
    """Runs a command of worker.sh on workers; returns their states."""

    def one(worker: Worker) -> State:
      text = self._ssh(worker, command)
      return State("none") if self._gcloud.dry_run else parse_state(text)

    return self.each(one, workers)

  def _ssh(self, worker: Worker, command: str) -> str:
    return self._gcloud.ssh(worker.node, worker.index, command)


def _here(name: str) -> str:
  return os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
