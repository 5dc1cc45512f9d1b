"""The benchmark's figures, at a small size; speed itself is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hourjax.data import synthetic

ROOT = Path(__file__).parents[2]


def test_durations_follow_the_histogram():
  drawn = synthetic.video_durations(100_000, 1)
  # The paper states 20.9 minutes; its rounded histogram gives 20.5.
  assert 20 < drawn.mean() / 60 < 21.5
  assert drawn.min() >= 180 and drawn.max() <= 3600
  share = np.histogram(drawn, np.arange(13) * 300)[0] / len(drawn)
  wanted = np.array(synthetic.HISTOGRAM) / sum(synthetic.HISTOGRAM)
  np.testing.assert_allclose(share, wanted, atol=0.01)


@pytest.mark.slow
def test_one_json_object(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "hourjax.bench", "data", "--json"),
      *("--gigabytes=0.3", "--conversations=3000", "--rows=2"),
      f"--scratch={tmp_path}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  figures = json.loads(done.stdout)
  assert figures["conversations"] == 3000
  goodput, alone = figures["goodput"], figures["goodput_one_sample_a_row"]
  assert 0.9 < goodput["memory"] <= 1 and alone["memory"] < 0.4
  assert goodput.keys() == {"memory", "queries", "decoder"}
  assert figures["read"]["gb_per_second"] > 0
  assert set(figures["resume_seconds"]) == {"step_10", "step_1000000"}
  assert not list(tmp_path.iterdir())  # nothing stays behind


@pytest.mark.parametrize(
  "arguments",
  [
    ["dat"],
    pytest.param([], marks=pytest.mark.slow),
    pytest.param(["data", "x"], marks=pytest.mark.slow),
  ],
)
def test_unknown_benchmark(arguments):
  done = subprocess.run(
    [sys.executable, "-m", "hourjax.bench", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith("error: bench")
  assert "give one of data" in done.stderr
