"""Trains Hour-LLaVA.

  python -m hourjax.train --config=configs/hourllava.py:size=3b,stage=3 \
      --config.data.dataset=videomarathon --workdir=work/run

Any key of the configuration can be set as --config.KEY=VALUE; an unknown one
fails. A configuration is a Python file, which runs: give only those you trust.
Nothing else that is read runs: data, features, tokenizers, weights and workdirs
may come from strangers.

Started again with the same workdir, the run continues. SIGTERM and Ctrl-C save
a checkpoint first; after SIGTERM the status is 0.

On a TPU VM of several hosts, start the same line on each; elsewhere see
`hourjax.parallel.hosts`.
"""

import pathlib
import signal
import sys

from absl import flags
from ml_collections import config_flags

from hourjax import command
from hourjax.errors import UserError
from hourjax.parallel import hosts
from hourjax.training.config import build_experiment
from hourjax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_PROFILE = flags.DEFINE_string(
  "profile_steps",
  None,
  "a:b traces steps a to b-1 (the same as --config.watch.profile_steps).",
)


def main(_: list[str]) -> None:
  config = _CONFIG.value.to_dict()
  if _PROFILE.value is not None:
    config["watch"]["profile_steps"] = _PROFILE.value
  if "://" in _WORKDIR.value:
    raise UserError(
      f"--workdir={_WORKDIR.value} is a URL; a run needs a folder: give one"
      " that all hosts share, such as a mounted disk (see WORKSPACE.md)"
    )
  experiment = build_experiment(config)
  hosts.start_hosts()
  with hosts.leaving():
    ended_by = train(experiment, pathlib.Path(_WORKDIR.value))
  if ended_by == signal.SIGINT:
    sys.exit(128 + ended_by)


if __name__ == "__main__":
  command.run(main, required=["config", "workdir"])
