"""A published folder of a tiny model, and a benchmark for it, on disk."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np

from hourjax.data.demo.tokenizer import write_tokenizer
from hourjax.data.store.features import FeatureStore
from hourjax.models.config import TINY, VisionConfig
from hourjax.models.params import init_params
from hourjax.weights.shards import save_params
from tests import videos

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = dataclasses.replace(
  TINY,
  vision=VisionConfig(
    image_size=8, patch_size=2, width=24, layers=1, heads=2, mlp=32
  ),
  decoder=dataclasses.replace(TINY.decoder, vocab=640, layers=1),
  memaug_layers=1,
)
# Questions about each video; one of them fills more than one batch.
QUESTIONS = {"a.mp4": 11, "b.mp4": 3, "c.mp4": 2, "d.mp4": 1, "e.mp4": 2}


def write_model(folder: pathlib.Path, seed: int = 3) -> pathlib.Path:
  """Weights are larger than drawn, so that answers depend on what is seen."""
  params = {
    path: np.asarray(value) * (3 if path.endswith("kernel") else 1)
    for path, value in init_params(CONFIG, seed).items()
  }
  save_params(params, CONFIG, folder)
  write_tokenizer(folder, [])
  return folder


def write_data(folder: pathlib.Path) -> pathlib.Path:
  """test.json, features of all videos but e.mp4, and files of b, c and d.

  The file of d.mp4 is none.
  """
  records, store = [], FeatureStore(folder / "features", create=True)
  rng = np.random.default_rng(0)
  for number, (name, count) in enumerate(QUESTIONS.items()):
    records += [_record(name, n) for n in range(count)]
    if name != "e.mp4":
      drawn = rng.normal(size=(9 + number, 64, 24))
      store.write(name, drawn.astype(ml_dtypes.bfloat16), 9 + number)
  (folder / "test.json").write_text(json.dumps(records))
  for name in ("b.mp4", "c.mp4"):
    videos.write(folder / "videos" / name, 90)
  (folder / "videos" / "d.mp4").write_text("no video")
  return folder


def _record(video: str, number: int) -> dict:
  text = f"<image>\nWhat is number {number} of {video}?\nA. a card\nB. a tree"
  return {
    "id": f"{video}-{number}",
    "video": video,
    "duration": 60.0 * (number + 1),
    "conversations": [
      {"from": "human", "value": text},
      {"from": "gpt", "value": "AB"[number % 2]},
    ],
  }


def start(
  folder: pathlib.Path, env: dict[str, str] | None = None, **options
) -> subprocess.Popen:
  """`python -m hourjax.evaluate` with these options.

  Args:
    folder: of compiled programs, so that each is compiled once.
    env: more variables.
    options: of the command.
  """
  arguments = [f"--{name}={value}" for name, value in options.items()]
  variables = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    **(env or {}),
  }
  return subprocess.Popen(
    [sys.executable, "-m", "hourjax.evaluate", *arguments],
    cwd=ROOT,
    env=variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
  """Exit status and what it said."""
  try:
    stdout, stderr = process.communicate(timeout=400)
  finally:
    process.kill()
  assert "Traceback" not in stderr, stderr
  return process.returncode, stdout, stderr
