"""AdamW or Muon with a rate for each component, and frozen components."""

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import optax
import optax.contrib

from hourjax.errors import UserError

MuDtype = Literal["float32", "bfloat16"]
OptimizerName = Literal["adamw", "muon"]
# Muon's update has this root mean square, as AdamW's has about, so that both
# take the same learning rates (arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2
_MUON = "/muon"  # ends the label of what Muon updates
COMPONENTS = ("vision", "projector", "memaug", "decoder")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Describes the optimizer, with warm-up and cosine decay, by component.

  The learning rate rises linearly and then falls to zero as a cosine; see
  hourjax/README.md, Training.

  Attributes:
    vision: peak learning rate of the vision encoder. A component whose rate is
      0 is frozen: it has no gradients and no optimizer state.
    projector: peak learning rate of the projector.
    memaug: peak learning rate of MemAug.
    decoder: peak learning rate of the decoder and the newline token.
    single_rate: peak learning rate of every component that is trained, in place
      of its own; 0 is off. Which are trained is still decided by their own.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: of AdamW, times the learning rate; see `decays` for what is
      spared.
    warmup: share of all steps in which the learning rate rises; see `schedule`.
    clip: gradients of a larger global norm are scaled down to it; 0 is off.
    mu_dtype: "float32" or "bfloat16", of the first moment. The second is always
      float32: with b2 = 0.999 it changes by a thousandth of itself at most,
      which bfloat16 rounds away.
    name: "adamw", or "muon": the kernels of linear layers get orthogonalised
      momentum (arXiv 2502.16982), everything else AdamW.
  """

  vision: float = 0.0
  projector: float = 1e-4
  memaug: float = 1e-4
  decoder: float = 2e-5
  single_rate: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  warmup: float = 0.03
  clip: float = 0.0
  mu_dtype: MuDtype = "float32"
  name: OptimizerName = "adamw"

  def __post_init__(self) -> None:
    if self.name not in get_args(OptimizerName):
      raise UserError(
        f"config.optimizer.name is {self.name!r}; choose adamw or muon"
      )
    if self.mu_dtype not in get_args(MuDtype):
      raise UserError(
        f"config.optimizer.mu_dtype is {self.mu_dtype!r}; choose float32 or"
        " bfloat16"
      )

  def rate(self, component: str) -> float:
    """Returns the peak learning rate of a component; 0 if it is frozen."""
    own = getattr(self, component)
    return self.single_rate if own and self.single_rate else own


def component(path: str) -> str:
  """Returns the component that a parameter is trained with."""
  head = path.split("/")[0]
  return "decoder" if head == "newline" else head


def decays(path: str) -> bool:
  """Returns whether weight decay applies to a parameter.

  As in Hugging Face's Trainer (`get_decay_parameter_names`), it spares biases
  and the scales of LayerNorm and RMSNorm. It does apply to embeddings, the
  tower's positions and the newline token.
  """
  return path.rpartition("/")[2] not in ("bias", "scale")


def split_params(
  params: Mapping[str, Any], config: OptimizerConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into those that are trained and those that are frozen.

  Args:
    params: by path.
    config: with the learning rates.

  Returns:
    (trained, frozen), both by path.

  Raises:
    UserError: nothing is trained.
  """
  trained = {p: v for p, v in params.items() if config.rate(component(p)) > 0}
  if not trained:
    rates = ", ".join(f"{c}={config.rate(c)}" for c in COMPONENTS)
    raise UserError(
      f"no parameter is trained: learning rates {rates}; raise one of them"
    )
  return trained, {p: v for p, v in params.items() if p not in trained}


def schedule(peak: float, steps: int, warmup: float) -> optax.Schedule:
  """Returns the learning rate as a function of the updates taken before.

  It is that of Hugging Face's `get_cosine_schedule_with_warmup` with
  `warmup_ratio`. With 100 steps and a warm-up of 3 % the rates of the updates
  are 0, 1/3, 2/3 and 1 of the peak, then a cosine; that of the last update is
  not 0 yet, but what the cosine gives one step before its end. So the first
  update changes nothing but the optimizer's moments.

  Args:
    peak: the largest rate.
    steps: of the run; the rate after the last one is 0.
    warmup: share of the steps in which the rate rises linearly from 0, rounded
      up to whole steps. Then it falls as a cosine.
  """
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
  """Returns the optimizer of parameters by path.

  Args:
    config: learning rates and the rest.
    steps: of the whole run, for the schedule.
    paths: of the trained parameters.
  """
  muon = config.name == "muon"
  labels = {
    path: component(path) + (_MUON if muon and uses_muon(path) else "")
    for path in paths
  }
  # None where nothing decays: a mask adds a level to the optimizer's state, and
  # checkpoints from before there was one have the state without it.
  mask = _decay_mask if config.weight_decay else None
  rules: dict[Hashable, optax.GradientTransformation] = {}
  for label in sorted(set(labels.values())):
    name = label.removesuffix(_MUON)
    rate = schedule(config.rate(name), steps, config.warmup)
    if label != name:
      rules[label] = optax.contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        weight_decay_mask=mask,
        mu_dtype=config.mu_dtype,
        muon_weight_dimension_numbers=_matrix_axes,
        consistent_rms=_MUON_RMS,
      )
    else:
      rules[label] = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=mask,
        mu_dtype=config.mu_dtype,
      )
  optimizer = optax.partition(rules, labels)
  if not config.clip:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(config.clip), optimizer)


def uses_muon(path: str) -> bool:
  """Returns whether a parameter is one that Muon orthogonalises.

  These are the kernels of linear layers. Embeddings, norms, biases and the
  convolution that cuts patches are left to AdamW, as Muon's authors do.
  """
  return path.endswith("/kernel") and not path.endswith("patch/kernel")


def _matrix_axes(params: Any) -> Any:
  """Returns input and output axis of kernels [*layers, in, out]."""
  return jax.tree.map(
    lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params
  )


def _decay_mask(params: Mapping[str, Any]) -> dict[str, bool]:
  return {path: decays(path) for path in params}
