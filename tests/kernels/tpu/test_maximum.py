"""A query's reference is the maximum over its first keys, and stays.

Where later scores rise too far above it the forward pass is repeated with a
running maximum. Both must give the same numbers, and the second only if need
be: it takes longer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels.tpu.call import attend
from tests.kernels.tpu import comparison
from tests.kernels.tpu.comparison import NEVER, draw, runs

slow = pytestmark = pytest.mark.slow  # a quick look has `test_kernels`
QUERIES, KEYS, DIM = 40, 700, 128
LEAN = 4
FLOAT32 = 8 * 200 * 2**-23
ALL = runs((1, QUERIES), total=QUERIES), runs((1, KEYS), total=KEYS)


@pytest.fixture(scope="module")
def repeats():
  """An item for every call that was repeated."""
  ran = []

  def recorded(*args, running, **kwargs):
    if running:
      jax.debug.callback(lambda: ran.append(True))
    return real(*args, running=running, **kwargs)

  real = attend._call
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attend, "_call", recorded)
    yield ran


@pytest.fixture(autouse=True)
def none_yet(repeats):
  repeats.clear()


def scores(*levels, dtype=jnp.float32):
  """Inputs whose scores, from a key on, are about a level, in nats.

  Levels are (first key, score). All queries lean to one corner, and the keys
  to it or away from it.
  """
  q, k, v, d_out = draw(0, 1, QUERIES, KEYS, 8, 1, DIM)
  q += LEAN
  noise = k.copy()
  for first, level in levels:
    k[:, first:] = noise[:, first:] + level / LEAN * DIM**-0.5
  return [jnp.asarray(x, dtype) for x in (q, k, v, d_out)]


def check(inputs, segments, tolerance):
  """Outputs and gradients, to a part of the largest."""
  got = comparison.ours(inputs, *segments, key="repeats")
  reference = comparison.expected(inputs, *segments)
  for x in got:
    assert np.isfinite(np.asarray(x, np.float32)).all()
  for name, x, y in zip(comparison.NAMES, got, reference):
    atol = tolerance * max(1.0, np.abs(y[y > NEVER]).max())
    np.testing.assert_allclose(
      np.asarray(x, np.float64), y, rtol=0, atol=atol, err_msg=name
    )
  jax.effects_barrier()


# A score of 200 is known to some roundings of 200 * 2 ** -23 in float32, and so
# are weights. In bfloat16 they have 8 bits, and gradients lack the cancelling
# of what all keys have in common.
dtypes = pytest.mark.parametrize(
  "dtype, tolerance",
  [
    pytest.param(jnp.float32, FLOAT32, id="float32"),
    pytest.param(jnp.bfloat16, 3e-2, id="bfloat16", marks=slow),
  ],
)


@dtypes
@pytest.mark.parametrize(
  "levels",
  [
    [(300, 200)],
    # Within the first tile, after its first chunk.
    pytest.param([(128, 110)], marks=slow),
    pytest.param([(200, 60), (400, 120), (699, 180)], marks=slow),
    pytest.param([(0, -110), (400, 0)], marks=slow),
  ],
)
def test_a_steep_rise_is_computed_again(repeats, levels, dtype, tolerance):
  check(scores(*levels, dtype=dtype), ALL, tolerance)
  assert repeats == [True]


@dtypes
@pytest.mark.parametrize(
  "levels",
  [
    [(128, 50)],
    pytest.param([(0, 200), (10, 0)], marks=slow),
    pytest.param([(0, 200), (256, 0), (600, -200)], marks=slow),
    pytest.param([(0, -100), (100, -50)], marks=slow),
    # In a tile with padding the maximum runs.
    pytest.param([(0, -100), (600, 0)], marks=slow),
  ],
)
def test_a_gentle_rise_and_any_fall_are_not(repeats, levels, dtype, tolerance):
  check(scores(*levels, dtype=dtype), ALL, tolerance)
  assert not repeats


def test_a_rise_after_tiles_of_several_segments(repeats):
  """The reference of the second segment comes from a tile it shares."""
  segments = (
    runs((1, 11), (2, 20), total=QUERIES),
    runs((1, 200), (2, 400), total=KEYS),
  )
  check(scores((300, 200)), segments, FLOAT32)
  assert repeats == [True]
  repeats.clear()
  check(scores((250, 200)), segments, FLOAT32)
  assert not repeats


def test_a_rise_within_shared_tiles_needs_no_repeat(repeats):
  """There the maximum runs."""
  segments = (
    runs((1, 11), (2, 20), total=QUERIES),
    runs((1, 250), (2, 260), total=KEYS),
  )
  check(scores((130, 200), (250, 0), (256, 0), (280, 200)), segments, FLOAT32)
  assert repeats == []


def test_an_id_within_the_range_of_a_tile_that_lacks_it(repeats):
  """Out of order, a tile of 1 and 3 seems to have shown segment 2."""
  segments = (
    runs((2, 30), total=QUERIES),
    runs((1, 100), (3, 156), (2, 300), total=KEYS),
  )
  check(scores(), segments, FLOAT32)
  assert repeats == [True]


def test_one_query_of_many_may_rise(repeats):
  inputs = scores((300, 200))
  lean = LEAN * (np.arange(DIM) % 2 * 2 - 1)  # to another corner
  one = np.zeros((1, QUERIES, 8, 1), bool)
  one[0, 23, 5] = True
  inputs[0] = inputs[0] - np.where(one, 0, LEAN - lean).astype(np.float32)
  check(inputs, ALL, FLOAT32)
  assert repeats == [True]


def test_huge_scores_do_not_overflow(repeats):
  """In the ten thousands: float32 holds them to 1e-2."""
  q, k, v, d_out = draw(1, 1, QUERIES, KEYS, 8, 1, DIM)
  inputs = [jnp.asarray(x) for x in (q * 100, k * 100, v, d_out)]
  got = comparison.ours(inputs, *ALL, key="repeats")
  reference = comparison.expected(inputs, *ALL)
  for x in got:
    assert np.isfinite(x).all()
  np.testing.assert_allclose(got[0], reference[0], rtol=0, atol=2e-2)
  np.testing.assert_allclose(got[1], reference[1], rtol=1e-6, atol=0)
  jax.effects_barrier()
  assert repeats == [True]


@slow
def test_the_running_maximum_alone(repeats, monkeypatch):
  """Ordinary numbers, repeated because any sum is too large."""
  monkeypatch.setattr(attend, "LARGEST", 1.5)
  segments = (
    runs((1, 11), (2, 20), total=QUERIES),
    runs((1, 100), (2, 600), total=KEYS),
  )
  inputs = draw(2, 1, QUERIES, KEYS, 8, 1, DIM)
  out, lse = comparison.forward(*inputs[:3], *segments, key="never enough")
  jax.effects_barrier()
  assert repeats == [True]
  # The repeated call also gives up: its sums are sums of many weights, too.
  seen = segments[0][0] > 0
  assert np.isinf(lse[0, seen]).all()
  np.testing.assert_allclose(
    out, comparison.expected(inputs, *segments)[0], rtol=0, atol=2e-5
  )
