"""Trains by the objective that a configuration names."""

import pathlib

from hourjax.objectives.dpo import PreferenceObjective
from hourjax.objectives.grpo import RewardObjective
from hourjax.training import loop
from hourjax.training.config import Experiment

OBJECTIVES: dict[str, type[loop.Objective]] = {
  "sft": loop.Objective,
  "dpo": PreferenceObjective,
  "grpo": RewardObjective,
}


def train(experiment: Experiment, workdir: pathlib.Path) -> int | None:
  """Trains to the last step, see `hourjax.training.loop.train`.

  Args:
    experiment: what to train; `objective.name` says what is optimised.
    workdir: folder of the run.

  Returns:
    The number of the signal that ended the run early, None otherwise.

  Raises:
    UserError: something is wrong with data, weights or configuration.
  """
  objective = OBJECTIVES[experiment.objective.name](experiment)
  return loop.train(experiment, workdir, objective)
