"""Losses of pairs and of answers, beside plain ones in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.batch import IGNORE
from hourjax.data.rows import RowSpec, Size
from hourjax.models.hourllava import HourLLaVA
from hourjax.objectives import answer_rows
from hourjax.objectives.losses import dpo_loss, grpo_loss

WORDS, WIDTH, LENGTH = 13, 6, 24
SPEC = RowSpec(Size(decoder=LENGTH), 1, 1, 1, 1)
RNG = np.random.default_rng(0)


def _stub(params):
  """A model whose hidden states are parameters."""

  class Stub(HourLLaVA):
    def __init__(self):
      pass

    def __call__(self, batch):
      return params["hidden"]

    @property
    def output_embedding(self):
      return params["table"]

  return Stub()


@pytest.fixture(scope="module")
def params():
  return {
    "hidden": jnp.float32(RNG.normal(size=(2, LENGTH, WIDTH))),
    "table": jnp.float32(RNG.normal(size=(WORDS, WIDTH))),
  }


# (row, first position, labels, pair) of each answer.
ANSWERS = [(0, 2, 3, 1), (0, 6, 5, 1), (0, 12, 1, 2), (0, 14, 4, 2),
           (1, 0, 2, 1), (1, 5, 7, 1)]  # fmt: skip


@pytest.fixture(scope="module")
def rows():
  """Three pairs in two rows, with padding."""
  made = answer_rows.empty_answers(SPEC, 2)
  for array in made.batch:
    array[...] = 0
  made.batch.target[...] = IGNORE
  for number, (row, first, count, pair) in enumerate(ANSWERS):
    own = row, slice(first, first + count)
    chosen = number % 2 == 0
    made.batch.target[own] = RNG.integers(0, WORDS, count)
    made.batch.target_weight[own] = 1 if chosen else -1
    made.pair[own] = pair
    made.share[own] = 1 / count if chosen else 0
    made.reference[row, first] = RNG.uniform(1, 9)
  return made


def _log_probabilities(params, rows):
  logits = params["hidden"] @ params["table"].T
  logs = jax.nn.log_softmax(logits, -1)
  target = jnp.maximum(rows.batch.target, 0)
  return jnp.take_along_axis(logs, target[..., None], -1)[..., 0]


def _plain_dpo(params, rows, *, beta, smoothing, sft_weight):
  """The loss as the paper writes it, pair by pair, and what it counts."""
  logs, total = _log_probabilities(params, rows), 0.0
  for chosen, rejected in zip(ANSWERS[::2], ANSWERS[1::2]):
    gains = []
    for row, first, count, _ in (chosen, rejected):
      said = logs[row, first : first + count].sum()
      gains.append(said + rows.reference[row, first])
    margin = beta * (gains[0] - gains[1])
    total -= (1 - smoothing) * jnp.log(1 / (1 + jnp.exp(-margin)))
    total -= smoothing * jnp.log(1 / (1 + jnp.exp(margin)))
    row, first, count, _ = chosen
    total -= sft_weight * logs[row, first : first + count].mean()
  return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_dpo_is_the_plain_loss(params, rows, smoothing, sft_weight):
  options = {"beta": 0.3, "smoothing": smoothing, "sft_weight": sft_weight}

  def ours(params):
    found = dpo_loss(_stub(params), jax.tree.map(jnp.asarray, rows), **options)
    return found.total, found

  (total, found), grads = jax.value_and_grad(ours, has_aux=True)(params)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    plain = functools.partial(_plain_dpo, rows=rows, **options)
    value, expected = jax.value_and_grad(plain)(wide)
    assert expected["hidden"].dtype == jnp.float64
  np.testing.assert_allclose(total, value, rtol=1e-5)
  for name in params:
    np.testing.assert_allclose(grads[name], expected[name], atol=2e-6)
  assert found.weight == 3


def test_dpo_counts_what_is_preferred(params, rows):
  found = dpo_loss(_stub(params), jax.tree.map(jnp.asarray, rows), beta=1.0)
  logs = np.asarray(_log_probabilities(params, rows))
  sums = [
    logs[row, first : first + count].sum() + rows.reference[row, first]
    for row, first, count, _ in ANSWERS
  ]
  margins = np.array(sums[::2]) - np.array(sums[1::2])
  assert found.means["dpo/preferred"] == (margins > 0).sum()
  np.testing.assert_allclose(
    found.means["dpo/margin"], margins.sum(), rtol=1e-5
  )


@pytest.mark.parametrize("kl", [0.0, 0.4])
def test_grpo_is_the_plain_policy_gradient(params, rows, kl):
  gains = RNG.normal(size=len(ANSWERS))
  reference = RNG.uniform(1, 4, rows.share.shape).astype(np.float32)
  share, weight = np.zeros_like(rows.share), np.zeros_like(rows.share)
  for gain, (row, first, count, _) in zip(gains, ANSWERS):
    own = row, slice(first, first + count)
    share[own], weight[own] = 1 / count, gain / count
  batch = rows.batch._replace(target_weight=weight)
  given = jax.tree.map(
    jnp.asarray, rows._replace(batch=batch, share=share, reference=reference)
  )

  def plain(params):
    logs, total = _log_probabilities(params, rows), 0.0
    for gain, (row, first, count, _) in zip(gains, ANSWERS):
      own = row, slice(first, first + count)
      ratio = jnp.exp(-reference[own] - logs[own])
      divergence = ratio - jnp.log(ratio) - 1
      total += (-gain * logs[own] + kl * divergence).mean()
    return total

  def ours(params):
    found = grpo_loss(_stub(params), given, kl=kl)
    return found.total, found

  (total, found), grads = jax.value_and_grad(ours, has_aux=True)(params)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    value, expected = jax.value_and_grad(plain)(wide)
  np.testing.assert_allclose(total, value, rtol=1e-5)
  for name in params:
    # Ratios to the reference make some of them as large as 70.
    np.testing.assert_allclose(
      grads[name], expected[name], atol=5e-6, rtol=2e-6
    )
  np.testing.assert_allclose(found.weight, len(ANSWERS), rtol=1e-6)
