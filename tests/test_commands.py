"""How commands end on mistakes, seen from a shell."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hourjax import command
from hourjax.data.demo.tokenizer import MARKUP, write_tokenizer
from hourjax.errors import UserError

ROOT = Path(__file__).parents[1]


def _run(module, *arguments):
  return subprocess.run(
    [sys.executable, "-m", f"hourjax.{module}", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_missing_dataset(tmp_path):
  dataset = tmp_path / "none"
  done = _run(
    "train",
    "--config=configs/demo.py",
    f"--config.data.dataset={dataset}",
    f"--workdir={tmp_path / 'run'}",
  )
  assert done.returncode == 2
  assert "Traceback" not in done.stderr
  errors = [x for x in done.stderr.splitlines() if x.startswith("error")]
  (error,) = errors
  assert f"{dataset} is no prepared dataset" in error
  assert f"run `python -m hourjax.prepare --out={dataset}`" in error
  assert not (tmp_path / "run").exists()


DEMO = "--config=configs/demo.py"
LONG = "a" * 5000
# Command line, how its one line begins, and how it ends.
MISUSED = [
  # names
  ("demo --workdri=x", "unknown option --workdri; did you mean --workdir?"),
  ("demo --workdir=x --train-videos=3", "unknown option --train-videos; did you"
   " mean --train_videos?"),
  ("demo --workdir=x --noseed", "unknown option --noseed; --seed takes a"
   " value"),
  ("haystack --minuts=4", "unknown option --minuts; did you mean --minutes?"),
  (f"haystack {DEMO} --tower=x --out=x --minutes=4,1h", "--minutes: '1h' is no"
   " whole number of minutes; write --minutes=10,60,480"),
  ("extract --confg=x", "unknown option --confg; did you mean --config?"),
  ("prepare --record=x", "unknown option --record; did you mean --records?"),
  ("train --work_dir=x", "unknown option --work_dir; did you mean --workdir?"),
  ("plan --topolgy=v5e:2x2", "unknown option --topolgy; did you mean"
   " --topology?"),
  ("ask --model=x --maxtokens=2", "unknown option --maxtokens; did you mean"
   " --max_tokens?"),
  ("evaluate --benchmrk=mlvu", "unknown option --benchmrk; did you mean"
   " --benchmark?"),
  ("export --modle=x --out=y", "unknown option --modle; did you mean"
   " --model?"),
  ("finetune --video=x", "unknown option --video; did you mean --videos?"),
  ("finetune --videos=x --questions=q.csv --model=m", "--out is missing; see"
   " --help"),
  ("finetune --videos=x --questions=q --model=m --out=o --first_option=2",
   "--first_option=2: 2 is not an integer in the range [0, 1]"),
  ("finetune --videos=x --questions=q --model=m --out=o --set=steps",
   "--set=steps: write --set=KEY=VALUE"),
  ("finetune --videos=x --questions=q --model=none --out=o", "model folder none"
   " does not exist"),
  ("bench data --giga=2", "unknown option --giga; did you mean --gigabytes?"),
  ("demo --zzzzzzzz=1", "unknown option --zzzzzzzz; see --help"),
  # values
  ("demo --workdir=x --seed=abc", "--seed=abc: give a whole number"),
  ("demo --workdir=x --seed=1.5", "--seed=1.5: give a whole number"),
  ("demo --workdir=x --test_scale=much", "--test_scale=much: give a number"),
  ("demo --workdir=x --test_scale=nan", "--test_scale=nan: give a number"),
  ("prepare --out=x --tokenizer=y --workers=0", "--workers=0: 0 is not"
   " an integer in the range [1, 4096]"),
  ("prepare --out=x --tokenizer=y --check_media=maybe", "--check_media=maybe:"
   " give true or false"),
  ("ask --model=x --max_tokens=-3 q", "--max_tokens=-3: -3 is not a positive"
   " integer"),
  ("evaluate --benchmark=mlvu --data=x --limit=0", "--limit=0: 0 is not a"
   " positive integer"),
  ("demo --workdir=x --seed=99999999999999999999", "--seed="),
  ("demo --workdir=x --train_videos=9999999999", "--train_videos=9999999999: "),
  ("extract --config=configs/demo.py --videos=x --out=x --threads=1000000",
   "--threads=1000000: 1000000 is not an integer in the range [1, 4096]"),
  ("plan --num_slices=1000000000", "--num_slices=1000000000: "),
  ("ablate --table=4 --seeds=0", "--seeds=0: 0 is not a positive integer"),
  ("ablate --table=4 --steps=0", "--steps=0: 0 is not a positive integer"),
  ("export --model=x --out=y --part=memaug", "--part=memaug: value should be"
   " one of <all|decoder|tower|adapter>"),
  ("export --model=x --out=y --dtype=int8", "--dtype=int8: value should be one"
   " of <bfloat16|float32>"),
  ("export --model=x --out=y --step=-1", "--step=-1: -1 is not a non-negative"),
  ("export --model=x --out=y --shard_gb=0", "--shard_gb=0: "),
  ("construct --videos=v --out=x --captioner=m --writer=m@http://h/v1",
   "--captioner=m: write NAME@URL"),
  ("construct --videos=v --out=x --captioner=m@http://u:p@h/v1"
   " --writer=n@http://h/v1", "--captioner=m@http://***h/v1 holds a password or"
   " key"),
  ("construct --videos=v --out=x --captioner=m@http://h:80a0/v1"
   " --writer=n@http://h/v1", "--captioner=m@http://h:80a0/v1: write NAME@URL"),
  ("construct --videos=v --out=x --captioner=m@http://h/v1"
   " --writer=m@http://h/v1", "v is not a folder on this machine"),
  ("construct --videos=tests --out=x --captioner=m@http://h/v1"
   " --writer=m@http://h/v1 --prices=eye=1/2", "--prices: 'eye=1/2'; write"
   " ROLE=IN/OUT"),
  ("construct --videos=tests --out=x --captioner=m@http://h/v1"
   " --writer=m@http://h/v1 --budget=5", "--budget=5 but --prices lacks"),
  ("construct --videos=tests --out=x --captioner=m@http://h/v1"
   " --writer=m@http://h/v1 --tasks=README.md", "README.md"),
  ("construct --videos=tests --out=x --captioner=m@http://h/v1"
   " --writer=m@http://h/v1 --templates=launch", "--templates=launch holds"
   " none of"),
  ("construct --videos=tests --out=x --captioner=m@http://h/v1"
   " --writer=m@http://h/v1 --exclude=none.txt", "--exclude=none.txt cannot be"
   " read"),
  ("construct --videos=tests --out=README.md --captioner=m@http://h/v1"
   " --writer=m@http://h/v1", "tests holds no video"),
  ("construct --videos=v --out=x --captioner=m@http://h/v1"
   " --writer=m@http://h/v1 --worker=3/2", "worker 3 of 2"),
  ("construct --videos=v --out=x --captioner=m@http://h/v1"
   " --writer=m@http://h/v1 --check=grammar", "--check=grammar: value should"
   " be one of <rules|blind|judge>"),
  # no value
  ("demo --workdir", "--workdir has no value; write --workdir=VALUE"),
  ("prepare --tokenizer --out=x", "--tokenizer has no value; write"
   " --tokenizer=VALUE"),
  (f"train {DEMO} --config.steps --workdir=x", "--config.steps=--workdir=x:"
   " give a whole number"),
  (f"train --workdir=x {DEMO} --config.steps", "--config.steps has no value;"
   " write --config.steps=VALUE"),
  ("demo --workdir=", "--workdir is empty; give a value or leave it out"),
  (f"extract {DEMO} --out=x --videos=", "--videos is empty; give a value or"
   " leave it out"),
  # missing
  ("demo", "--workdir is missing; see --help"),
  (f"extract {DEMO}", "--videos, --out are missing; see --help"),
  ("evaluate --data=x", "--benchmark is missing; see --help"),
  ("ablate", "--table is missing; see --help"),
  ("ablate --table=4 --out=x --benchmark=lvbench", "--data is missing: give the"
   " folder of lvbench"),
  ("export --model=x", "--out is missing; see --help"),
  # configurations
  (f"train {DEMO} --config.optimzer.b1=1 --workdir=x", "the configuration has"
   " no key --config.optimzer.b1; did you mean --config.optimizer.b1?"),
  (f"train {DEMO} --config.optimizer.decoderr=1e-3 --workdir=x", "the"
   " configuration has no key --config.optimizer.decoderr; did you mean"
   " --config.optimizer.decoder?"),
  ("train --config=configs/demo.py:stagee=2 --workdir=x",
   "--config=configs/demo.py:stagee=2: config argument 'stagee=2': write"
   " key=value with a key of data, size, stage"),
  (f"train {DEMO} --config.fsdp=1 --workdir=x", "the configuration has no key"
   " --config.fsdp; did you mean --config.mesh.fsdp?"),
  (f"train {DEMO} --config.mesh=4 --workdir=x", "--config.mesh is a group of"
   " keys; set one of them, such as --config.mesh.data"),
  (f"train {DEMO} --config.steps=many --workdir=x", "--config.steps=many: give"
   " a whole number"),
  ("train --config.steps=2 --workdir=x", "--config.steps is given, but --config"
   " is missing"),
  (f"train --config.steps=2 {DEMO} --workdir=x", "--config.steps=2 stands"
   " before --config; give --config first"),
  ("plan --config=configs/dmo.py", "--config=configs/dmo.py: there is no such"
   " file; did you mean configs/demo.py?"),
  ("plan --config=configs", "--config=configs: it is a folder"),
  ("plan --config=", "--config is empty; give a file"),
  ("plan --config=README.md", "--config=README.md: SyntaxError: "),
  ("plan --config configs/demo.py:stage=5", "--config=configs/demo.py:stage=5:"
   " config argument stage=5: stage is 0, 1, 2 or 3"),
  ("plan --config configs/demo.py:size=huge", "--config=configs/demo.py:"
   "size=huge: config argument size=huge: size is small or full"),
  ("bench data --config.stepps=1", "the configuration has no key"
   " --config.stepps; did you mean --config.steps?"),
  # arguments
  ("train configs/demo.py", "unknown argument 'configs/demo.py'; options start"
   " with --"),
  ("ablate --table=7 --out=x", "--table=7 is none of the paper's ablations;"
   " choose one of 3, 4, 5, 6, 9, figure4"),
  ("bench dta", "bench 'dta': give one of data, attention, ask,"
   " answers, construct"),
  ("demo --workdir=x train_videos=3", "unknown argument 'train_videos=3';"
   " options start with --"),
  # paths
  (f"ablate {DEMO} --table=4 --out=x --config.init=x/none",
   "--config.init=x/none does not exist; train it first"),
  (f"ablate {DEMO} --table=4 --out=x --config.data.dataset=x/none",
   "x/none is no prepared dataset"),
  ("export --model=x --out=gs://bucket/y", "--out=gs://bucket/y is a URL; give"
   " a folder, and upload it afterwards"),
  ("export --model=nowhere --out=x", "model folder nowhere does not exist;"
   " give the workdir of a training run"),
  ("export --model=nowhere --out=launch", ""),
  ("export --model=hf://tiny --out=x", "hf://tiny is no name of a repository;"
   " write hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION"),
  (f"extract {DEMO} --videos=tests --out=x --tower=hf://so400m",
   "hf://so400m is no name of a repository"),
  ("prepare --out=x --tokenizer=hf:///b --records=RECORDS",
   "hf:///b is no name of a repository"),
  (f"train {DEMO} --workdir=gs://bucket/run", "--workdir=gs://bucket/run is a"
   " URL; a run needs a folder"),
  (f"demo --workdir={LONG}", "--workdir=aaa"),
  (f"prepare --out=x --tokenizer={LONG} --records=README.md",
   ""),
  (f"prepare --out={LONG} --tokenizer=TOKENIZER --records=RECORDS",
   ""),
  (f"prepare --out=x --tokenizer=TOKENIZER --records=RECORDS"
   f" --features={LONG}", ""),
  (f"extract {DEMO} --videos={LONG} --out=x", "--videos=aaa"),
  (f"train {DEMO} --workdir={LONG}", "--workdir=aaa"),
  ("prepare --out=a\udcff --tokenizer=TOKENIZER --records=RECORDS",
   "--out=a\\xff is not UTF-8; rename the file"),
  ("demo --workdir=/proc/self/status", "cannot make /proc/self/status"),
]  # fmt: skip


@pytest.fixture(scope="module")
def misused(tmp_path_factory):
  """Status, stdout and stderr of each of the command lines."""
  folder = tmp_path_factory.mktemp("misused")
  write_tokenizer(folder / "tokenizer", [*MARKUP, "Who?"])
  turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Who?"}]
  records = folder / "records.json"
  records.write_text(json.dumps([{"id": "1", "conversations": turns}]))
  places = {"TOKENIZER": f"{folder}/tokenizer", "RECORDS": f"{records}"}
  lines = []
  for line, _ in MISUSED:
    for name, place in places.items():
      line = line.replace(name, place)
    lines.append(line.split(" "))
  done = subprocess.run(
    [sys.executable, "-m", "tests.misused"],
    cwd=ROOT,
    input=json.dumps(lines),
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert not done.returncode, done.stderr
  return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(MISUSED)))
def test_misuse_is_one_line_and_status_2(misused, number):
  status, out, said = misused[number]
  assert status == 2 and "wrote" not in out, said
  assert not (ROOT / "x").exists()
  # On a busy machine it may have said what it was doing.
  said = re.sub(r".* so far\)\n", "", said)
  assert said.count("\n") == 1 and len(said) < 600
  assert said.startswith(f"error: {MISUSED[number][1]}")
  if LONG in MISUSED[number][0]:
    assert "File name too long" in said and "aaa..." in said


def test_help_is_no_mistake():
  done = _run("prepare", "--help")
  assert done.returncode == 0 and not done.stderr
  assert "--media_prefix" in done.stdout and "Turns downloaded" in done.stdout


def test_errors_that_are_nobodys_mistake(monkeypatch, capsys):
  """A full disk, an interrupt, a closed pipe; a mistake of ours is shown."""

  def ending(error, resume=""):
    def main(_):
      raise error

    with pytest.raises(SystemExit) as end:
      command.run(main, resume=resume)
    return end.value.code, capsys.readouterr().err

  monkeypatch.setattr(sys, "argv", ["nothing"])
  monkeypatch.setattr(command.app, "run", lambda main, flags_parser: main([]))
  full = OSError(errno.ENOSPC, "No space left", "/disk/file")
  assert ending(full) == (1, f"error: {full}\n")
  assert ending(full, "start again") == (1, f"error: {full}; start again\n")
  assert ending(KeyboardInterrupt(), "go on") == (
    130,
    "interrupted; start again to go on\n",
  )
  assert ending(UserError("no\nway")) == (2, "error: no\nway\n")
  for ours in (
    KeyError("x"),
    OSError(errno.EIO, "broken"),
    FileNotFoundError(),
  ):
    with pytest.raises(type(ours)):
      command.run(lambda _, ours=ours: (_ for _ in ()).throw(ours))
