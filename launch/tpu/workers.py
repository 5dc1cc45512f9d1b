"""The hosts of a TPU: code onto them, a run on all of them, what became of it.

Each worker is spoken to alone, some at a time: so every answer, error and retry
belongs to one of them, which `--worker=all` does not give.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shlex
from collections.abc import Callable
from typing import NamedTuple

from tpu.errors import LaunchError
from tpu.gcloud import Gcloud
from tpu.slices import Tpu

_SCRIPT = "hourjax/code/launch/tpu/worker.sh"
_TARBALL = "hourjax-code.tar.gz"
_MARK = "hourjax-state: "
_ENV = "hourjax-env"


class Worker(NamedTuple):
  """One host: a slice's node, and the host's number in it."""

  node: str
  index: int

  def __str__(self) -> str:
    return f"{self.node}:{self.index}"


class Job(NamedTuple):
  """What every worker shall run.

  Attributes:
    env_file: local file of lines KEY=VALUE for its environment, "" for none.
    prepare: a shell's line before it, "" for none; has to bear repetition.
  """

  command: list[str]
  env_file: str = ""
  prepare: str = ""


class State(NamedTuple):
  """What a worker does.

  Attributes:
    what: absent (not set up), none, running, ended or lost (died silently).
    run: id of its newest run, "" if it had none.
    code: exit status once it ended.
    note: "stopped" by `stop`, "signalled" by a machine that shut down, or "".
  """

  what: str
  run: str = ""
  code: int = 0
  note: str = ""


def parse_state(text: str) -> State:
  """Reads the line of worker.sh's `state`, wherever it stands.

  Raises:
    LaunchError: if there is none.
  """
  for line in text.splitlines():
    if line.startswith(_MARK):
      what, *rest = line[len(_MARK) :].split()
      run = rest[0] if rest else ""
      code = int(rest[1]) if what == "ended" else 0
      return State(what, run, code, rest[2] if len(rest) > 2 else "")
  raise LaunchError(f"a worker answered {text.strip()!r}; run `setup` again")


class Workers:
  """All hosts of a TPU."""

  def __init__(self, gcloud: Gcloud, tpu: Tpu, parallel: int):
    self.all = [
      Worker(piece.node, index)
      for piece in tpu.slices
      for index in range(piece.workers)
    ]
    self._gcloud, self._parallel = gcloud, parallel

  def setup(self, tarball: str) -> None:
    """Code and .venv onto every worker.

    Raises:
      LaunchError: if it fails on one, or one is training.
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

    # The first connection of all may have to make and register an ssh key,
    # which several at a time would do against each other.
    self._gcloud.say(f"setting up {self.all[0]}, some minutes the first time")
    one(self.all[0])
    if self.all[1:]:
      self._gcloud.say(f"setting up the other {len(self.all) - 1} workers")
      self.each(one, self.all[1:])

  def states(self) -> dict[Worker, State]:
    """What every worker does."""
    command = (
      f"if [ -e {_SCRIPT} ]; then bash {_SCRIPT} state;"
      f" else echo {_MARK}absent; fi"
    )
    return self._answers(command)

  def start(self, run: str, job: Job) -> None:
    """Starts a job on every worker, detached, under the name of a run.

    Raises:
      LaunchError: if a worker is not set up or runs already; then none is
        left running.
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
      with contextlib.suppress(LaunchError):  # the first error counts
        states = self.states()
        mine = [x for x in self.all if states[x] == State("running", run)]
        self._answers(f"bash {_SCRIPT} stop 20 kill", mine)
      raise

  def stop(self, seconds: int, kill: bool) -> dict[Worker, State]:
    """SIGTERM to every run; waits for their end, at most so many seconds."""
    force = " kill" if kill else ""
    return self._answers(f"bash {_SCRIPT} stop {seconds}{force}", self.all)

  def logs(self, folder: str) -> list[str]:
    """Writes each worker's log into a folder; their paths."""

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
    """The last lines of a worker's log."""
    text = self._ssh(worker, f"bash {_SCRIPT} log 1 | tail -n {lines}")
    return text.rstrip()

  def follow_command(self, worker: Worker, line: int) -> list[str]:
    """The command that prints a worker's log from a line on until it ends."""
    command = f"bash {_SCRIPT} follow {line}"
    return self._gcloud.ssh_command(worker.node, worker.index, command)

  def each(self, function: Callable, workers=None) -> dict:
    """function(worker) for every worker, some at a time.

    Raises:
      LaunchError: after all have ended, the first one's error; its message
        says how many failed.
    """
    workers = self.all if workers is None else workers
    if self._gcloud.dry_run:  # in order
      return {worker: function(worker) for worker in workers}
    pool = concurrent.futures.ThreadPoolExecutor(self._parallel)
    with pool:
      futures = {worker: pool.submit(function, worker) for worker in workers}
    failed = [x.exception() for x in futures.values() if x.exception()]
    for error in failed:
      if not isinstance(error, LaunchError):
        raise error
    if failed:
      first = failed[0]
      message = str(first)
      if len(workers) > 1:
        message = f"{len(failed)} of {len(workers)} workers failed: {first}"
      raise LaunchError(message, kind=first.kind, line=first.line)
    return {worker: future.result() for worker, future in futures.items()}

  def _answers(self, command, workers=None) -> dict[Worker, State]:
    def one(worker: Worker) -> State:
      text = self._ssh(worker, command)
      return State("none") if self._gcloud.dry_run else parse_state(text)

    return self.each(one, workers)

  def _ssh(self, worker: Worker, command: str) -> str:
    return self._gcloud.ssh(worker.node, worker.index, command)


def _here(name: str) -> str:
  return os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
