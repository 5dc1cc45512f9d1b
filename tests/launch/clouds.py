"""A fake cloud and a checkout, for tests of launch/tpu_vm.py."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
# Times that a person would wait, cut short.
QUICK = ("--poll_seconds=0.2", "--retry_seconds=0.02")
PYTHON = f"exec {shlex.quote(sys.executable)} -I -S -u"


def make_checkout(folder: pathlib.Path) -> pathlib.Path:
  """A small repository with the launch scripts and files of each kind."""
  shutil.copytree(ROOT / "launch", folder / "launch",
                  ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
  (folder / "requirements.txt").write_text("jax==0.0.0\n")
  (folder / ".gitignore").write_text("work/\n__pycache__/\nignored.bin\n")
  (folder / "deleted.txt").write_text("tracked, then deleted\n")
  git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(folder)]
  for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
    subprocess.run([*git, *arguments], check=True)
  (folder / "deleted.txt").unlink()
  (folder / "new file.txt").write_text("not tracked, not ignored\n")
  (folder / "ignored.bin").write_text("ignored\n")
  return folder


class Cloud:
  """The fake, and the commands under test.

  Attributes:
    root: its folder; `mount/` below it is the shared disk.
  """

  def __init__(self, root: pathlib.Path, checkout: pathlib.Path):
    self.root, self._checkout = root, checkout
    (root / "bin").mkdir(parents=True)
    for path, script in (
      (root / "bin" / "gcloud", HERE / "fake_gcloud.py"),
      (root / "python", HERE / "stand_in.py"),
    ):
      path.write_text(f'#!/bin/sh\n{PYTHON} {shlex.quote(str(script))} "$@"\n')
      path.chmod(0o755)
    (root / "cloud.json").write_text(json.dumps({
      "requests": {}, "nodes": {}, "futures": [], "errors": [], "workers": 1,
      "why": "",
    }))  # fmt: skip
    self._environment = {
      **os.environ,
      "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
      "FAKE_CLOUD": str(root),
      "FAKE_PATH": os.environ["PATH"],
    }

  @contextlib.contextmanager
  def change(self):
    """What there is and what is to happen, to be changed."""
    with open(self.root / "lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      path = self.root / "cloud.json"
      state = json.loads(path.read_text())
      yield state
      path.write_text(json.dumps(state))

  def plays(self, **changes) -> None:
    """Sets what the cloud does next."""
    with self.change() as state:
      state.update(changes)

  def exists(self) -> "tuple[list[str], list[str]]":
    """Names of the requests and of the nodes there are."""
    with self.change() as state:
      return sorted(state["requests"]), sorted(state["nodes"])

  def fails(self, command: str, text: str, times: int = 1, **more) -> None:
    """Lets a gcloud command fail so many times."""
    error = {"command": command, "text": text, "times": times, **more}
    with self.change() as state:
      state["errors"].append(error)

  def loses(self, times: int, **more) -> None:
    """Loses ssh connections."""
    text = "[/usr/bin/ssh] exited with return code [255]."
    self.fails("tpu-vm.ssh", text, times, code=255, **more)

  def command(self, verb: str, *arguments: str) -> "list[str]":
    """The command line of launch/tpu_vm.py for a TPU named hour."""
    script = str(self._checkout / "launch" / "tpu_vm.py")
    where = ["--name=hour", "--zone=us-west4-a"]
    return [sys.executable, script, verb, *where, *QUICK, *arguments]

  def __call__(self, verb: str, *arguments: str, code: int = 0):
    """Runs launch/tpu_vm.py to its end; expects an exit status."""
    done = subprocess.run(
      self.command(verb, *arguments), env=self._environment, text=True,
      capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done

  def begin(self, verb: str, *arguments: str) -> subprocess.Popen:
    """Runs it beside the test; its output in out.txt."""
    with open(self.root / "out.txt", "w") as file:
      return subprocess.Popen(
        self.command(verb, *arguments), env=self._environment, stdout=file,
        stderr=subprocess.STDOUT, text=True,
      )  # fmt: skip

  def output(self) -> str:
    """Of what `begin` began, so far."""
    return (self.root / "out.txt").read_text()

  def shell(self, text: str) -> None:
    """Runs lines in a shell, as one would that pastes them.

    Some only look, and fail where there is nothing.
    """
    subprocess.run(["bash", "-uc", text], env=self._environment, check=False)

  def hide_gcloud(self) -> None:
    """Leaves nothing on the PATH."""
    self._environment["PATH"] = str(self.root / "empty")

  def calls(self, *, all_of_them: bool = False) -> "list[str]":
    """gcloud's command lines so far, in short, see `_short`.

    Those that only look are left out unless all are asked for.
    """
    path = self.root / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return _short([json.loads(line) for line in lines], all_of_them)

  def short(self, text: str) -> "list[str]":
    """The same of what a dry run prints."""
    commands = [shlex.split(line) for line in text.splitlines()]
    return _short([x for x in commands if x[0] == "gcloud"], False)

  def forget(self) -> None:
    """Forgets the calls so far."""
    (self.root / "calls.jsonl").unlink()

  def home(self, node: str = "hour", worker: int = 0) -> pathlib.Path:
    """A worker's home."""
    return self.root / "workers" / node / str(worker)

  def log(self, node: str = "hour", worker: int = 0) -> str:
    """The newest log of a worker."""
    run = self.home(node, worker) / "hourjax" / "run" / "id"
    path = run.parents[1] / "logs" / f"{run.read_text().strip()}.log"
    return path.read_text()

  def storage(self, name: str) -> pathlib.Path:
    """A file of the run's workdir /mnt/hour/run."""
    folder = self.root / "mount" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name

  def preempt(self, node: str, *, warn: bool, vanish: bool = True) -> None:
    """Takes a node away: SIGTERM some time before if it warns, then SIGKILL.

    The cloud says so at once, or if it does not vanish, never.
    """
    groups = self._groups(node)
    if vanish:
      self.gone(node)
    for number in (*((signal.SIGTERM,) if warn else ()), signal.SIGKILL):
      _signal(groups, number)
      until(lambda: not any(_lives(group) for group in groups))

  def gone(self, node: str, state: str = "PREEMPTED") -> None:
    """The cloud says that a node was taken away."""
    with self.change() as now:
      now["nodes"][node]["state"] = state

  def close(self) -> None:
    """Ends whatever still runs on workers."""
    _signal(self._groups("*"), signal.SIGKILL)

  def _groups(self, node: str) -> "list[int]":
    paths = self.root.glob(f"workers/{node}/*/hourjax/run/group")
    return [int(path.read_text() or 0) for path in paths]


def _signal(groups, number) -> None:
  for group in groups:
    if group and _lives(group):
      with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _short(calls, all_of_them):
  """Command lines without the options that are the same everywhere."""
  same = re.compile(r"--(zone|quiet|ssh-flag|scp-flag)")
  texts = [" ".join(x for x in call if not same.match(x)) for call in calls]
  if all_of_them:
    return texts
  looks = (" describe ", "worker.sh state")
  return [x for x in texts if not any(look in x for look in looks)]


def _lives(group: int) -> bool:
  """Whether a process of the group is alive; nobody may reap the dead here."""
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      state, _, number = path.read_text().rpartition(")")[2].split()[:3]
      if int(number) == group and state not in "ZX":
        return True
  return False


def until(true, seconds: float = 90) -> None:
  """Waits until something is true."""
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.02)
