"""Tokens that are sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.errors import UserError
from hourjax.inference.sampling import Sampling, row_sampling, sample

_sample = jax.jit(sample)
LOGITS = np.log(np.array([0.5, 0.1, 0.25, 0.15], np.float32))


def _drawn(sampling, rows=4000):
  logits = jnp.tile(LOGITS[None], (rows, 1))
  keys = row_sampling(sampling, 0, rows)
  tokens = _sample(logits, keys, jnp.zeros(rows, jnp.int32))
  return np.bincount(tokens, minlength=4) / rows


def test_greedy_takes_the_likeliest():
  np.testing.assert_array_equal(_drawn(Sampling()), [1, 0, 0, 0])


def test_temperature_draws_by_probability():
  np.testing.assert_allclose(
    _drawn(Sampling(1.0)), np.exp(LOGITS), rtol=0, atol=0.03
  )
  flat = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
  np.testing.assert_allclose(_drawn(Sampling(2.0)), flat, rtol=0, atol=0.03)


@pytest.mark.parametrize(
  "top_p, left", [(0.4, [0]), (0.7, [0, 2]), (0.8, [0, 2, 3]), (1.0, range(4))]
)
def test_top_p_keeps_the_nucleus(top_p, left):
  found = _drawn(Sampling(1.0, top_p))
  expected = np.zeros(4)
  expected[list(left)] = np.exp(LOGITS)[list(left)]
  np.testing.assert_allclose(
    found, expected / expected.sum(), rtol=0, atol=0.03
  )


def test_draws_depend_on_the_prompt_and_not_on_the_batch():
  logits = jax.random.normal(jax.random.key(0), (6, 50))
  count = jnp.arange(6)
  whole = _sample(logits, row_sampling(Sampling(1.0, 0.9, 5), 0, 6), count)
  part = _sample(
    logits[4:], row_sampling(Sampling(1.0, 0.9, 5), 4, 2), count[4:]
  )
  np.testing.assert_array_equal(whole[4:], part)
  other = _sample(logits, row_sampling(Sampling(1.0, 0.9, 6), 0, 6), count)
  assert (np.asarray(whole) != np.asarray(other)).any()


def test_draws_of_one_prompt_differ_by_count():
  logits = jnp.zeros((1, 1000))
  keys = row_sampling(Sampling(1.0), 0, 1)
  tokens = {int(_sample(logits, keys, jnp.array([n]))[0]) for n in range(20)}
  assert len(tokens) > 15


@pytest.mark.parametrize(
  "values, message",
  [
    ({"temperature": -1}, "temperature is -1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**32}, "seed is 4294967296; it must be 0 or more, below 2.32"),
  ],
)
def test_impossible(values, message):
  with pytest.raises(UserError, match=message):
    Sampling(**values)
