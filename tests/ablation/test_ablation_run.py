"""Tables that are really trained and evaluated, on the data of `tests/held`."""

import dataclasses
import json
import os
import pathlib
import signal
import tarfile
import threading
import time

import pytest

from hourjax.ablation import report, run
from hourjax.ablation.tables import Row, Table
from hourjax.errors import UserError
from hourjax.training.config import build_experiment
from hourjax.training.workdir import read_config

ROOT = pathlib.Path(__file__).parents[2]
TABLE = Table(
  "Table 0",
  (
    Row("whole", {}, (50.0,)),
    Row("kept tokens only", {"memory.scale": 0.0}, (48.0,)),
  ),
  default="whole",
  columns=("A",),
)
QUESTIONS = run.Questions("records", "data/test.json", "data/features")


@pytest.fixture(scope="module")
def held(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ablation")
  with tarfile.open(ROOT / "tests" / "held" / "eff9641.tar.xz") as archive:
    archive.extractall(folder, filter="data")
  return folder / "held"


@pytest.fixture(autouse=True)
def _there(held, monkeypatch):
  monkeypatch.chdir(held)
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  for name, value in {
    "DIR": str(held / "compiled"),
    "_ENABLE_XLA_CACHES": "none",
  }.items():
    monkeypatch.setenv(f"JAX_COMPILATION_CACHE_{name.lstrip('_')}", value)
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _config(**changes):
  config = dataclasses.asdict(build_experiment(read_config("run")))
  return {**config, "init": "run", "steps": 2, "log_every": 1, **changes}


def _run(out, seeds, table=TABLE, **changes):
  """Trains, evaluates and reports as the command does."""
  config = _config(**changes)
  runs = run.run_table(table, config, QUESTIONS, out=out, seeds=seeds)
  results = report.collect(table, runs, config, "records")
  report.write(results, out, "0")
  return results


@pytest.mark.slow
def test_rows_are_trained_evaluated_and_reused(tmp_path, capfd):
  first = _run(tmp_path, 1)
  said = capfd.readouterr().out
  assert "[1/2] whole, seed 0: training\n" in said
  assert "[2/2] kept tokens only, seed 0: evaluating (about " in said
  folders = [
    tmp_path / "runs" / name / "seed0"
    for name in ("default", "memory.scale=0.0")
  ]
  before = [(each / "result.json").stat().st_mtime_ns for each in folders]
  for each, scale in zip(folders, (1.0, 0.0)):
    made = build_experiment(read_config(each / "training"))
    assert (made.memory.scale, made.steps, made.init) == (scale, 2, "run")
    assert (each / "evaluation" / "report.md").exists()
    assert (each / "training" / "checkpoints" / "2").is_dir()
  # What an interruption left of an evaluation and of a report is made again.
  (folders[1] / "result.json").unlink()
  found = _run(tmp_path, 1)
  said = capfd.readouterr().out
  assert "whole, seed 0" not in said
  assert "kept tokens only, seed 0: training" not in said
  assert "[2/2] kept tokens only, seed 0: evaluating" in said
  assert (folders[0] / "result.json").stat().st_mtime_ns == before[0]
  assert [line.accuracy.count for line in found.lines] == [1, 1]
  for old, new in zip(first.lines, found.lines):
    assert new.values[0] == old.values[0]
  data = json.loads((tmp_path / "table0.json").read_text())
  assert [row["label"] for row in data["rows"]] == ["whole", "kept tokens only"]
  assert data["questions"] == found.count and data["about"]["init"] == "run"
  assert (tmp_path / "table0.png").exists()
  # Another configuration in the same folder is refused before anything runs.
  with pytest.raises(UserError, match=r"steps: 2 -> 3"):
    _run(tmp_path, 1, steps=3)
  other = dataclasses.replace(QUESTIONS, limit=1)
  with pytest.raises(UserError, match=r"another run \(questions: .* -> .* 1\)"):
    run.run_table(TABLE, _config(), other, out=tmp_path, seeds=1)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"data": {"dataset": "none"}}, "none is no prepared dataset"),
    ({"data": {"dataset": ""}}, r"config\.data\.dataset is empty"),
    ({"init": "nowhere"}, r"--config\.init=nowhere does not exist"),
  ],
)
def test_what_is_missing_is_said_before_anything_runs(changes, said, tmp_path):
  config = _config()
  changes = {
    key: {**config[key], **value} if isinstance(value, dict) else value
    for key, value in changes.items()
  }
  with pytest.raises(UserError, match=said):
    _run(tmp_path / "out", 1, **changes)
  assert not (tmp_path / "out").exists()


def test_a_benchmark_that_is_not_there(tmp_path):
  questions = dataclasses.replace(QUESTIONS, data="nothing")
  with pytest.raises(UserError, match="nothing"):
    run.run_table(TABLE, _config(), questions, out=tmp_path / "o", seeds=1)
  assert not (tmp_path / "o").exists()


def test_a_command_that_fails(tmp_path):
  with pytest.raises(
    UserError, match=r"tests.nothing --a=b` ended with status"
  ):
    run._command("tests.nothing", "--a=b")


def test_interrupt_waits_until_the_process_has_saved(tmp_path):
  def interrupt():
    while not (tmp_path / "started").exists():
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=interrupt, daemon=True).start()
  with pytest.raises(KeyboardInterrupt):
    run._command("tests.ablation.interruptible", f"--folder={tmp_path}")
  assert (tmp_path / "saved").exists()
