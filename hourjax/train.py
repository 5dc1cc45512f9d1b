"""Trains Hour-LLaVA.

  python -m hourjax.train --config=configs/hourllava.py:size=3b,stage=3 \
      --config.data.dataset=videomarathon --workdir=work/run

Any key of the configuration can be set as --config.KEY=VALUE; an unknown one
fails. Started again with the same workdir, the run continues.
"""

import pathlib

from absl import app, flags
from ml_collections import config_flags

from hourjax import command
from hourjax.training.experiment import build_experiment
from hourjax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def main(argv: list[str]) -> None:
  command.begin(argv)
  with command.user_errors():
    train(
      build_experiment(_CONFIG.value.to_dict()), pathlib.Path(_WORKDIR.value)
    )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
