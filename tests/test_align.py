"""`python -m hourjax.align`, and `hourjax.haystack` with the tower it made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hourjax.data.demo import build
from hourjax.data.store.features import FeatureStore

ROOT = Path(__file__).parents[1]


def _run(command, **options):
  done = subprocess.run(
    [sys.executable, "-m", f"hourjax.{command}"]
    + [f"--{key}={value}" for key, value in options.items()],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert "Traceback" not in done.stderr, done.stderr
  return done


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
  """(What the command did, its options) on the demo's videos, for two steps."""
  folder = tmp_path_factory.mktemp("demo")
  build.build(
    folder,
    build.Options(train_videos=3, test_scale=0.02, conversations=1),
  )
  options = {
    "config": f"configs/demo.py:stage=0,data={folder}",
    "captions": folder / "captions.json",
    "workdir": folder / "stage0",
    "config.steps": 2,
  }
  return _run("align", **options), options


def test_aligns_once(aligned):
  done, options = aligned
  assert done.returncode == 0, done.stderr
  captions = json.loads(options["captions"].read_text())
  assert f"{len(captions):,} frames and " in done.stdout
  metrics = (options["workdir"] / "metrics.jsonl").read_text().splitlines()
  assert json.loads(metrics[-1])["step"] == 2
  again = _run("align", **options)
  assert again.returncode == 0
  assert again.stdout == f"already aligned: {options['workdir']}\n"


def test_haystacks_are_encoded_by_its_tower(aligned, tmp_path):
  _, options = aligned
  done = _run(
    "haystack",
    config=options["config"],
    tower=options["workdir"],
    out=tmp_path,
    minutes=4,
    depths=2,
    videos=1,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith(
    f"2 videos of 4 to 4 minutes (0.1 h) and 8 questions in {tmp_path}\n"
  )
  assert len(json.loads((tmp_path / "test.json").read_text())) == 8
  store = FeatureStore(tmp_path / "features")
  assert [store.stored(video) for video in store.videos()] == [(240, 240.0)] * 2
