#!/usr/bin/env python3
"""Trains on Cloud TPU, from any machine with Python 3.9 and gcloud.

  python3 launch/tpu_vm.py create --name=hour --zone=us-west4-a \
      --accelerator=v5litepod-256 --queued --spot
  python3 launch/tpu_vm.py setup --name=hour --zone=us-west4-a
  python3 launch/tpu_vm.py run --name=hour --zone=us-west4-a \
      --shared_path=/mnt/hour -- \
      --config=configs/hourllava.py:size=3b,stage=3 \
      --workdir=/mnt/hour/stage3
  python3 launch/tpu_vm.py status|logs|stop|delete --name=hour \
      --zone=us-west4-a

`run --until_done`, with the options of `create`, does all of it: it creates,
sets up and starts, again after each preemption, until the training is done.
Options after -- are the trainer's. --dry_run prints every command, ready for a
shell, and runs none.

Exit status: 0; 1 if the training failed for good; 2 on a mistake, or where
Google refuses; 130 on interrupt, after which the training itself goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys

from tpu import accelerators, following, slices, training
from tpu.errors import LaunchError
from tpu.gcloud import Gcloud
from tpu.options import Parser, at_least
from tpu.supervise import Patience, Supervisor
from tpu.workers import Job, Workers

_EXAMPLES = {"zone": "us-west4-a", "project": "my-project"}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parser() -> argparse.ArgumentParser:
  """Returns the parser of all options before "--"."""
  common = Parser(add_help=False)
  add = common.add_argument
  add("--name", required=True, help="of the TPU")
  add("--zone", required=True)
  add("--project", help="gcloud's current one if left out")
  add(
    "--accelerator", metavar="TYPE", help="e.g. v5litepod-256, v5p-128, v6e-64"
  )
  add(
    "--num_slices",
    type=int,
    default=1,
    help="more than 1 implies --queued",
  )
  add("--queued", action="store_true", help="wait in line for a TPU; after"
      " `create` only --dry_run asks for it")  # fmt: skip
  add("--dry_run", action="store_true", help="print commands, run none")
  add("--iap", action="store_true", help="connect through Google's tunnel")
  add("--internal_ip", action="store_true", help="connect within the network")
  add(
    "--parallel",
    type=at_least(int, 1),
    default=16,
    help="connections at a time",
  )
  add(
    "--attempts",
    type=at_least(int, 1),
    default=4,
    help="to connect",
  )
  add(
    "--retry_seconds",
    type=at_least(float, 0),
    default=10,
    help="doubled each time",
  )
  add(
    "--poll_seconds",
    type=at_least(float, 0),
    default=60,
    help="between two checks of the state",
  )

  order = Parser(add_help=False)
  add = order.add_argument
  add("--spot", action="store_true", help="cheaper, may be taken away")
  add("--reserved", action="store_true", help="from a reservation")
  add("--runtime_version", help="instead of the one for the type")
  add("--create_flag", action="append", default=[], metavar="FLAG",
      help="for gcloud's create: --create_flag=--network=vpc")  # fmt: skip

  root = Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  verbs = root.add_subparsers(dest="verb", required=True)
  add = verbs.add_parser("create", parents=[common, order]).add_argument
  add("--no_wait", action="store_true", help="leave once it is asked for")
  verbs.add_parser("setup", parents=[common])
  add = verbs.add_parser("run", parents=[common, order]).add_argument
  add("--until_done", action="store_true", help="restart after preemptions")
  add(
    "--restarts",
    type=at_least(int, 0),
    default=3,
    help="after failures",
  )
  add(
    "--grace_seconds",
    type=at_least(float, 0),
    default=120,
    help="before an end is taken as final",
  )
  add("--env", action="append", default=[], metavar="KEY=VALUE")
  add("--env_file", default="", help="lines KEY=VALUE, for what is secret")
  add("--prepare", default="", metavar="COMMAND", help="shell command on"
      " each worker before each start; must be repeatable")  # fmt: skip
  add("--shared_path", default="", help="a mount that all workers share")
  verbs.add_parser("status", parents=[common])
  add = verbs.add_parser("logs", parents=[common]).add_argument
  add("--follow", action="store_true", help="print them as they grow")
  add("--out", help="folder (work/tpu/NAME)")
  add = verbs.add_parser("stop", parents=[common]).add_argument
  add(
    "--seconds",
    type=at_least(int, 0),
    default=600,
    help="to wait for the checkpoint",
  )
  add("--kill", action="store_true", help="SIGKILL after that")
  verbs.add_parser("delete", parents=[common])
  return root


def order_of(flags: argparse.Namespace) -> slices.Order | None:
  """Returns the TPU that the options describe, None without --accelerator.

  Raises:
    LaunchError: the options need a type, or have an invalid value.
  """
  if not flags.accelerator:
    if flags.verb == "create" or getattr(flags, "until_done", False):
      raise LaunchError("give --accelerator, e.g. --accelerator=v5litepod-16")
    return None
  if flags.num_slices < 1:
    raise LaunchError(f"--num_slices={flags.num_slices}: at least 1")
  accelerator = accelerators.parse(flags.accelerator)
  if getattr(flags, "runtime_version", None):
    accelerator = accelerator._replace(runtime=flags.runtime_version)
  many = flags.num_slices > 1 or getattr(flags, "until_done", False)
  return slices.Order(
    flags.name,
    accelerator,
    flags.num_slices,
    queued=many or flags.queued,
    spot=getattr(flags, "spot", False),
    reserved=getattr(flags, "reserved", False),
    flags=tuple(getattr(flags, "create_flag", ())),
  )


class Commands:
  """Runs the verbs: one method each, which returns the exit status."""

  def __init__(self, flags: argparse.Namespace, arguments: list[str]):
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", flags.name):
      raise LaunchError(
        f"--name={flags.name}: lower-case letters, digits and -, at most 50"
      )
    for name in ("zone", "project"):
      value = getattr(flags, name)
      if value is not None and not re.fullmatch(r"[A-Za-z0-9][-\w:.]*", value):
        raise LaunchError(
          f"--{name}={value}: "
          + ("it is empty" if not value else "no such name is possible")
          + f"; give a name such as {_EXAMPLES[name]}"
        )
    self.flags, self.arguments = flags, arguments
    self.order = order_of(flags)
    self.folder = os.path.join(ROOT, "work", "tpu", flags.name)
    self.tarball = os.path.join(self.folder, "code.tar.gz")
    self.gcloud = Gcloud(
      zone=flags.zone, project=flags.project, dry_run=flags.dry_run,
      attempts=flags.attempts, retry_seconds=flags.retry_seconds,
      iap=flags.iap, internal_ip=flags.internal_ip,
    )  # fmt: skip

  def create(self) -> int:
    """Requests a TPU and waits until it is ready."""
    assert self.order is not None  # `order_of` refuses `create` without a type
    slices.create(self.gcloud, self.order)
    if not self.flags.no_wait:
      slices.wait(self.gcloud, self.order, self.flags.poll_seconds)
    return 0

  def setup(self) -> int:
    """Installs this checkout on all workers."""
    self._workers().setup(self.tarball)
    return 0

  def run(self) -> int:
    """Starts the trainer on all workers; with --until_done, supervises it."""
    flags = self.flags
    command = training.train_command(self.arguments, flags.env)
    job = Job(command, flags.env_file, flags.prepare)
    if flags.env_file:
      training.check_env_file(flags.env_file)

    def check(workers: int) -> None:
      training.check_workdir(
        self.arguments, workers=workers, until_done=flags.until_done,
        shared=flags.shared_path,
      )  # fmt: skip

    check(1)  # before anything is created or contacted
    if flags.until_done:
      assert self.order is not None  # `order_of` refuses it without a type
      patience = Patience(
        flags.poll_seconds, flags.grace_seconds, flags.restarts
      )
      return Supervisor(
        self.gcloud, self.order, patience,
        workers=lambda tpu: Workers(self.gcloud, tpu, flags.parallel),
        tarball=self.tarball, job=job,
      ).run()  # fmt: skip
    workers = self._workers()
    check(len(workers.all))
    self._free(workers)
    run = training.run_id(command)
    workers.start(run, job)
    self.gcloud.say(
      f"started {run} on {len(workers.all)} workers; `logs --follow` watches"
    )
    return 0

  def status(self) -> int:
    """Prints the states of the TPU and of its workers."""
    tpu = slices.find(self.gcloud, self.order, self.flags.name)
    states = {}
    if tpu.phase == "ready":
      states = Workers(self.gcloud, tpu, self.flags.parallel).states()
    if self.flags.dry_run:
      return 0
    why = f" ({tpu.why})" if tpu.why else ""
    print(f"{self.flags.name}: {tpu.type}, {tpu.state}{why}")
    for piece in tpu.slices:
      print(f"  {piece.node}: {piece.state}, {piece.workers} workers")
      for worker, state in states.items():
        if worker.node == piece.node:
          code = f" with {state.code}" if state.what == "ended" else ""
          words = f"{state.what}{code} {state.note}".strip()
          print(f"    {worker.index}: {words} {state.run}".rstrip())
    return 0

  def logs(self) -> int:
    """Fetches the logs of all workers, or follows them."""
    workers = self._workers()
    if self.flags.follow:
      return following.follow(workers, self.gcloud, self.flags.retry_seconds)
    paths = workers.logs(self.flags.out or self.folder)
    if not self.flags.dry_run:
      print("\n".join(paths))
    return 0

  def stop(self) -> int:
    """Stops the run on all workers, after a checkpoint."""
    workers = self._workers()
    states = workers.stop(self.flags.seconds, self.flags.kill)
    left = [worker for worker, x in states.items() if x.what == "running"]
    for worker, state in states.items():
      code = f" with {state.code}" if state.what == "ended" else ""
      self.gcloud.say(f"{worker}: {state.what}{code}")
    if left:
      raise LaunchError(
        f"{len(left)} of {len(states)} workers still run after"
        f" {self.flags.seconds} s ({left[0]}); give --seconds more, or --kill"
        " and lose the steps since the last checkpoint"
      )
    return 0

  def delete(self) -> int:
    """Deletes the TPU."""
    name = self.flags.name
    if self.flags.dry_run:
      tpu = slices.find(self.gcloud, self.order, name)
    else:
      tpu = slices.look(self.gcloud, name)
    if tpu is None:
      self.gcloud.say(
        f"there is no TPU {name} in {self.flags.zone}: nothing to delete"
      )
      return 0
    slices.delete(self.gcloud, name, tpu)
    self.gcloud.say(f"{name} is deleted")
    return 0

  def _workers(self) -> Workers:
    """Returns the workers of a TPU that is ready."""
    tpu = slices.find(self.gcloud, self.order, self.flags.name)
    if tpu.phase == "waiting":
      raise LaunchError(
        f"{self.flags.name} is {tpu.state}; `create` waits until it is ready"
      )
    if tpu.phase != "ready":
      raise LaunchError(slices.refusal(self.flags.name, tpu))
    return Workers(self.gcloud, tpu, self.flags.parallel)

  def _free(self, workers: Workers) -> None:
    """Refuses to start beside another run, or before `setup`."""
    states = workers.states()
    running = {x.run for x in states.values() if x.what == "running"}
    if running:
      raise LaunchError(
        f"{', '.join(sorted(running))} runs already; watch it with `logs"
        " --follow`, or `stop` it first"
      )
    absent = [worker for worker, x in states.items() if x.what == "absent"]
    if absent:
      raise LaunchError(
        f"{len(absent)} of {len(states)} workers are not set up ({absent[0]});"
        " run `setup` first"
      )


def main(argv: list[str]) -> int:
  """Runs a command line; returns the exit status."""
  cut = argv.index("--") if "--" in argv else len(argv)
  flags, arguments = parser().parse_args(argv[:cut]), argv[cut + 1 :]
  for number in (signal.SIGTERM, signal.SIGHUP):
    # Exit in the normal way, which ends what was started here; a signal that
    # nohup ignores stays ignored.
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, lambda number, _: sys.exit(128 + number))
  try:
    if arguments and flags.verb != "run":
      raise LaunchError(f"`{flags.verb}` takes nothing after --")
    return getattr(Commands(flags, arguments), flags.verb)()
  except LaunchError as error:
    print(f"error: {error}", file=sys.stderr)
    if error.line:
      print(f"  gcloud: {error.line}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted; what runs on the TPU goes on", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
