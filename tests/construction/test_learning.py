"""From videos to a trained model, by constructed questions."""

import json
import os
import subprocess
import sys

import pytest

from hourjax.construction import dataset
from hourjax.data.demo import build
from tests.construction import learning
from tests.construction.demo_videos import ROOT


def _run(command, *options):
  done = subprocess.run(
    [sys.executable, "-m", f"hourjax.{command}", *map(str, options)],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_construct_prepare_train_evaluate(tmp_path, capsys):
  """The whole way, for two steps; README has what 900 steps reach."""
  data = tmp_path / "data"
  options = build.Options(train_videos=4, test_scale=0.02, conversations=2)
  build.build(data, options)
  config = f"--config=configs/demo.py:data={data},stage=0"
  # Stage 0 stands for stage 1, which is as good to begin with.
  _run(
    "align", config, f"--captions={data / 'captions.json'}",
    f"--workdir={tmp_path / 'stage1'}", "--config.steps=2",
  )  # fmt: skip
  _run(
    "extract", config, f"--tower={tmp_path / 'stage1'}",
    f"--videos={data / 'videos'}", f"--out={data / 'features'}",
  )  # fmt: skip
  learning.main([str(tmp_path), "--steps=2", "--count=2"])
  said = capsys.readouterr().out
  assert "constructed: " in said and "generated: " in said
  out = tmp_path / "learning" / "marathon"
  records = json.loads((out / dataset.CONVERSATIONS).read_text())
  asked = {
    turn["value"].removeprefix("<image>\n")
    for record in json.loads((data / "train.json").read_text())
    for turn in record["conversations"]
    if turn["from"] == "human"
  }
  own = {
    turn["value"].removeprefix("<image>\n")
    for record in records
    for turn in record["conversations"]
    if turn["from"] == "human"
  }
  # The played writer asks what the demo asks.
  assert len(own & asked) > 15, (len(own), len(asked), len(own & asked))
  summary = json.loads((out / "summary.json").read_text())
  assert summary["videos"]["done"] == 4
  assert len(summary["tasks"]) >= 18
