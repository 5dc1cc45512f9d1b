"""Writes videos of up to 8 hours with needles at chosen depths, as features.

  python -m hourjax.haystack --config=configs/demo.py:stage=0 \
      --tower=work/stage0 --out=work/haystack
  python -m hourjax.evaluate --model=work/memaug --benchmark=records \
      --data=work/haystack --features=work/haystack/features

The videos are those of the demo's world, drawn frame by frame and encoded by
the tower; no video file is written. Each shows a card for a second or two and,
next to it, a moving clip of 3 to 10 seconds, both in frames that forgetting
drops. Four questions ask for them. The report of `hourjax.evaluate` then has a
picture of the accuracy by length and depth.
"""

from absl import flags
from ml_collections import config_flags

from hourjax import command, progress
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder, tower_params
from hourjax.extraction.haystack import write_haystack
from hourjax.training.config import build_experiment

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_TOWER = flags.DEFINE_string("tower", None, "Folder with the tower's weights.")
_OUT = flags.DEFINE_string("out", None, "Folder of features and questions.")
_MINUTES = flags.DEFINE_list(
  "minutes", "4,10,30,60,120,240,480", "Lengths of the videos."
)
_DEPTHS = flags.DEFINE_integer("depths", 5, "Number of depths.", 1, 100)
_VIDEOS = flags.DEFINE_integer(
  "videos", 4, "Videos of each length and depth.", 1, 100
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the videos.", 0, command.LAST_SEED
)


def main(_: list[str]) -> None:
  """Runs the command."""
  experiment = build_experiment(command.given(_CONFIG).to_dict())
  minutes = [_minutes(text) for text in _MINUTES.value]
  with progress.step("reading the tower"):
    params = tower_params(experiment, command.given(_TOWER))
  out = command.given(_OUT)
  scripts = write_haystack(
    Encoder(params, experiment.model),
    out,
    minutes=minutes,
    depths=_DEPTHS.value,
    videos=_VIDEOS.value,
    seed=_SEED.value,
  )
  hours = sum(script.duration for script in scripts) / 3600
  print(
    f"{len(scripts)} videos of {min(minutes)} to {max(minutes)} minutes"
    f" ({hours:.1f} h) and {4 * len(scripts)} questions in {out}"
  )


def _minutes(text: str) -> int:
  """Returns a length of --minutes.

  Raises:
    UserError: it is no whole number.
  """
  if not text.strip().isdigit():
    raise UserError(
      f"--minutes: {text!r} is no whole number of minutes; write"
      " --minutes=10,60,480"
    )
  return int(text)


if __name__ == "__main__":
  command.run(
    main,
    required=["config", "tower", "out"],
    resume="what is stored so far counts, make room and start again",
    writes="out",
  )
