"""The losses of pairs and of rewarded answers, as weights of their labels.

Both are functions of the log-probabilities of single labels. Their gradient is
that of a cross entropy whose weights are their derivatives, so a step is one
forward and one backward pass, and only the vocabulary's products of labels are
computed once more, without a gradient:

    hidden = model(batch)
    losses = -log p of each label            no gradient
    weight = d(objective) / d(losses)        by hand, below
    loss   = sum(weight x losses)            with its gradient
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hourjax.batch import Batch
from hourjax.models.hourllava import HourLLaVA
from hourjax.parallel import vocabulary
from hourjax.training.train_step import LossSum


class AnswerBatch(NamedTuple):
  """Holds rows of answers that are compared, or rewarded.

  Only the tokens of these answers have a target in `batch`; what its
  `target_weight` holds, the objective says.

  Attributes:
    batch: the rows.
    pair: int32 [B, L], the number of the pair in its row, from 1; 0 where there
      is no label.
    share: float32 [B, L]; of an answer that counts, 1 / its labels.
    reference: float32 [B, L], what the reference model makes of the labels.
  """

  batch: Batch
  pair: Int[Array, "B L"]
  share: Float[Array, "B L"]
  reference: Float[Array, "B L"]

  @property
  def target(self) -> Int[Array, "B L"]:
    """Returns the labels."""
    return self.batch.target


def dpo_loss(
  model: HourLLaVA,
  rows: AnswerBatch,
  *,
  beta: float,
  smoothing: float = 0.0,
  sft_weight: float = 0.0,
) -> LossSum:
  """Returns the loss of direct preference optimisation (arXiv 2305.18290).

  With m = (log p - log r)(chosen) - (log p - log r)(rejected), p the model and
  r the reference, a pair's loss is -log sigmoid(beta m). With smoothing e it is
  -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m).

  Args:
    model: that learns.
    rows: pairs. `target_weight` is 1 at the labels of chosen answers and -1 at
      those of rejected ones; `share` is that of chosen answers; `reference` has
      at the first label of each answer its -log r, 0 elsewhere.
    beta: of the loss.
    smoothing: share of pairs that are taken to be the wrong way round.
    sft_weight: of the mean cross entropy of the chosen answers beside it.

  Returns:
    Sums over pairs.
  """
  batch = rows.batch
  hidden = model(batch)
  losses = _losses(model, hidden, batch)
  sign = batch.target_weight
  margin = beta * _by_pair(sign * (rows.reference - losses), rows.pair)
  there = _by_pair(rows.share, rows.pair) > 0
  log_right, log_wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
  value = -(1 - smoothing) * log_right - smoothing * log_wrong
  # Of the value by a pair's margin m, without the sign.
  slope = beta * (
    (1 - smoothing) * jax.nn.sigmoid(-margin)
    - smoothing * jax.nn.sigmoid(margin)
  )
  of_label = jnp.take_along_axis(slope, jnp.maximum(rows.pair - 1, 0), axis=1)
  weight = sign * of_label + sft_weight * rows.share
  chosen = (rows.share * losses).sum()
  total = jnp.where(there, value, 0).sum() + sft_weight * chosen
  return LossSum(
    _with_gradient(model, hidden, batch, weight, total),
    there.sum().astype(jnp.float32),
    {
      "dpo/preferred": (there & (margin > 0)).sum().astype(jnp.float32),
      "dpo/margin": jnp.where(there, margin, 0).sum(),
      "dpo/chosen_loss": chosen,
    },
  )


DPO_MEANS = ("dpo/preferred", "dpo/margin", "dpo/chosen_loss")


def grpo_loss(model: HourLLaVA, rows: AnswerBatch, *, kl: float) -> LossSum:
  """Returns the policy gradient of answers that this very model sampled.

  There is one update for each sampling, so the ratio of probabilities that
  others clip is 1, and its gradient is that of the log-probability. With the
  reference r and p of the model, each label also costs kl (r/p - log r/p - 1),
  an estimate of the divergence from the reference that is never below 0
  (arXiv 2402.03300, equation 4).

  Args:
    model: that sampled the answers.
    rows: answers. `target_weight` is an answer's advantage x `share`;
      `reference` is -log r of each label.
    kl: weight of the divergence.

  Returns:
    Sums over answers.
  """
  batch = rows.batch
  hidden = model(batch)
  losses = _losses(model, hidden, batch)
  weight, total = batch.target_weight, (batch.target_weight * losses).sum()
  means = {"grpo/answer_loss": (rows.share * losses).sum()}
  if kl:
    log_ratio = jnp.where(rows.share > 0, losses - rows.reference, 0)
    ratio = jnp.exp(log_ratio)
    divergence = (rows.share * (ratio - log_ratio - 1)).sum()
    weight = weight + kl * rows.share * (ratio - 1)
    total = total + kl * divergence
    means["grpo/kl"] = divergence
  return LossSum(
    _with_gradient(model, hidden, batch, weight, total),
    rows.share.sum(),
    means,
  )


def grpo_means(kl: float) -> tuple[str, ...]:
  """Returns the names of what `grpo_loss` returns beside its total."""
  return ("grpo/answer_loss", *(("grpo/kl",) if kl else ()))


def _losses(
  model: HourLLaVA, hidden: Float[Array, "B L D"], batch: Batch
) -> Float[Array, "B L"]:
  """Returns -log p of each label, without a gradient."""
  with jax.named_scope("lm_head"):
    table = jax.lax.stop_gradient(model.output_embedding)
    return vocabulary.token_losses(
      jax.lax.stop_gradient(hidden), table, batch.target
    )


def _with_gradient(
  model: HourLLaVA,
  hidden: Float[Array, "B L D"],
  batch: Batch,
  weight: Float[Array, "B L"],
  value: Float[Array, ""],
) -> Float[Array, ""]:
  """Returns a value whose gradient is that of weight x cross entropy."""
  with jax.named_scope("lm_head"):
    weighted = vocabulary.cross_entropy(
      hidden, model.output_embedding, batch.target, weight
    )
  return jax.lax.stop_gradient(value - weighted) + weighted


def _by_pair(
  values: Float[Array, "B L"], pair: Int[Array, "B L"]
) -> Float[Array, "B L"]:
  """Returns the sums over each pair; that of pair n is at n - 1."""

  def row_sums(values: Array, pair: Array) -> Array:
    sums = jax.ops.segment_sum(values, pair, num_segments=len(pair) + 1)
    return sums[1:]

  return jax.vmap(row_sums)(values, pair)
