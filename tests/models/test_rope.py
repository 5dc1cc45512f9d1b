"""Rotary phases: float32, and the same ones at position 234,000."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.models import attention
from tests import golden_files

TABLES = golden_files.npz("rope_tables.npz")
BASE = 1e6

golden = pytest.mark.skipif(not TABLES, reason=golden_files.NO_GOLDEN)


@functools.partial(jax.jit, static_argnames="pairs")
def _rotated(unit, position, pairs):
  return attention.rope(unit, position, rotary_dim=2 * pairs, base=BASE)


def _rotated_unit(position, pairs):
  """(cos, sin) of each phase: where the channel pairs (1, 0) are rotated to."""
  unit = jnp.zeros((1, len(position), 1, 2 * pairs))
  unit = unit.at[..., :pairs].set(1.0)
  out = _rotated(unit, jnp.asarray(position)[None], pairs)
  return np.split(np.asarray(out[0, :, 0]), 2, axis=-1)


@golden
@pytest.mark.parametrize("key", [k for k in TABLES if k.endswith("inv_freq")])
def test_frequencies_are_the_same_floats(key, monkeypatch):
  """All of MemAug's, whose positions reach 234,000.

  torch's vectorised power is not correctly rounded: one of Qwen's 64 differs
  in its last bit (of index 37, 3.4e-4), and other CPUs and GPUs may differ
  elsewhere. At position 32,768 that is a phase of 1e-6.
  """
  expected = TABLES[key]
  # With cos gone, the unit vector at position 1 is rotated to the frequencies.
  monkeypatch.setattr(attention.jnp, "cos", lambda phase: phase)
  got, _ = _rotated_unit(np.array([1]), len(expected))
  assert got.dtype == expected.dtype == np.float32
  if key.startswith("memaug"):
    np.testing.assert_array_equal(got[0], expected)
  np.testing.assert_array_max_ulp(got[0], expected, maxulp=1)
  assert (got[0] != expected).mean() < 0.02


@golden
@pytest.mark.parametrize("jitted", [False, True])
def test_cos_and_sin_at_real_positions(jitted):
  """One wrong bit in a frequency would be 0.01 here, at 234,000."""
  pairs = TABLES["memaug_inv_freq"].size
  with jax.disable_jit(not jitted):
    cos, sin = _rotated_unit(TABLES["positions"], pairs)
  np.testing.assert_allclose(cos, TABLES["memaug_cos"], rtol=0, atol=1e-6)
  np.testing.assert_allclose(sin, TABLES["memaug_sin"], rtol=0, atol=1e-6)


def test_channels_beyond_rotary_dim_stay():
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 12))
  at = jnp.arange(10).reshape(2, 5) * 1000
  out = attention.rope(x, at, rotary_dim=8, base=BASE)
  np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
  np.testing.assert_array_equal(out[0, 0], x[0, 0])  # position 0
  np.testing.assert_allclose(
    jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
  )


def test_scores_depend_on_the_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

  def score(a, b):
    q_, k_ = (
      attention.rope(x, jnp.full((1, 1), at), rotary_dim=16, base=BASE)
      for x, at in ((q, a), (k, b))
    )
    return float(jnp.sum(q_ * k_))

  assert score(7, 3) == pytest.approx(score(1007, 1003), abs=2e-4)
  assert score(7, 3) != pytest.approx(score(3, 7), abs=1e-2)


def test_bfloat16_input_is_rotated_in_float32():
  x = jax.random.normal(jax.random.key(0), (1, 3, 1, 8)).astype(jnp.bfloat16)
  at = jnp.array([[0, 65_537, 234_000]])
  got = attention.rope(x, at, rotary_dim=8, base=BASE)
  assert got.dtype == jnp.bfloat16
  exact = attention.rope(x.astype(jnp.float32), at, rotary_dim=8, base=BASE)
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))
