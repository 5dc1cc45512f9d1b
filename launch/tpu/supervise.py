"""Supervision of a training run: started again after each preemption."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from tpu import slices
from tpu.errors import LaunchError
from tpu.gcloud import Gcloud
from tpu.training import job_of, run_id
from tpu.workers import Job, State, Worker, Workers

_TAIL = 20  # lines of a failed worker's log that are shown
_UNANSWERED = 20  # failed looks in a row after which it gives up
# Errors that may be gone at the next look. "missing": preempted meanwhile.
_PASSING = ("lost", "missing", "passing")
_HEALTHY = 3600  # seconds of training after which failures are forgotten
# Exit status of a mistake in the options, which a restart would not mend.
_USER_ERROR = 2


class Patience(NamedTuple):
  """Holds waiting times in seconds and the number of restarts.

  Attributes:
    poll: time between two looks.
    grace: time for which an end must stay unchanged: a preempted run also ends
      with status 0, and the machine's state shows the preemption only later.
    restarts: largest number of restarts after failures.
  """

  poll: float = 60
  grace: float = 120
  restarts: int = 3


def verdict(states: dict[Worker, State], job: str) -> str:
  """Summarises the states of all workers for one job.

  Args:
    states: of all workers.
    job: short name of the job's command line, see `training.job_of`.

  Returns:
    "absent" (some are not set up), "other" (another job runs), "none",
    "running" (all of one run), "done", "stopped", "failed" (one ended badly or
    died), or "mixed" (some have ended well, or were never started).
  """
  values = list(states.values())
  mine = [x for x in values if x.run.startswith(job)]
  if any(x.what == "running" and x not in mine for x in values):
    return "other"
  if any(x.what == "absent" for x in values):
    return "absent"
  if not mine:
    return "none"
  if any(x.note == "stopped" for x in mine):
    return "stopped"
  if any(x.what == "lost" or (x.what == "ended" and x.code) for x in mine):
    return "failed"
  if len(mine) < len(values) or len({x.run for x in mine}) > 1:
    return "mixed"
  if all(x.what == "running" for x in mine):
    return "running"
  if any(x.what == "running" for x in mine):
    return "mixed"
  return "failed" if any(x.note == "signalled" for x in mine) else "done"


class Supervisor:
  """Runs one training on as many TPUs, one after another, as it takes."""

  def __init__(
    self,
    gcloud: Gcloud,
    order: slices.Order,
    patience: Patience,
    *,
    workers: Callable[[slices.Tpu], Workers],
    tarball: str,
    job: Job,
  ):
    self._gcloud, self._order, self._patience = gcloud, order, patience
    self._workers, self._tarball = workers, tarball
    self._job, self._name = job, job_of(job.command)
    self._failed = self._refused = self._unanswered = 0
    self._began = time.monotonic()  # start of the newest run, as far as known
    self._started = False  # by this process; ends of earlier runs do not count
    # The last ending that was seen, and since when.
    self._seen: tuple[str, tuple[State, ...]] | None = None
    self._since = 0.0
    self._said: str | None = None

  def run(self) -> int:
    """Supervises until the training is done or has failed for good.

    Returns:
      Exit status: 0 if it is done or was stopped, 1 if it failed too often.

    Raises:
      LaunchError: no TPU can be had, or the workers do not answer any more.
    """
    if self._gcloud.dry_run:
      return self._dry_run()
    while True:
      try:
        status = self._step()
        self._unanswered = 0
      except LaunchError as error:
        self._unanswered += error.kind in _PASSING
        passing = error.kind in (*_PASSING, "capacity")
        if not passing or self._unanswered > _UNANSWERED:
          raise
        self._say(f"{error}; looking again")
        status = None
      if status is not None:
        return status
      time.sleep(self._patience.poll)

  def _dry_run(self) -> int:
    """Prints the commands of one start."""
    slices.create(self._gcloud, self._order)
    tpu = slices.wait(self._gcloud, self._order, 0)
    workers = self._workers(tpu)
    workers.setup(self._tarball)
    workers.start(run_id(self._job.command), self._job)
    workers.states()
    return 0

  def _step(self) -> int | None:
    """Looks once and acts; returns the exit status when it is over."""
    tpu = slices.look(self._gcloud, self._order.name)
    phase = tpu.phase if tpu else "none"
    if tpu is None or phase in ("gone", "failed"):
      self._ask_again(tpu, phase)
      return None
    if phase == "waiting":
      self._say(f"{self._order.name}: {tpu.state}")
      return None
    self._refused = 0
    workers = self._workers(tpu)
    states = workers.states()
    what = verdict(states, self._name)
    if what == "other":
      names = {x.run for x in states.values() if x.what == "running"}
      raise LaunchError(
        f"another training ({', '.join(sorted(names))}) runs on"
        f" {self._order.name}; `stop` it first, or take another --name"
      )
    if what == "running":
      self._started = True
      self._seen = None
      self._say(f"training on {len(states)} workers")
      return None
    if what in ("absent", "none"):
      self._start(workers, what)
      return None
    return self._ended(workers, states, what)

  def _ask_again(self, tpu: slices.Tpu | None, phase: str) -> None:
    """Requests a TPU, after a failed request only a few times."""
    if tpu is not None and phase == "failed":
      self._refused += 1
      if self._refused > self._patience.restarts:
        raise LaunchError(slices.refusal(self._order.name, tpu))
      self._gcloud.say(f"the request failed ({tpu.why}); asking again")
    elif phase == "gone":
      self._gcloud.say(f"{self._order.name} was taken away; asking for another")
    self._seen = None
    slices.create(self._gcloud, self._order)

  def _start(self, workers: Workers, what: str) -> None:
    """Sets workers up if they are "absent", and starts the job on them."""
    run = run_id(self._job.command)
    try:
      if what == "absent":
        workers.setup(self._tarball)
      workers.start(run, self._job)
    except LaunchError as error:
      self._failed += error.kind == "other"
      if error.kind != "other" or self._failed > self._patience.restarts:
        raise
      self._gcloud.say(f"{error}; trying again")
      return
    self._gcloud.say(f"started {run} on {len(workers.all)} workers")
    self._began = time.monotonic()
    self._started, self._seen, self._said = True, None, None

  def _ended(
    self, workers: Workers, states: dict[Worker, State], what: str
  ) -> int | None:
    """Acts on an end that has stayed unchanged for the time of grace."""
    if what in ("stopped", "failed", "mixed") and not self._started:
      # The end of an earlier command's run.
      self._stop_rest(workers, states)
      self._start(workers, "none")
      return None
    seen = (what, tuple(states.values()))
    now = time.monotonic()
    if seen != self._seen:
      self._seen, self._since = seen, now
      self._say(f"training {what}; waiting to see whether the machines stay")
    if now - self._since < self._patience.grace:
      return None
    if what == "done":
      self._gcloud.say(
        "training is done on all workers; `delete` ends the bill"
      )
      return 0
    if what == "stopped":
      self._gcloud.say(
        "training was stopped; the same command takes it up again"
      )
      return 0
    if all(x.what == "ended" and not x.code for x in states.values()):
      self._gcloud.say("a machine shut down beneath the training; starting it")
      self._start(workers, "none")
      return None
    if now - self._began > _HEALTHY:
      self._failed = 0
    self._failed += 1
    self._show(workers, states)
    final = any(x.code == _USER_ERROR for x in states.values())
    self._stop_rest(workers, states)
    if final or self._failed > self._patience.restarts:
      self._gcloud.say(
        f"training failed {self._failed} times; `logs` brings all of it"
      )
      return 1
    self._gcloud.say(f"restart {self._failed} of {self._patience.restarts}")
    self._start(workers, "none")
    return None

  def _stop_rest(self, workers: Workers, states: dict[Worker, State]) -> None:
    """Stops the processes that would wait for a dead one forever."""
    if any(x.what == "running" for x in states.values()):
      workers.stop(60, kill=True)

  def _show(self, workers: Workers, states: dict[Worker, State]) -> None:
    """Prints the last lines of a failed worker's log."""
    bad = [
      worker
      for worker, state in states.items()
      if state.what == "lost" or state.code
    ]
    for worker in (bad or list(states))[:1]:
      state = states[worker]
      code = f" with {state.code}" if state.what == "ended" else ""
      self._gcloud.say(f"{worker} {state.what}{code}; its last lines:")
      print(workers.tail(worker, _TAIL), flush=True)

  def _say(self, text: str) -> None:
    """Prints a message once, not at every look."""
    if text != self._said:
      self._gcloud.say(text)
    self._said = text
