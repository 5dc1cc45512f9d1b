"""Causal self-attention by the TPU kernels, interpreted, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.kernels.tpu import call
from hourjax.kernels.tpu.call import attend
from tests.kernels.tpu import comparison
from tests.kernels.tpu.comparison import NEVER, SMALL, WIDE, draw, runs

slow = pytest.mark.slow
LENGTH = 290  # of tiles of 64 queries, and of 256 keys in chunks of 128
# A chunk before all queries of a tile, on the diagonal, of several segments.
PACKED = runs((1, 150), (2, 1), (3, 130), total=LENGTH)
ALL = runs((1, LENGTH), total=LENGTH)

check = functools.partial(comparison.check, causal=True)
ours = functools.partial(comparison.ours, causal=True)


def inputs(seed, rows=1, heads=2, kv_heads=1, length=LENGTH, dim=8):
  return draw(seed, rows, length, length, heads, kv_heads, dim)


def test_packed_rows():
  """Also a segment of one position, which sees itself alone, and padding."""
  segment = np.concatenate([PACKED, ALL])
  out, lse, dq, dk, dv = check(inputs(0, rows=2), segment, segment)
  padding = segment == 0
  assert padding.any() and (lse[padding] == NEVER).all()
  for x in (out, dq, dk, dv):
    assert not np.asarray(x)[padding].any()


@slow
@pytest.mark.parametrize(
  "heads, kv_heads, dim, tiles",
  [
    pytest.param(8, 1, 128, SMALL, id="3b-halved"),
    pytest.param(7, 1, 64, WIDE, id="7b-in-four"),
    pytest.param(4, 2, 136, WIDE, id="4-2"),
  ],
)
def test_heads(heads, kv_heads, dim, tiles):
  check(inputs(1, 1, heads, kv_heads, dim=dim), PACKED, PACKED, tiles=tiles)


@slow
@pytest.mark.parametrize("length", [1, 65, 256])
def test_lengths_off_the_tiles(length):
  segment = runs((1, length), total=length)
  check(inputs(2, length=length), segment, segment)


@slow
def test_two_cores():
  segment = np.concatenate([PACKED, runs((1, 30), total=LENGTH)])
  check(inputs(3, 2, 4, 2), segment, segment, cores=2)


@slow
def test_segments_in_any_order():
  """An id may come back: its queries see its earlier keys as well."""
  segment = runs((2, 40), (1, 100), (2, 90), (0, 9), (1, 20), total=LENGTH)
  check(inputs(4), segment, segment)


@slow
def test_later_keys_may_hold_anything():
  """Keys of later tiles and of the same tile, and other segments."""
  clean = inputs(5)
  cut = 200
  dirty = [x.copy() for x in clean]
  for x in dirty:
    x[:, cut:] = 1e4
  one, other = (ours(x, ALL, ALL)[:2] for x in (clean, dirty))
  for x, y in zip(one, other):
    np.testing.assert_allclose(x[:, :cut], y[:, :cut], rtol=0, atol=1e-5)


@slow
def test_the_same_bits_every_time():
  segment = np.concatenate([PACKED, ALL])
  results = [ours(inputs(6, rows=2), segment, segment) for _ in range(2)]
  comparison.same(*results)


@slow
def test_bfloat16():
  """Weights and their gradients are rounded to 8 bits before they are used."""
  given = [jnp.asarray(x, jnp.bfloat16) for x in inputs(7, dim=128)]
  got = ours(given, PACKED, PACKED, out_dtype=jnp.bfloat16)
  reference = comparison.expected(given, PACKED, PACKED, causal=True)
  np.testing.assert_allclose(got[1], reference[1], rtol=0, atol=2e-5)
  # Several factors are rounded, by 2 ** -9 each, and the first queries see few
  # keys, so that no sum evens that out.
  for name, x, y in zip(comparison.NAMES, got, reference):
    if name != "lse":
      atol = 2**-7 * np.abs(y).max()
      x = np.asarray(x, np.float64)
      np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)


# --- in parts ---------------------------------------------------------------


@slow
@pytest.mark.parametrize("memory", [60, 44])
def test_little_scalar_memory(monkeypatch, memory):
  """Parts of the queries; and of the keys, some of which no query sees."""
  monkeypatch.setattr(call, "SMEM", memory)
  segment = np.concatenate([PACKED, ALL])
  given = inputs(8, rows=2)
  shapes = [
    split(SMALL, *map(jnp.asarray, given[:2]))
    for split in (call.split_forward, call.split_backward)
  ]
  whole = call._cut(SMALL.forward, *map(jnp.asarray, given[:2]))
  for shape in shapes:
    tiles = shape.query_tiles * shape.key_tiles
    assert tiles < whole.query_tiles * whole.key_tiles
  check(given, segment, segment, key=memory)


@slow
def test_gradients_of_queries_that_vmem_does_not_hold():
  """As of the whole heads of a decoder's row on v5p."""
  q, k = map(jnp.asarray, inputs(9)[:2])
  whole = call.split(SMALL, q, k)[1]
  fits = whole._replace(query_tiles=2)
  tiles = SMALL._replace(vmem=call.backward_vmem(fits, 4))
  assert call.split(tiles, q, k) == (3, fits)
  check(inputs(9), PACKED, PACKED, tiles=tiles)


# --- the reference is the score of a query's own key ------------------------


@pytest.fixture
def repeats(monkeypatch):
  """An item for every call that was repeated with a running maximum."""
  ran = []

  def recorded(*args, running, **kwargs):
    if running:
      jax.debug.callback(lambda: ran.append(True))
    return real(*args, running=running, **kwargs)

  real = attend._call
  monkeypatch.setattr(attend, "_call", recorded)
  yield ran


@slow
def test_what_is_computed_again(repeats):
  """Scores far above that of the own key; an own key that is not there."""

  def run(given, *segments):
    repeats.clear()
    check(given, *segments, key="repeats")
    jax.effects_barrier()
    return len(repeats)

  given = inputs(10)
  assert run(given, PACKED, PACKED) == 0
  # Key 7 is what query 40 looks for, and less so the later ones.
  steep = [x.copy() for x in given]
  steep[0][:, 40] = 12
  steep[1][:, 7] = 4
  assert run(steep, PACKED, PACKED) == 1
  # Queries 100 to 149 see no key after 99: their own key's score is a poor
  # reference if it lies far from the others, above or below.
  hidden = PACKED.copy()
  hidden[:, 100:150] = 0
  for scale, repeated in ((3, False), (40, True), (-40, True)):
    own = [x.copy() for x in given]
    own[1][:, 100:150] = scale * own[0][:, 100:150, :1]
    assert run(own, PACKED, hidden) == repeated
  # The first ten see none at all.
  hidden[:, :10] = 0
  assert run(given, PACKED, hidden) == 1
