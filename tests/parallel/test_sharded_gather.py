"""Gradients of gathers, on one device; on meshes they are in the train step."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hourjax.data.repository import MIN_FRAMES, repeated_frames
from hourjax.parallel import sharded_gather

WIDTH, TOKENS = 8, 4  # channels, tokens of a frame
# Rounding a float32 sum to bfloat16, half of a unit of its last place.
ROUNDED = 2.0**-8


def _gradients_of_copies(shape):
  """Gradients of one sign, as bfloat16, whose sum loses most when rounded."""
  rng = np.random.default_rng(0)
  return rng.uniform(0.5, 1.5, shape).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("frames", [1, 3, 127])
@pytest.mark.parametrize("kind", ["stored", "encoded"])
def test_gradients_of_repeated_frames_are_summed_in_float32(frames, kind):
  """Against float64; a frame of one stands in memory 128 times."""
  shown = repeated_frames(frames)
  tokens = (shown[:, None] * TOKENS + np.arange(TOKENS)).reshape(-1)
  # Newlines stand between, and must not be added to any token.
  source = np.stack([tokens, np.full_like(tokens, -1)], axis=1).reshape(1, -1)
  there = jnp.ones((1, frames * TOKENS, WIDTH), jnp.bfloat16)
  nothing = jnp.ones((1, 0, WIDTH), jnp.bfloat16)
  newline = jnp.ones(WIDTH, jnp.float32)
  d_memory = _gradients_of_copies((1, source.size, WIDTH))

  def memory(visual, newline):
    parts = (visual, nothing) if kind == "stored" else (nothing, visual)
    index = jnp.asarray(source, jnp.int32)
    return sharded_gather.build_memory(*parts, newline, index)

  _, pull = jax.vjp(memory, there, newline)
  d_visual, d_newline = pull(jnp.asarray(d_memory))
  expected = np.zeros((frames * TOKENS, WIDTH))
  np.add.at(expected, tokens, d_memory[0, 0::2].astype(np.float64))
  assert d_visual.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(d_visual[0], np.float64), expected, rtol=ROUNDED
  )
  whole = d_memory[0, 1::2].astype(np.float64).sum(0)
  np.testing.assert_allclose(d_newline, whole, rtol=1e-5)


def test_gradients_of_a_row_that_many_read_are_summed_in_float32():
  """As of a memory token that several conversations keep."""
  index = jnp.zeros((1, MIN_FRAMES), jnp.int32)
  table = jnp.ones((1, 3, WIDTH), jnp.bfloat16)
  d_rows = _gradients_of_copies((1, MIN_FRAMES, WIDTH))
  _, pull = jax.vjp(lambda t: sharded_gather.gather_rows(t, index), table)
  (d_table,) = pull(jnp.asarray(d_rows))
  expected = d_rows[0].astype(np.float64).sum(0)
  np.testing.assert_allclose(
    np.asarray(d_table[0, 0], np.float64), expected, rtol=ROUNDED
  )
  assert not np.asarray(d_table[0, 1:], np.float64).any()
