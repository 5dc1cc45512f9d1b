"""The TPU kernels, interpreted, against dense float64.

To compile takes seconds and to run a tenth of one: most tests share a shape.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.kernels.tpu import comparison
from tests.kernels.tpu.comparison import (
  NEVER,
  SMALL,
  WIDE,
  check,
  draw,
  ours,
  runs,
)

SHAPE = (2, 40, 700, 8, 1)  # three tiles of queries and three of keys
slow = pytest.mark.slow


def of(*rows, total):
  """Ids of several rows, each a list of (id, length)."""
  return np.concatenate([runs(*row, total=total) for row in rows])


@pytest.mark.parametrize(
  "heads, kv_heads, dim, tiles",
  [
    pytest.param(16, 2, 128, SMALL, id="3b-small", marks=slow),
    pytest.param(16, 2, 128, WIDE, id="3b-wide", marks=slow),
    pytest.param(28, 4, 64, SMALL, id="7b-small", marks=slow),
    pytest.param(28, 4, 64, WIDE, id="7b-wide", marks=slow),
    pytest.param(4, 2, 8, WIDE, id="4-2", marks=slow),
    pytest.param(3, 3, 136, SMALL, id="3-3", marks=slow),
  ],
)
def test_heads(heads, kv_heads, dim, tiles):
  """Also head dims off the lanes."""
  check(
    draw(0, 1, 40, 800, heads, kv_heads, dim),
    runs((1, 12), (2, 20), total=40),
    runs((1, 130), (2, 640), total=800),
    tiles=tiles,
  )


@slow
def test_two_cores():
  """Rows and heads go to different cores, schedules are not as long."""
  check(
    draw(1, 2, 40, 300, 16, 2),
    of([(1, 40)], [(1, 9), (2, 9)], total=40),
    of([(1, 300)], [(1, 90), (2, 90)], total=300),
    cores=2,
  )


@pytest.mark.parametrize(
  "queries, keys",
  [
    pytest.param(1, 1, marks=slow),
    pytest.param(1, 300, marks=slow),
    pytest.param(40, 1, marks=slow),
    pytest.param(32, 256, marks=slow),
    pytest.param(33, 513, marks=slow),
  ],
)
def test_lengths_off_the_tiles(queries, keys):
  check(
    draw(2, 1, queries, keys, 8, 1),
    runs((1, queries), total=queries),
    runs((1, keys), total=keys),
  )


@st.composite
def _any_segments(draw_, length, ordered):
  """Runs of ids, so that there are tiles of one segment, of more, of none."""
  lengths = st.sampled_from([1, length // 9, length // 3, length])
  pairs = draw_(st.lists(st.tuples(st.integers(0, 4), lengths), max_size=6))
  if ordered:
    pairs = sorted(pairs, key=lambda pair: pair[0] or 99)
  return pairs


@slow
@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(data=st.data(), ordered=st.booleans())
def test_any_segments(data, ordered):
  """Also unordered ids, ids that no key has, and rows of padding alone."""
  rows, queries, keys = SHAPE[:3]
  segments = [
    of(*[data.draw(_any_segments(n, ordered)) for _ in range(rows)], total=n)
    for n in (queries, keys)
  ]
  check(draw(3, *SHAPE), *segments)


def test_rows_are_independent():
  """The same bits beside another row, of more blocks or of fewer."""
  inputs = draw(4, *SHAPE)
  row = [(1, 5), (2, 9)], [(1, 500), (2, 60)]
  full = ours(
    inputs,
    of(row[0], [(1, 40)], total=40),
    of(row[1], [(1, 700)], total=700),
  )
  alone = ours(inputs, of(row[0], [], total=40), of(row[1], [], total=700))
  comparison.same([x[0] for x in full], [x[0] for x in alone])
  assert not any(x[1].any() for x in (alone[0], *alone[2:]))


@slow
def test_the_same_bits_every_time():
  inputs = draw(5, *SHAPE)
  row = [(1, 30), (2, 9)], [(1, 280), (2, 400)]
  segments = of(row[0], row[0], total=40), of(row[1], row[1], total=700)
  comparison.same(ours(inputs, *segments), ours(inputs, *segments))


# --- padding ----------------------------------------------------------------


def test_queries_that_see_nothing_get_zeros_and_pass_no_gradient():
  queries, keys = [(1, 10), (2, 7), (3, 5)], [(2, 280), (4, 20)]
  out, lse, dq, dk, dv = check(
    draw(6, *SHAPE),
    query_segment := of(queries, queries, total=40),
    of(keys, keys, total=700),
  )
  blind = query_segment != 2
  assert blind.sum() == 2 * 33
  assert not out[blind].any() and not dq[blind].any()
  assert (lse[blind] == NEVER).all()
  assert not dk[:, 280:].any() and not dv[:, 280:].any()
  assert dk[:, :280].all() and dv[:, :280].all()


@pytest.mark.parametrize(
  "queries, keys",
  [([], []), ([], [(1, 300)]), ([(1, 40)], []), ([(1, 40)], [(2, 700)])],
)
def test_nothing_to_see_gives_zeros(queries, keys):
  segments = of(queries, queries, total=40), of(keys, keys, total=700)
  out, lse, *gradients = ours(draw(7, *SHAPE), *segments)
  assert (lse == NEVER).all()
  for x in (out, *gradients):
    assert not x.any()


def test_padding_may_hold_anything():
  """Bit for bit the same with large numbers in all unused places."""
  queries, keys = [(1, 9), (2, 12), (3, 4)], [(1, 90), (2, 110)]
  whole_tile = [(1, 256), (2, 30)]
  query_segment = of(queries, queries, total=40)
  key_segment = of(keys, whole_tile, total=700)
  clean = draw(8, *SHAPE)
  dirty = [x.copy() for x in clean]
  of_each = query_segment, key_segment, key_segment, query_segment
  for x, segment in zip(dirty, of_each):
    x[segment == 0] = 1e4
    x[segment == 3] = -1e4  # no key is of this segment
  segments = query_segment, key_segment
  comparison.same(ours(dirty, *segments), ours(clean, *segments))


# --- bfloat16 ---------------------------------------------------------------


@slow
@pytest.mark.parametrize("heads", [8, 7])
def test_bfloat16(heads):
  """Weights and their gradients are rounded to 8 bits before they are used."""
  inputs = [
    jnp.asarray(x, jnp.bfloat16) for x in draw(9, 1, 40, 700, heads, 1, 128)
  ]
  segments = (
    runs((1, 20), (2, 19), total=40),
    runs((1, 280), (2, 400), total=700),
  )
  got = ours(inputs, *segments, out_dtype=jnp.bfloat16)
  dtypes = ["bfloat16", "float32", "float32", "bfloat16", "bfloat16"]
  assert [str(x.dtype) for x in got] == dtypes
  reference = comparison.expected(inputs, *segments)
  comparison.close(got, reference, atol=2e-3, rtol=2**-8)
  # Scores and sums are float32 all the same.
  np.testing.assert_allclose(got[1], reference[1], rtol=0, atol=2e-5)
