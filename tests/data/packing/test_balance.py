"""Samples dealt to steps, and put into rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hourjax.data.packing.balance import (
  HAND,
  deal,
  even_out,
  fill_rows,
  first_fit,
  whole_numbers,
)

CAPACITY = np.array([100, 0, 40, 100, 100, 50, 50])
groups = st.lists(
  st.tuples(*(st.integers(0, int(most)) for most in CAPACITY)),
  min_size=1,
  max_size=40,
).map(np.array)


def _check(rows, sizes):
  assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
  for row in rows:
    assert row and (sizes[row].sum(axis=0) <= CAPACITY).all()


@given(sizes=groups, seed=st.integers(0, 99))
def test_every_group_is_in_one_row(sizes, seed):
  rng = np.random.default_rng(seed)
  _check(first_fit(sizes, CAPACITY, range(len(sizes))), sizes)
  rows = fill_rows(sizes, CAPACITY)
  _check(rows, sizes)
  work = whole_numbers(rng.uniform(size=len(sizes)))
  even = even_out(rows, sizes, CAPACITY, work)
  assert sorted(i for row in even for i in row) == list(range(len(sizes)))
  assert all((sizes[row].sum(axis=0) <= CAPACITY).all() for row in even)
  before = max(work[row].sum() for row in rows)
  assert max(work[row].sum() for row in even) <= before


def test_what_uses_other_capacities_shares_a_row():
  """Long memories and long texts: as few rows as there can be."""
  sizes = np.zeros((20, 7), int)
  sizes[:10, 4], sizes[:10, 6] = 80, 10  # of 100 and of 50
  sizes[10:, 4], sizes[10:, 6] = 20, 40
  assert len(fill_rows(sizes, CAPACITY)) == 10
  # Three to a row, where first fit takes the two that are the largest.
  rng = np.random.default_rng(0)
  many = (rng.dirichlet(np.ones(3), 300) * 60).astype(int)
  sizes = np.zeros((300, 7), int)
  sizes[:, 4:] = many
  capacity = np.array([0, 0, 0, 0, 100, 100, 100])
  order = np.argsort(-sizes[:, 4], kind="stable").tolist()
  assert len(fill_rows(sizes, capacity)) < len(
    first_fit(sizes, capacity, order)
  )


def test_rows_are_evened_out():
  """Moves where there is room, swaps where there is none."""
  sizes = np.zeros((8, 7), int)
  sizes[:, 6] = 25  # two in a row
  work = np.array([8, 7, 6, 5, 4, 3, 2, 1])
  rows = even_out([[0, 1], [2, 3], [4, 5], [6, 7]], sizes, CAPACITY, work)
  assert [work[row].sum() for row in rows] == [9] * 4
  sizes[:, 6] = 10
  rows = even_out([[0, 1, 2, 3], [4, 5, 6], [7], []], sizes, CAPACITY, work)
  assert sum(map(len, rows)) == 8
  assert max(work[row].sum() for row in rows) <= 10


def test_a_hand():
  """The example of the module, with what is left over at the end."""
  size = np.array([1, 9, 5, 2, 8, 4, 7])
  order = deal(size, 3)
  assert size[order].tolist() == [9, 4, 2, 8, 5, 1, 7]


@given(
  size=st.lists(st.integers(0, 1000), max_size=300).map(np.array),
  batch=st.integers(1, 9),
)
def test_every_sample_once_and_only_within_its_hand(size, batch):
  order = deal(size.astype(int), batch)
  assert sorted(order.tolist()) == list(range(len(size)))
  steps = len(size) // batch
  assert order[steps * batch :].tolist() == [*range(steps * batch, len(size))]
  # No sample comes from further away than a hand is long.
  assert all(abs(order - np.arange(len(size))) < HAND * batch)


def test_steps_are_about_as_large():
  """Sizes like those of videos: a few are as large as many others together."""
  drawn = np.random.default_rng(0).lognormal(size=64 * 128).clip(0, 9)
  size = (drawn * 1000).astype(int)
  before = size.reshape(64, 128).sum(axis=1)
  after = size[deal(size, 128)].reshape(4, HAND, 128).sum(axis=2)
  assert before.max() / before.mean() > 1.15
  assert (after.max(axis=1) / after.mean(axis=1)).max() < 1.01


def test_work_in_whole_numbers():
  """Sums of it do not hang on the order in which they are taken."""
  work = np.random.default_rng(0).uniform(size=1000) * 1e15
  whole = whole_numbers(work)
  assert whole.max() == 2**40
  np.testing.assert_allclose(whole / 2**40, work / work.max(), atol=1e-12)
  assert whole_numbers(np.zeros(3)).tolist() == [0, 0, 0]
  assert whole_numbers(np.zeros(0)).tolist() == []
