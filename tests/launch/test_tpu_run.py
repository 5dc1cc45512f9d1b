"""A training on the fake cloud's workers, where the shell is real."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.launch.clouds import until

TRAIN = (
  "--shared_path=/mnt/hour",
  "--",
  "--config=configs/hourllava.py:size=3b,stage=3",
  "--config.data.weights=ego4d=2,short=0.5",
  "--config.name=it's $HOME",
  "--workdir=/mnt/hour/run",
)
INSTALL = (
  "--command=rm -rf hourjax/next && mkdir -p hourjax/next && tar -xzf"
  " hourjax-code.tar.gz -C hourjax/next && bash"
  " hourjax/next/launch/tpu/worker.sh install"
)


MANY = [(f"hour-{i}", j) for i in range(2) for j in range(2)]
PAIR = [("hour", 0), ("hour", 1)]


@pytest.fixture
def many(cloud):
  """Two slices of two workers, set up."""
  cloud.plays(workers=2)
  cloud("create", "--accelerator=v5litepod-16", "--num_slices=2")
  cloud("setup")
  return cloud


@pytest.fixture
def ready(cloud):
  """One slice of two workers, set up."""
  cloud.plays(workers=2)
  cloud("create", "--accelerator=v5litepod-16")
  cloud("setup")
  return cloud


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_ends_nothing():
  launch = str(Path(__file__).parents[2] / "launch")
  code = f"""
import signal, sys
sys.path.insert(0, {launch!r})
signal.signal(signal.SIGHUP, signal.{{}})
import tpu_vm
tpu_vm.main(["stop", "--name=hour", "--zone=us-west4-a", "--", "more"])
print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
"""
  for before, ignored in (("SIG_IGN", "True"), ("SIG_DFL", "False")):
    done = subprocess.run(
      [sys.executable, "-c", code.format(before)],
      capture_output=True,
      text=True,
    )
    assert done.stdout.strip() == ignored, done.stderr


def steps(cloud, node="hour"):
  path = cloud.storage(f"{node}-0")
  return int(path.read_text()) if path.exists() else 0


@pytest.mark.slow
def test_setup(many):
  calls = many.calls()[1:]
  tarball = calls[0].split()[5]
  assert tarball.endswith("/tpu/hour/code.tar.gz")
  # The first worker alone, then the others in any order.
  first = "gcloud compute tpus tpu-vm {} {} --worker={}"
  assert calls[0] == first.format("scp", f"{tarball} hour-0:hourjax-code.tar.gz"
                                  , 0)  # fmt: skip
  assert calls[1] == first.format("ssh", "hour-0", 0) + f" {INSTALL}"
  expected = []
  for node, worker in MANY:
    to = f"{tarball} {node}:hourjax-code.tar.gz"
    expected.append(first.format("scp", to, worker))
    expected.append(first.format("ssh", node, worker) + f" {INSTALL}")
  assert sorted(calls) == sorted(expected)
  # Tracked or not ignored, as it lies here.
  with tarfile.open(tarball) as file:
    names = set(file.getnames())
  assert {"requirements.txt", "new file.txt", "launch/tpu/worker.sh"} <= names
  assert not names & {"ignored.bin", "deleted.txt"}
  assert not [name for name in names if name.startswith(("work", ".git/"))]
  # Exactly the requirements, by launch/environment.sh.
  for worker in MANY:
    pip = (many.home(*worker) / "pip.txt").read_text()
    assert pip == (
      "install --quiet --disable-pip-version-check -r requirements.txt\n"
    )


@pytest.mark.slow
def test_setup_again_keeps_the_environment(ready):
  code = ready.home("hour") / "hourjax" / "code"
  (code / "left over.txt").touch()
  ready("setup")
  assert not (code / "left over.txt").exists()
  assert (code / ".venv" / "bin" / "python").exists()
  assert (ready.home("hour") / "pip.txt").read_text().count("\n") == 1


@pytest.mark.slow
def test_setup_fails(cloud):
  cloud("create", "--accelerator=v6e-1")
  (cloud.root / "pip_fails").touch()
  said = cloud("setup", code=2).stderr
  assert "error: worker 0 of hour: ERROR: No matching distribution" in said
  assert "0: absent" in cloud("status").stdout
  said = cloud("run", *TRAIN, code=2).stderr
  assert "1 of 1 workers are not set up (hour:0); run `setup` first" in said


def test_whole_life(many):
  many("run", "--env=NOTE=a 'b' $c", *TRAIN)
  starts = [x for x in many.calls() if " start " in x]
  commands = {x.split("--command=")[1] for x in starts}
  (command,) = commands  # the same line everywhere
  assert command.startswith("bash hourjax/code/launch/tpu/worker.sh start ")
  assert command.split(" ", 4)[4] == (
    "env 'NOTE=a '\"'\"'b'\"'\"' $c' python -m hourjax.train"
    " --config=configs/hourllava.py:size=3b,stage=3"
    " --config.data.weights=ego4d=2,short=0.5"
    " '--config.name=it'\"'\"'s $HOME' --workdir=/mnt/hour/run"
  )
  assert len(starts) == 4
  # It goes on although every connection has ended.
  before = steps(many, "hour-0")
  until(lambda: steps(many, "hour-0") > before + 2)
  assert many("status").stdout.count(": running ") == 4
  # A second one is refused.
  said = many("run", *TRAIN, code=2).stderr
  assert "runs already; watch it with `logs --follow`, or `stop` it" in said
  assert "stop it before setup" in many("setup", code=2).stderr
  # SIGTERM lets it save; the exit status is kept.
  said = many("stop").stderr
  assert said.count(": ended with 0") == 4
  assert many("status").stdout.count("ended with 0 stopped") == 4
  # The logs of all come here.
  paths = many("logs", f"--out={many.root}/logs").stdout.split()
  assert len(paths) == 4
  for path, worker in zip(paths, MANY):
    text = Path(path).read_text()
    assert text == many.log(*worker)
    assert text.splitlines()[:4] == [
      "options --config=configs/hourllava.py:size=3b,stage=3"
      " --config.data.weights=ego4d=2,short=0.5 --config.name=it's $HOME"
      " --workdir=/mnt/hour/run",
      "platforms tpu,cpu",
      "note a 'b' $c",
      "from step 0",
    ]
    assert text.splitlines()[-1].startswith("saved at step ")
  # And the next run goes on.
  saved = steps(many, "hour-0")
  many("run", *TRAIN)
  until(lambda: f"from step {saved}" in many.log("hour-0"))
  many.storage("finish").touch()
  until(lambda: many("status").stdout.count("ended with 0 ") == 4)


@pytest.mark.slow
def test_exit_status_is_kept(ready):
  ready.storage("crash").write_text("7")
  ready("run", *TRAIN)
  until(lambda: "0: ended with 7" in ready("status").stdout)
  assert "Traceback: it broke" in ready.log("hour")


@pytest.mark.slow
def test_killed_without_a_word(ready):
  ready("run", *TRAIN)
  ready.preempt("hour", warn=False, vanish=False)
  assert ready("status").stdout.count(": lost ") == 2
  ready("run", *TRAIN)
  assert ready("status").stdout.count(": running ") == 2


@pytest.mark.slow
def test_stop_that_is_not_heard(ready):
  ready.storage("deaf").touch()
  ready("run", *TRAIN)
  until(lambda: steps(ready))
  said = ready("stop", "--seconds=1", code=2).stderr
  assert "2 of 2 workers still run after 1 s" in said
  assert "--kill" in said
  ready("stop", "--seconds=0", "--kill")
  assert ready("status").stdout.count("ended with 137 stopped") == 2


@pytest.mark.slow
def test_follow(ready):
  ready("run", *TRAIN)
  ready.loses(1, where=["--worker=1", "worker.sh follow"], when="cut")
  follow = ready.begin("logs", "--follow")
  until(lambda: ready.output().count("from step 0") >= 2)
  ready.storage("finish").touch()
  assert follow.wait(90) == 0
  lines = ready.output().splitlines()
  for node, worker in PAIR:
    mine = [x for x in lines if x.startswith(f"[{node}:{worker}] ")]
    log = ready.log(node, worker).splitlines()
    assert [x.split("] ", 1)[1] for x in mine] == log
  assert "hour:1: connection lost; again from line 3" in ready.output()


@pytest.mark.slow
def test_lost_connection_while_starting(ready):
  # The command went through, the answer did not: it is not started twice.
  ready.loses(2, where=["--worker=1"], when="after")
  said = ready("run", *TRAIN).stderr
  assert said.count("connection lost") == 2
  assert ready("status").stdout.count(": running ") == 2
  homes = [ready.home(*worker) for worker in PAIR]
  logs = [x for home in homes for x in (home / "hourjax/logs").iterdir()]
  assert len(logs) == 2


@pytest.mark.slow
def test_lost_connection_that_stays_lost(ready):
  ready.loses(99, where=["--worker=1"])
  said = ready("status", code=2).stderr
  assert (
    "1 of 2 workers failed: worker 1 of hour: no connection after 4" in said
  )
  assert "firewall" in said
  assert "  gcloud: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh]" in said


@pytest.mark.slow
def test_none_is_left_when_one_does_not_start(ready):
  where = ["--worker=1", "worker.sh start"]
  ready.fails("tpu-vm.ssh", "INTERNAL: oops", where=where)
  said = ready("run", *TRAIN, code=2).stderr
  assert "1 of 2 workers failed: worker 1 of hour: gcloud failed" in said
  text = ready("status").stdout
  assert text.count("ended with 0 stopped") == 1
  assert text.count("1: none") == 1


@pytest.mark.slow
def test_secrets_travel_in_a_file(ready, tmp_path):
  secret = tmp_path / "secret.env"
  secret.write_text("# for W&B\n\nNOTE=s3cret = $HOME\n")
  secret.chmod(0o600)
  ready("run", f"--env_file={secret}", *TRAIN)
  until(lambda: "note s3cret = $HOME" in ready.log("hour", 1))
  assert not [x for x in ready.calls(all_of_them=True) if "s3cret" in x]
  secret.write_text("NOTE\n")
  said = ready("run", f"--env_file={secret}", *TRAIN, code=2).stderr
  assert "secret.env: line 1 is no KEY=VALUE" in said


@pytest.mark.slow
def test_lines_of_a_file_end_as_the_workers_read_them(ready, tmp_path):
  secrets = tmp_path / "secrets"
  secrets.write_bytes("A=one\u2028line\n\n# two\nB=\x85\n".encode())
  ready("run", f"--env_file={secrets}", *TRAIN)
  ready("stop")
  for text, says in (
    (b"A=1\r\nB=2\r\n", "line 1 ends or breaks with a character"),
    (b"A=1\nB=2\0\n", "line 2 ends or breaks with a character"),
    (b"A=\xff\n", "it is not UTF-8"),
  ):
    secrets.write_bytes(text)
    done = ready("run", f"--env_file={secrets}", *TRAIN, code=2)
    assert says in done.stderr


@pytest.mark.slow
def test_prepare(ready):
  line = 'echo "$PWD $(command -v python)" >>~/"it\'s done"; [ $? = 0 ]'
  ready("run", "--prepare", line, *TRAIN)
  ready("stop")
  ready("run", "--prepare", line, *TRAIN)
  for worker in PAIR:
    home = ready.home(*worker)
    code = home / "hourjax" / "code"
    text = (home / "it's done").read_text()
    assert text == f"{code} {code}/.venv/bin/python\n" * 2
  ready("stop")
  said = ready("run", "--prepare=echo no disk >&2; false", *TRAIN, code=2)
  assert "2 of 2 workers failed: worker 0 of hour: no disk (exit" in said.stderr
  assert ready("status").stdout.count("ended with 0 stopped") == 2


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (("--", "--config=c"), "no --workdir among the trainer's options"),
    (("--", "--workdir=/tmp/run"), "another disk on each of the 2 workers"),
    (("--", "--workdir", "work/run"), "lies in the shipped code"),
    (
      ("--until_done", "--accelerator=v6e-8", "--", "--workdir=/data/run"),
      "is lost with it, but --until_done resumes from there; give"
      " --shared_path=FOLDER, a mount",
    ),
    (("--", "--workdir=gs://bucket/run"), "is a URL; a run needs a folder"),
    (("--env=NOTE", *TRAIN), "write --env=KEY=VALUE"),
    (("--env=NOTE=a\u2028b", *TRAIN), "U+2028 would not arrive"),
    (("--env=NOTE=a\nb", *TRAIN), "U+000A would not arrive"),
    (("--env=NOTE=a\x1b[2J", *TRAIN), "U+001B would not arrive"),
    ((*TRAIN, "--config.init=a\u2029b"), "U+2029 would not arrive"),
    (
      ("--shared_path=/mnt/hour", "--", "--workdir=/mnt/hour/../run"),
      "--workdir=/mnt/hour/../run: '..' may lead out of what",
    ),
    (
      ("--shared_path=/mnt/../mnt", "--", "--workdir=/mnt/run"),
      "--shared_path=/mnt/../mnt: '..' may lead out",
    ),
    (("--shared_path=/", "--", "--workdir=/mnt/run"), "is no mount; give its"),
    (("--shared_path=mnt", "--", "--workdir=mnt/run"), "is no mount; give its"),
  ],
)
def test_refused(ready, arguments, says):
  assert says in ready("run", *arguments, code=2).stderr
  assert not [x for x in ready.calls() if " start " in x]


@pytest.mark.slow
def test_shared_workdir(ready):
  shared = ready.root / "mount"
  workdir = f"--workdir={shared}/run"
  ready("run", f"--shared_path={shared}", "--", workdir)
  until(lambda: (shared / "run" / "hour-0").exists())
  ready("stop")
  other = f"--workdir={shared}2/run"  # not below it
  ready("run", f"--shared_path={shared}", "--", other, code=2)
