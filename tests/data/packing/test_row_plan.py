import collections
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.data.packing.row_plan import EPOCH, WINDOW, PlanOptions, RowPlan
from hourjax.data.rows import Size
from hourjax.errors import UserError

CAPACITY = Size(memory=20, decoder=12)
FULL = np.array([CAPACITY.astuple()])
# A memory that no row of two could hold twice, and short text.
TALK = np.array([[0, 0, 0, 0, 15, 2, 2]])
ROOMY = Size(memory=20, queries=8, decoder=8)

samples = st.lists(
  st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=60
).map(lambda pairs: _sizes(*zip(*pairs)))


def _sizes(memory, decoder):
  sizes = np.zeros((len(memory), 7), np.int64)
  sizes[:, 4], sizes[:, 6] = memory, decoder
  return sizes


def _many(count):
  rng = np.random.default_rng(0)
  return _sizes(rng.integers(1, 12, count), rng.integers(1, 9, count))


def _epoch(plan, epoch=0):
  return plan.epoch_rows(epoch)


def _positions(plan, epoch=0):
  """Positions of an epoch's rows, one after another."""
  position = plan.advance(epoch * EPOCH, 0)
  while position < (epoch + 1) * EPOCH:
    yield position
    position = plan.advance(position, 1)


def _flat(rows):
  return [i for row in rows for group in row for i in group]


def _check(plan, sizes, epochs):
  for epoch in range(epochs):
    rows = _epoch(plan, epoch)
    assert sorted(_flat(rows)) == list(range(len(sizes)))
    assert [plan.row(p) for p in _positions(plan, epoch)] == [
      (epoch, row) for row in rows
    ]
    assert plan.rows_in_epoch(epoch) == len(rows)
    for row in rows:
      assert row and (sizes[_flat([row])].sum(axis=0) <= FULL[0]).all()


@given(sizes=samples, seed=st.integers(0, 9), shuffle=st.booleans())
def test_every_epoch_has_every_sample_once_within_capacity(
  sizes, seed, shuffle
):
  options = PlanOptions(seed=seed, shuffle=shuffle)
  _check(RowPlan(sizes, CAPACITY, options), sizes, 3)


@pytest.mark.parametrize("count", [WINDOW - 1, WINDOW, 2 * WINDOW + 3])
def test_more_samples_than_a_window(count):
  sizes = _many(count)
  _check(RowPlan(sizes, CAPACITY), sizes, 2)


@given(sizes=samples, seed=st.integers(0, 9), order=st.randoms())
def test_random_access_equals_reading_in_order(sizes, seed, order):
  plan = RowPlan(sizes, CAPACITY, PlanOptions(seed=seed))
  positions = [p for e in range(5) for p in _positions(plan, e)]
  in_order = {k: plan.row(k) for k in positions}
  order.shuffle(positions)
  fresh = RowPlan(sizes, CAPACITY, PlanOptions(seed=seed))
  assert {k: fresh.row(k) for k in positions} == in_order


@given(sizes=samples, step=st.integers(1, 5), count=st.integers(1, 8))
def test_advancing_in_steps_equals_one_long_advance(sizes, step, count):
  plan = RowPlan(sizes, CAPACITY)
  position, seen = 0, []
  for _ in range(count * step):
    seen.append(position)
    position = plan.advance(position, 1)
  assert plan.advance(0, count * step) == position
  assert [plan.advance(0, k) for k in range(count * step)] == seen
  assert len({plan.row(p)[0] for p in seen}) <= seen[-1] // EPOCH + 1


def test_only_one_window_is_packed_for_a_row(monkeypatch):
  plan = RowPlan(_many(5 * WINDOW), CAPACITY)
  shuffled, packed = [], []
  shuffle, pack = plan._epoch_order, plan._pack
  monkeypatch.setattr(
    plan, "_epoch_order", lambda e: shuffled.append(e) or shuffle(e)
  )
  monkeypatch.setattr(plan, "_pack", lambda *at: packed.append(at) or pack(*at))
  position = 700 * EPOCH + 3 * WINDOW + 2
  assert plan.row(plan.advance(position, 0))
  assert set(shuffled) == {700} and set(packed) == {(700, 3)}


def test_a_row_that_is_not_there():
  plan = RowPlan(np.repeat(FULL, 5, axis=0), CAPACITY)
  with pytest.raises(IndexError, match="row 5 of 5 in window 0"):
    plan.row(5)


def test_epochs_and_seeds_differ():
  sizes = _many(100)
  plan = RowPlan(sizes, CAPACITY)
  first = _epoch(plan)
  assert first != _epoch(plan, 1)
  assert first != _epoch(RowPlan(sizes, CAPACITY, PlanOptions(seed=1)))
  assert first == _epoch(RowPlan(sizes, CAPACITY))


def test_without_shuffling_samples_stay_in_order():
  sizes = np.repeat(FULL, 5, axis=0)
  plan = RowPlan(sizes, CAPACITY, PlanOptions(shuffle=False))
  assert _epoch(plan) == [((n,),) for n in range(5)]


def test_rows_are_well_filled():
  """First fit leaves at most one row of a window half empty."""
  decoder = np.random.default_rng(0).integers(1, 7, 250)
  rows = _epoch(RowPlan(_sizes(decoder * 0, decoder), CAPACITY))
  filled = [decoder[_flat([row])].sum() for row in rows]
  assert sum(n <= CAPACITY.decoder // 2 for n in filled) <= 1


def test_streams_share_no_row_and_follow_in_random_order():
  sizes, stream = _many(4 * WINDOW), np.arange(4 * WINDOW) % 2
  plan = RowPlan(sizes, CAPACITY, stream=stream)
  orders = set()
  for epoch in range(12):
    rows = _epoch(plan, epoch)
    assert sorted(_flat(rows)) == list(range(4 * WINDOW))
    kinds = [set(stream[_flat([row])].tolist()) for row in rows]
    assert all(len(kind) == 1 for kind in kinds)
    orders.add(tuple(k for k, _ in itertools.groupby(map(min, kinds))))
  assert len(orders) > 1  # of the two windows of each


@pytest.mark.parametrize("weight", [0.25, 1 / 3, 0.7, 1, 2.5])
def test_each_sample_is_taken_as_often_as_its_weight_says(weight):
  sizes, count, epochs = _many(60), 60, 12
  weights = np.where(np.arange(60) < 30, weight, 1.0)
  plan = RowPlan(sizes, CAPACITY, weight=weights)
  taken = collections.Counter()
  for epoch in range(epochs):
    epoch_taken = _flat(_epoch(plan, epoch))
    assert len(epoch_taken) - 30 == pytest.approx(30 * weight, abs=1)
    taken.update(epoch_taken)
  for i in range(count):
    wanted = epochs * weights[i]
    assert wanted - 1 < taken[i] < wanted + 1


def test_weight_zero_leaves_samples_out():
  weights = np.array([0.0, 1, 1])
  plan = RowPlan(np.repeat(FULL, 3, axis=0), CAPACITY, weight=weights)
  assert sorted(_flat(_epoch(plan))) == [1, 2]
  with pytest.raises(UserError, match="none of 3 samples can be used"):
    RowPlan(np.repeat(FULL, 3, axis=0), CAPACITY, weight=weights * 0)


def test_only_members_are_planned():
  plan = RowPlan(_many(9), CAPACITY, members=np.array([1, 4, 8]))
  assert sorted(_flat(_epoch(plan, 3))) == [1, 4, 8]
  with pytest.raises(UserError, match="none of 9 samples"):
    RowPlan(_many(9), CAPACITY, members=np.array([], int))


@pytest.mark.parametrize("share, expected", [(1, 1), (2, 2), (3, 3), (9, 4)])
def test_conversations_of_one_video_share_its_memory(share, expected):
  """Only four texts of 2 fit a row of 8, whatever may share."""
  sizes = np.repeat(TALK, 24, axis=0)
  memory = np.repeat([5, 6], 12)
  plan = RowPlan(sizes, ROOMY, PlanOptions(share=share), memory=memory)
  groups = [group for row in _epoch(plan) for group in row]
  assert sorted(i for g in groups for i in g) == list(range(24))
  assert max(map(len, groups)) == expected
  assert len(groups) == 2 * -(-12 // expected)
  for group in groups:
    assert len({memory[i] for i in group}) == 1
  other = [group for row in _epoch(plan, 1) for group in row]
  if expected > 1:
    assert set(map(frozenset, groups)) != set(map(frozenset, other))


def test_samples_without_a_video_share_nothing():
  sizes = np.repeat(TALK, 6, axis=0)
  plan = RowPlan(sizes, ROOMY, PlanOptions(share=4), memory=np.full(6, -1))
  assert all(len(g) == 1 for row in _epoch(plan) for g in row)


def test_an_epoch_in_which_no_sample_is_due():
  plan = RowPlan(
    np.repeat(FULL, 12, axis=0),
    CAPACITY,
    weight=np.full(12, 0.1),
    stream=np.arange(12) % 2,
  )
  rows = [plan.rows_in_epoch(e) for e in range(10)]
  assert sum(rows) == 12 and 0 in rows
  position, seen = plan.advance(0, 0), []
  for _ in range(12):
    seen += _flat([plan.row(position)[1]])
    position = plan.advance(position, 1)
  assert sorted(seen) == list(range(12))
  with pytest.raises(UserError, match=r"add up to 0.2.; see .*weights"):
    RowPlan(np.repeat(FULL, 2, axis=0), CAPACITY, weight=np.full(2, 0.1))


def test_a_position_of_another_plan():
  plan = RowPlan(_many(10), CAPACITY)
  for ask in (plan.row, lambda p: plan.advance(p, 1)):
    with pytest.raises(IndexError, match=r"window 3 of 1 .* another plan"):
      ask(3 * WINDOW)
  assert plan.fingerprint() == RowPlan(_many(10), CAPACITY).fingerprint()
  for other in (
    RowPlan(_many(11), CAPACITY),
    RowPlan(_many(10), CAPACITY, PlanOptions(seed=1)),
    RowPlan(_many(10), CAPACITY, weight=np.full(10, 2.0)),
    RowPlan(_many(10), CAPACITY, members=np.arange(9)),
  ):
    assert other.fingerprint() != plan.fingerprint()


def test_steps_of_a_stream_are_about_as_large():
  """Every step has its samples, and as many rows as the others, about."""
  rng = np.random.default_rng(0)
  count = 64 * 40 + 7
  decoder = np.minimum(rng.lognormal(size=count) * 2, 12).astype(int) + 1
  sizes = _sizes(rng.integers(1, 9, count), np.minimum(decoder, 12))
  work = sizes[:, 4].astype(float)
  options = PlanOptions(batch_samples=40, drop_last=True)
  plan = RowPlan(sizes, CAPACITY, options, work=work)
  rows = plan.rows_by_window(0)
  assert plan.dealt and len(rows) == 64
  assert max(rows) - min(rows) <= 2
  flat = _flat(_epoch(plan))
  assert len(set(flat)) == len(flat) == 64 * 40
  for window, number in enumerate(rows):
    of_step = [plan.row(window * plan._stride + i)[1] for i in range(number)]
    assert len(_flat(of_step)) == 40
    spent = [work[_flat([row])].sum() for row in of_step]
    assert spent == sorted(spent, reverse=True)
  # Samples that share a memory stay together, so they are not dealt.
  shared = PlanOptions(batch_samples=40, share=2)
  assert not RowPlan(sizes, CAPACITY, shared).dealt
