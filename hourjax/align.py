"""Stage 0: teaches a fresh tower and word embeddings what frames show.

  python -m hourjax.align --config=configs/demo.py:stage=0 \
      --captions=work/data/captions.json --workdir=work/stage0

Single frames and short captions are brought together by SigLIP's sigmoid loss
(see `hourjax.alignment.siglip_loss`). The workdir then serves as `--tower` of
hourjax.extract and as `--config.init` of hourjax.train.

The captions are a JSON list of
{"video": name, "second": s, "captions": [text, ...]}; the videos lie in
`config.data.media`.
"""

import json
import os
import pathlib

from absl import flags
from ml_collections import config_flags

from hourjax import command, jax_environment, progress
from hourjax.alignment.captions import read_captioned_frames
from hourjax.alignment.siglip_loss import save_alignment, train_alignment
from hourjax.data.tokenizer import Tokenizer
from hourjax.training.checkpoint_format import (
  checkpoint_folder,
  checkpoint_steps,
)
from hourjax.training.config import build_experiment
from hourjax.training.workdir import check_workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_CAPTIONS = flags.DEFINE_string("captions", None, "File of captions.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def main(_: list[str]) -> None:
  """Runs the command."""
  jax_environment.keep_freed_memory(os.environ)
  experiment = build_experiment(command.given(_CONFIG).to_dict())
  workdir = pathlib.Path(command.given(_WORKDIR))
  check_workdir(experiment, workdir)
  if checkpoint_steps(checkpoint_folder(workdir)):
    print(f"already aligned: {workdir}")
    return
  with progress.step("reading the captions and their frames"):
    data = read_captioned_frames(
      command.given(_CAPTIONS),
      experiment.data.media,
      experiment.model.vision.image_size,
    )
  tokenizer = Tokenizer.from_folder(experiment.data.tokenizer)
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / "metrics.jsonl").open("w") as file:
    state, numbers = train_alignment(
      experiment,
      data,
      tokenizer,
      lambda row: print(json.dumps(row), file=file, flush=True),
    )
  save_alignment(experiment, state, workdir)
  print(f"{len(data.frames):,} frames and {len(data.texts)} texts")
  if numbers["held_out_frames"]:
    print(
      f"{numbers['named']:.1%} of the captions of"
      f" {numbers['held_out_frames']:,} frames of other videos rank above all"
      " other texts, for each token by itself"
    )


if __name__ == "__main__":
  command.run(main, required=["config", "captions", "workdir"])
