"""How commands end on mistakes, seen from a shell."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _run(module, *arguments):
  return subprocess.run(
    [sys.executable, "-m", f"hourjax.{module}", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_unknown_config_key(tmp_path):
  done = _run(
    "train",
    "--config=configs/demo.py",
    "--config.optimizer.decoderr=1e-3",
    f"--workdir={tmp_path / 'run'}",
  )
  assert done.returncode != 0
  assert "decoderr" in done.stderr
  assert not (tmp_path / "run").exists()


def test_unknown_config_argument(tmp_path):
  done = _run(
    "train",
    "--config=configs/demo.py:stagee=2",
    f"--workdir={tmp_path / 'run'}",
  )
  assert done.returncode != 0
  assert "'stagee=2': write key=value with a key of data, stage" in done.stderr
  assert not (tmp_path / "run").exists()


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


def test_option_without_dashes(tmp_path):
  done = _run("demo", f"--workdir={tmp_path / 'demo'}", "train_videos=3")
  assert done.returncode == 2
  assert done.stderr.strip() == (
    "error: unknown argument 'train_videos=3'; options start with --"
  )
  assert not (tmp_path / "demo").exists()


def test_a_workdir_behind_a_url():
  done = _run("train", "--config=configs/demo.py", "--workdir=gs://bucket/run")
  assert done.returncode == 2
  assert "--workdir=gs://bucket/run is a URL; a run needs a" in done.stderr
