"""Extracts tower features of videos into a feature store.

  python -m hourjax.extract --config=configs/demo.py \
      --videos=work/data/videos --out=work/data/features

The tower is the one that training with this configuration starts from.
Finished videos are skipped, so a stopped run can be started again.
"""

from absl import app, flags
from ml_collections import config_flags

from hourjax import command
from hourjax.inference.extraction import extract_videos
from hourjax.training.experiment import build_experiment
from hourjax.training.initial import initial_params

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_VIDEOS = flags.DEFINE_string("videos", None, "Folder of videos.")
_OUT = flags.DEFINE_string("out", None, "Folder of the feature store.")
_FRAMES = flags.DEFINE_integer("batch_frames", 256, "Frames encoded at a time.")


def main(argv: list[str]) -> None:
  command.begin(argv)
  with command.user_errors():
    experiment = build_experiment(_CONFIG.value.to_dict())
    extract_videos(
      initial_params(experiment),
      experiment.model,
      videos=_VIDEOS.value,
      out=_OUT.value,
      batch_frames=_FRAMES.value,
    )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "videos", "out"])
  app.run(main)
