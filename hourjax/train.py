"""Trains Hour-LLaVA.

  python -m hourjax.train --config=configs/hourllava.py:size=3b,stage=3 \
      --config.data.dataset=videomarathon --workdir=work/run

Any key of the configuration can be set as --config.KEY=VALUE; an unknown key is
an error. A configuration is a Python program, so give only files that you
trust. Nothing else is executed: data, features, tokenizers, weights and
workdirs may come from strangers.

Started again with the same workdir, the run continues. On SIGTERM and Ctrl-C it
saves a checkpoint and exits; after SIGTERM with status 0.

On TPU VMs of several hosts, start the same line on each of them; elsewhere see
`hourjax.parallel.hosts`.
"""

import os
import pathlib
import signal
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from hourjax import command, jax_environment
from hourjax.errors import UserError
from hourjax.objectives.dpo import PreferenceObjective
from hourjax.objectives.grpo import RewardObjective
from hourjax.objectives.rewards import REWARDS
from hourjax.parallel import hosts
from hourjax.training.config import Experiment, build_experiment
from hourjax.training.loop import Objective, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_PROFILE = flags.DEFINE_string(
  "profile_steps",
  None,
  "a:b traces the steps a to b-1 (the same as --config.metrics.profile_steps).",
)


OBJECTIVES: dict[str, Callable[[Experiment], Objective]] = {
  "sft": Objective,
  "dpo": PreferenceObjective,
  "grpo": lambda experiment: RewardObjective(experiment, REWARDS),
}


def main(_: list[str]) -> None:
  """Runs the command."""
  jax_environment.keep_freed_memory(os.environ)
  config = command.given(_CONFIG).to_dict()
  workdir = command.given(_WORKDIR)
  if _PROFILE.value is not None:
    config["metrics"]["profile_steps"] = _PROFILE.value
  if "://" in workdir:
    raise UserError(
      f"--workdir={workdir} is a URL; a run needs a folder: give one"
      " that all hosts share, such as a mounted disk (see launch/README.md)"
    )
  experiment = build_experiment(config)
  hosts.start_hosts()
  with hosts.leaving():
    objective = OBJECTIVES[experiment.objective.name](experiment)
    ended_by = train(experiment, pathlib.Path(workdir), objective)
  if ended_by == signal.SIGINT:
    sys.exit(128 + ended_by)


if __name__ == "__main__":
  command.run(main, required=["config", "workdir"])
