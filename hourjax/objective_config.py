"""What a training optimises: answers, preferences or rewards.

The configuration knows these keys, and `hourjax.objectives` what they mean.
"""

import dataclasses
import math
from typing import Literal, get_args

from hourjax.errors import UserError

Name = Literal["sft", "dpo", "grpo"]
# Key -> the smallest and the largest value that makes sense.
LIMITS: dict[str, tuple[float, float]] = {
  "objective.beta": (0, 100),
  "objective.smoothing": (0, 0.5),
  "objective.sft_weight": (0, 1000),
  "objective.group": (2, 1024),
  "objective.temperature": (1e-3, 100),
  "objective.top_p": (1e-3, 1),
  "objective.max_tokens": (1, 2**16),
  "objective.kl": (0, 100),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """Says what is optimised; keys of the other objectives have no effect.

  Attributes:
    name: "sft", the cross entropy of the answers; "dpo", that chosen answers
      are likelier than rejected ones (arXiv 2305.18290); "grpo", the rewards of
      answers that the model samples (arXiv 2402.03300).
    beta: of dpo; how strongly the model is held to the reference.
    smoothing: of dpo; share of the pairs that are taken to be the wrong way
      round.
    sft_weight: of dpo; weight of the chosen answers' cross entropy beside the
      loss of the pairs.
    group: of grpo; answers sampled to each question.
    temperature: of grpo; of sampling.
    top_p: of grpo; of sampling.
    max_tokens: of grpo; longest answer.
    kl: of grpo; weight of the divergence from the reference, 0 for none (then
      no reference is held).
    normalise: of grpo; whether advantages are divided by the standard deviation
      of their group's rewards.
    rewards: of grpo; "NAME=WEIGHT,..." with names of
      `hourjax.objectives.rewards.REWARDS`.
    judge: of the reward "judge"; its model as MODEL@URL, an endpoint that
      speaks OpenAI's protocol.
  """

  name: Name = "sft"
  beta: float = 0.1
  smoothing: float = 0.0
  sft_weight: float = 0.0
  group: int = 8
  temperature: float = 1.0
  top_p: float = 1.0
  max_tokens: int = 32
  kl: float = 0.0
  normalise: bool = True
  rewards: str = "multiple_choice=1"
  judge: str = ""

  def __post_init__(self) -> None:
    if self.name not in get_args(Name):
      raise UserError(
        f"config.objective.name is {self.name!r}; choose sft, dpo or grpo"
      )
    if self.name == "grpo":
      self.reward_weights()

  def reward_weights(self) -> dict[str, float]:
    """Returns the weight of each reward, by name.

    Raises:
      UserError: `rewards` has another form, or a name twice.
    """
    weights: dict[str, float] = {}
    for item in filter(None, map(str.strip, self.rewards.split(","))):
      name, _, value = (part.strip() for part in item.partition("="))
      try:
        weight = float(value)
      except ValueError:
        weight = math.nan
      if not name or not math.isfinite(weight) or name in weights:
        raise UserError(
          f"config.objective.rewards: {item!r} must be NAME=WEIGHT with a"
          " number, each name once, such as multiple_choice=1,format=0.2"
        )
      weights[name] = weight
    if not any(weights.values()):
      raise UserError(
        f"config.objective.rewards is {self.rewards!r} and name is grpo:"
        " nothing is rewarded; give one, such as multiple_choice=1"
      )
    return weights
