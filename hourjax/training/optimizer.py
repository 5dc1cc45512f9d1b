"""AdamW with a learning rate for each component, and what is frozen."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import optax

from hourjax.errors import UserError

MuDtype = Literal["float32", "bfloat16"]
COMPONENTS = ("vision", "projector", "memaug", "decoder")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW, cosine to zero after a linear warm-up (SPEC section 3).

  Attributes:
    vision, projector, memaug, decoder: peak learning rates. A component at 0
      is frozen: no gradient is computed and no optimizer state exists. The
      newline token trains with the decoder.
    warmup: share of all steps.
    clip: global gradient norm above which gradients are scaled; 0 is off.
    mu_dtype: "float32" or "bfloat16", of the first moment. The second stays
      float32: with b2 = 0.999 bfloat16 would round its every change away.
  """

  vision: float = 0.0
  projector: float = 1e-4
  memaug: float = 1e-4
  decoder: float = 2e-5
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  warmup: float = 0.03
  clip: float = 0.0
  mu_dtype: MuDtype = "float32"

  def __post_init__(self):
    if self.mu_dtype not in get_args(MuDtype):
      raise UserError(
        f"config.optimizer.mu_dtype is {self.mu_dtype!r}; choose float32 or"
        " bfloat16"
      )

  def rate(self, component: str) -> float:
    """Peak learning rate of a component."""
    return getattr(self, component)


def component(path: str) -> str:
  """The component that a parameter trains with."""
  head = path.split("/")[0]
  return "decoder" if head == "newline" else head


def split_params(
  params: Mapping[str, Any], config: OptimizerConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(trained, frozen) parameters.

  Raises:
    UserError: if nothing is trained.
  """
  trained = {p: v for p, v in params.items() if config.rate(component(p)) > 0}
  if not trained:
    rates = ", ".join(f"{c}={config.rate(c)}" for c in COMPONENTS)
    raise UserError(
      f"no parameter is trained: learning rates {rates}; raise one of them"
    )
  return trained, {p: v for p, v in params.items() if p not in trained}


def schedule(peak: float, steps: int, warmup: float) -> optax.Schedule:
  """Learning rate by step: linear to `peak`, then cosine to 0 at `steps`."""
  rise = math.ceil(warmup * steps)

  return optax.warmup_cosine_decay_schedule(
    init_value=0.0 if rise else peak,
    peak_value=peak,
    warmup_steps=rise,
    decay_steps=max(steps, rise + 1),
  )


def make_optimizer(
  config: OptimizerConfig, steps: int, paths: Iterable[str]
) -> optax.GradientTransformation:
  """The transformation of gradients by path.

  Args:
    config: rates and the rest.
    steps: of the whole run, for the schedule.
    paths: of the trained parameters.
  """
  labels = {path: component(path) for path in paths}
  rules = {
    name: optax.adamw(
      schedule(config.rate(name), steps, config.warmup),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mu_dtype=config.mu_dtype,
    )
    for name in sorted(set(labels.values()))
  }
  adam = optax.partition(rules, labels)
  if not config.clip:
    return adam
  return optax.chain(optax.clip_by_global_norm(config.clip), adam)
