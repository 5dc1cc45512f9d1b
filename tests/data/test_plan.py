import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.data.plan import _WINDOW, RowPlan
from hourjax.data.rows import Size

CAPACITY = Size(memory=20, decoder=12)

samples = st.lists(
  st.builds(Size, memory=st.integers(0, 20), decoder=st.integers(1, 12)),
  min_size=1,
  max_size=60,
)


def _many(count):
  rng = np.random.default_rng(0)
  return [
    Size(memory=int(m), decoder=int(d))
    for m, d in rng.integers(1, [12, 9], (count, 2))
  ]


def _epochs(plan, count):
  """Rows of the first epochs, by asking for one row after another."""
  rows = [[] for _ in range(count + 1)]
  k = 0
  while not rows[count]:
    epoch, members = plan.row(k)
    rows[epoch].append(members)
    k += 1
  return rows[:count]


def _check(plan, sizes, count):
  for epoch, rows in enumerate(_epochs(plan, count)):
    members = [sample for row in rows for sample in row]
    assert sorted(members) == list(range(len(sizes)))
    assert len(rows) == plan.rows_in_epoch(epoch)
    for row in rows:
      total = Size()
      for sample in row:
        total += sizes[sample]
      assert row and total.fits(CAPACITY)


@given(sizes=samples, seed=st.integers(0, 9), shuffle=st.booleans())
def test_every_epoch_has_every_sample_once_within_capacity(
  sizes, seed, shuffle
):
  _check(RowPlan(sizes, CAPACITY, seed=seed, shuffle=shuffle), sizes, 3)


@pytest.mark.parametrize("count", [_WINDOW - 1, _WINDOW, 2 * _WINDOW + 3])
def test_more_samples_than_a_window(count):
  sizes = _many(count)
  _check(RowPlan(sizes, CAPACITY, seed=0), sizes, 2)


@given(sizes=samples, seed=st.integers(0, 9), order=st.randoms())
def test_random_access_equals_reading_in_order(sizes, seed, order):
  plan = RowPlan(sizes, CAPACITY, seed=seed)
  count = sum(plan.rows_in_epoch(e) for e in range(6))
  in_order = [plan.row(k) for k in range(count)]
  positions = list(range(count))
  order.shuffle(positions)
  fresh = RowPlan(sizes, CAPACITY, seed=seed)
  assert {k: fresh.row(k) for k in positions} == dict(enumerate(in_order))


def test_epochs_and_seeds_differ():
  sizes = _many(100)
  first, second = _epochs(RowPlan(sizes, CAPACITY, seed=0), 2)
  assert first != second
  assert first != _epochs(RowPlan(sizes, CAPACITY, seed=1), 1)[0]
  assert first == _epochs(RowPlan(sizes, CAPACITY, seed=0), 1)[0]


def test_without_shuffling_samples_stay_in_order():
  plan = RowPlan([CAPACITY] * 5, CAPACITY, seed=0, shuffle=False)
  assert [plan.row(k) for k in range(6)] == [
    *((0, (n,)) for n in range(5)),
    (1, (0,)),
  ]


def test_rows_are_well_filled():
  """First fit leaves at most one row of a window half empty."""
  sizes = [
    Size(decoder=int(n)) for n in np.random.default_rng(0).integers(1, 7, 250)
  ]
  (rows,) = _epochs(RowPlan(sizes, CAPACITY, seed=0), 1)
  filled = [sum(sizes[i].decoder for i in row) for row in rows]
  assert sum(n <= CAPACITY.decoder // 2 for n in filled) <= 1
