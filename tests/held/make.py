"""Makes what tests/test_held.py loads; see README.md in this folder.

  python -m tests.held.make FOLDER

trains a tiny model on tiny data in FOLDER with the code that this file stands
beside, and writes FOLDER.tar.xz and FOLDER.json, the archive and the values
that later code must find in it again.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import ml_dtypes
import numpy as np
from PIL import Image

import hourjax
from configs import demo
from hourjax.data.demo.tokenizer import write_tokenizer
from hourjax.data.store.features import FeatureStore
from hourjax.models.params import init_params
from hourjax.training.checkpoint import restore_params
from hourjax.training.config import build_experiment
from hourjax.training.workdir import read_config
from hourjax.weights.shards import save_params
from tests import test_held

ROOT = pathlib.Path(__file__).parents[2]
# Seconds and frames of the videos. The first is a short one.
VIDEOS = {"a.mp4": (40.0, 128), "b.mp4": (131.5, 131)}
KEPT = 3  # step of the run's last checkpoint
# Beside those of the demo's configuration.
CONFIG = {
  "model.vision.image_size": 8,
  "model.vision.patch_size": 2,
  "model.vision.width": 16,
  "model.vision.heads": 2,
  "model.vision.mlp": 32,
  "model.decoder.vocab": 448,
  "model.decoder.width": 16,
  "model.decoder.layers": 2,
  "model.decoder.mlp": 32,
  "model.decoder.tied": False,
  # As those of a published folder, so that its model is the same.
  "model.dtype": "bfloat16",
  "model.remat": "full",
  "model.memaug_layers": 1,
  "rows.features": 1040,
  "rows.tiles": 12,
  "rows.memory": 1300,
  "batch_rows": 1,
  "accumulate": 2,
  "steps": 5,
  "log_every": 1,
  "checkpoint_every": KEPT,
  "data.max_skipped": 0.5,
  "init": "start",
}


def write_data(folder: pathlib.Path) -> None:
  """Writes videos' features, images, records, tokenizer and dataset."""
  rng = np.random.default_rng(0)
  store = FeatureStore(folder / "features", create=True)
  for name, (duration, frames) in VIDEOS.items():
    # Of few values, which compress.
    drawn = rng.integers(-4, 4, (frames, 4, 16)) / 4
    store.write(name, drawn.astype(ml_dtypes.bfloat16), duration)
  (folder / "images").mkdir()
  for name, size in (("one.png", (8, 8)), ("two.png", (11, 24))):
    pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "images" / name)
  records = _records()
  (folder / "records.json").write_text(json.dumps(records, indent=1))
  asked = [item for item in records if item.get("video") in VIDEOS]
  (folder / "test.json").write_text(json.dumps(asked, indent=1))
  questions = [record["conversations"][0]["value"] for record in records]
  write_tokenizer(folder / "tokenizer", questions)
  _command(
    "prepare",
    "--out=data/stage2",
    "--records=data/records.json",
    "--tokenizer=data/tokenizer",
    "--features=data/features",
    "--media=data/images",
    "--nocheck_media",
  )


def _records() -> list[dict]:
  """Conversations about videos, images and nothing; one cannot be used."""
  ask = "Who stands in the garden?\nA. a cat\nB. a dog"
  media = (
    *({"video": "a.mp4"}, {"video": "b.mp4"}, {"video": "b.mp4"}),
    *({"image": "one.png"}, {"image": ["one.png", "two.png"]}, {}),
    {"video": "nowhere.mp4"},
  )
  records = []
  for number, about in enumerate(media):
    count = len(about["image"]) if "image" in about else len(about)
    count = 1 if about.get("image") == "one.png" else count
    records.append(
      {
        "id": f"record-{number}",
        **about,
        "data_source": ("garden", "street")[number % 2],
        "conversations": [
          {"from": "human", "value": "<image>\n" * count + ask},
          {"from": "gpt", "value": "AB"[number % 2]},
          {"from": "human", "value": f"And after {number} minutes?"},
          {"from": "gpt", "value": "Nobody is there, only the rain."},
        ],
      }
    )
  return records


def _command(name: str, *options: str) -> None:
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  subprocess.run(
    [sys.executable, "-m", f"hourjax.{name}", *options],
    env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    check=True,
  )


def write_start() -> None:
  """Writes the weights that the run starts from.

  They are larger than drawn, so that answers depend on what is asked.
  """
  config = demo.get_config("stage=3")
  config.update_from_flattened_dict(CONFIG)
  model = build_experiment(config.to_dict()).model
  params = {
    path: np.asarray(value) * (2 if path.endswith("kernel") else 1)
    for path, value in init_params(model, 0).items()
  }
  save_params(params, model, "start")


def train() -> None:
  """Leaves a run whose process was killed after its checkpoint of step KEPT.

  What it computed after that is expected of the run that goes on.
  """
  _command(
    "train",
    f"--config={ROOT}/configs/demo.py:data=data,stage=3",
    *(f"--config.{key}={value}" for key, value in CONFIG.items()),
    "--config.data.media=data/images",
    "--workdir=run",
  )


def export() -> None:
  """Writes the run's parameters as a published folder."""
  config = build_experiment(read_config("run")).model
  save_params(restore_params("run").params, config, "export")
  for path in pathlib.Path("data/tokenizer").iterdir():
    shutil.copy(path, "export")


def pack(archive: pathlib.Path) -> None:
  """Packs the working directory, without pictures, owners and times."""

  def plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if info.name.endswith((".png", ".svg")) and "/images/" not in info.name:
      return None
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info

  with tarfile.open(archive, "w:xz", preset=9) as file:
    file.add(".", "held", filter=plain)


def main(folder: pathlib.Path) -> None:
  """Makes everything in a folder that is not there yet."""
  folder.mkdir()
  os.chdir(folder)
  write_data(pathlib.Path("data"))
  write_start()
  train()
  expected = {
    "losses": test_held.losses("run"),
    "trained": test_held.digests(restore_params("run").params),
  }
  shutil.rmtree("start")
  shutil.rmtree(f"run/checkpoints/{CONFIG['steps']}")
  export()
  _command(
    "evaluate",
    "--model=run",
    "--benchmark=records",
    "--data=data/test.json",
    "--features=data/features",
  )
  found = restore_params("run")
  expected |= {
    "arithmetic": test_held.arithmetic(),
    "step": found.step,
    "params": test_held.digests(found.params),
    "answers": test_held.answers(hourjax.load("run")),
  }
  text = json.dumps(expected, indent=1) + "\n"
  folder.with_suffix(".json").write_text(text)
  pack(folder.with_suffix(".tar.xz"))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]).absolute())
