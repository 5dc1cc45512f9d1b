"""launch/tpu/worker.sh alone, in a home of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.clouds import ROOT, until

SLEEP = ("sleep", "60")


class Home:
  """A worker's home, set up but for .venv."""

  def __init__(self, path):
    self.path, self.run = path, path / "hourjax" / "run"
    shutil.copytree(ROOT / "launch", path / "hourjax/code/launch")
    (path / "hourjax/ready").touch()

  def begin(self, *arguments, **environment):
    return subprocess.Popen(
      ["bash", self.path / "hourjax/code/launch/tpu/worker.sh", *arguments],
      env={**os.environ, "HOME": str(self.path), **environment},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

  def __call__(self, *arguments, code=0, **environment):
    process = self.begin(*arguments, **environment)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    return (out + error).strip().replace("hourjax-state: ", "")

  def group(self):
    return int((self.run / "group").read_text())


@pytest.fixture
def home(tmp_path):
  home = Home(tmp_path)
  yield home
  home("stop", "0", "kill")


def test_states(home):
  assert home("state") == "none"
  running = home("start", "a", *SLEEP)
  assert running == f"running a {(home.run / 'pid').read_text().strip()}"
  assert home("state") == running
  assert home("start", "a", "false") == running  # asked twice, started once
  assert home("start", "b", *SLEEP, code=75) == "worker: a runs here already"
  assert home("install", code=75) == (
    "worker: a runs here; stop it before setup"
  )
  assert home("state") == running
  assert home("stop", "10") == "ended a 143 stopped"
  home("start", "b", "sh", "-c", "echo words; exit 9")
  until(lambda: home("state") == "ended b 9")
  assert home("log", "1") == home("follow", "1") == "words"
  (home.path / "hourjax/ready").unlink()
  assert home("state") == "absent"
  assert home("start", "c", *SLEEP, code=3) == "worker: not set up"


@pytest.mark.slow
def test_only_one_of_many_starts(home):
  starts = [home.begin("start", f"r{i}", *SLEEP) for i in range(6)]
  answers = [process.communicate()[0] for process in starts]
  codes = [process.returncode for process in starts]
  assert sorted(codes) == [0] + [75] * 5
  assert answers[codes.index(0)].strip() == f"hourjax-state: {home('state')}"


@pytest.mark.slow
def test_dead_is_dead_though_its_number_lives(home):
  home("start", "a", *SLEEP)
  os.killpg(home.group(), signal.SIGKILL)
  with subprocess.Popen(SLEEP) as other:
    (home.run / "pid").write_text(f"{other.pid}\n")
    until(lambda: home("state") == "lost a")
    assert home("stop", "5") == "lost a"
    assert other.poll() is None  # nobody is signalled
    other.kill()


@pytest.mark.slow
def test_survives_the_death_of_its_watcher(home):
  home("start", "a", *SLEEP)
  os.kill(home.group(), signal.SIGKILL)
  time.sleep(0.2)
  assert home("state").startswith("running a ")
  assert home("stop", "10") == "lost a"


@pytest.mark.slow
def test_machine_that_shuts_down(home):
  """Everything is signalled: how the run ended is kept, and why."""
  script = "trap 'sleep 0.3; exit 5' TERM; while :; do sleep 0.05; done"
  home("start", "a", "bash", "-c", script)
  time.sleep(0.2)
  os.killpg(home.group(), signal.SIGTERM)
  until(lambda: home("state") == "ended a 5 signalled")


@pytest.mark.slow
def test_variables_from_a_file(home, tmp_path):
  file = tmp_path / "variables"
  file.write_text("# a comment\n\nONE=1 $HOME\nTWO=a=b")
  text = home("with", str(file), "sh", "-c", 'echo "$ONE|$TWO"')
  assert text == "1 $HOME|a=b"


@pytest.mark.slow
def test_brings_a_python_where_there_is_none(home, tmp_path):
  """The images of TPU VMs have 3.10: uv from PyPI fetches one."""
  tools, asked = tmp_path / "bin", tmp_path / "asked"
  tools.mkdir()
  scripts = {
    "old": "exit 1",
    # Makes .venv, and is the python in it.
    "new": f"""echo new "$@" >>{asked}
      case "$1 $2" in "-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python
      esac""",
    # pip brings uv, which brings `new`.
    "python3": f"""echo python3 "$@" >>{asked}
      mkdir -p "$HOME/hourjax/uv/bin"
      cp {tools}/uv "$HOME/hourjax/uv/bin/uv" """,
    "uv": f"""echo uv "$@" >>{asked}
      if [ "$2" = find ]; then echo {tools}/new; fi""",
  }
  for name, script in scripts.items():
    (tools / name).write_text(f"#!/bin/sh\n{script}\n")
    (tools / name).chmod(0o755)
  code = home.path / "hourjax/code"
  (code / "requirements.txt").write_text("jax==0.0.0\n")
  code.rename(home.path / "hourjax/next")
  shutil.copytree(home.path / "hourjax/next/launch", code / "launch")
  path = f"{tools}:{os.environ['PATH']}"
  home("install", PATH=path, PYTHON=str(tools / "old"))
  lines = asked.read_text().splitlines()
  uv = f"{home.path}/hourjax/uv"
  assert lines[0].startswith(
    f"python3 -m pip install --quiet --upgrade --target {uv} uv=="
  )
  assert lines[1:3] == ["uv python install --quiet 3.11", "uv python find 3.11"]
  assert lines[-1].startswith("new -m pip install ")
  assert lines[-1].endswith(" -r requirements.txt")
  assert home("state") == "none"


@pytest.mark.slow
def test_python_of_this_machine_is_taken(home):
  (home.path / "hourjax/code/requirements.txt").write_text("")
  code = home.path / "hourjax/code"
  code.rename(home.path / "hourjax/next")
  shutil.copytree(home.path / "hourjax/next/launch", code / "launch")
  home("install", PYTHON=sys.executable)
  config = (code / ".venv/pyvenv.cfg").read_text()
  assert "version = 3." in config
  assert not (home.path / "hourjax/uv").exists()
