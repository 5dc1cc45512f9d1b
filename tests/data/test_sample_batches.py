"""Steps of a number of samples: which samples, and where a step ends."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.data.packing.balance import whole_numbers
from hourjax.data.packing.row_plan import EPOCH, PlanOptions, RowPlan
from hourjax.data.rows import Size
from hourjax.errors import UserError

CAPACITY = Size(memory=20, queries=12, decoder=12)
FULL = np.array(CAPACITY.astuple())


@st.composite
def plans(draw):
  """Samples of up to three streams, some of which share memories."""
  count = draw(st.integers(1, 80))
  rng = np.random.default_rng(draw(st.integers(0, 99)))
  sizes = np.zeros((count, 7), np.int64)
  sizes[:, 4:] = rng.integers(1, (21, 5, 9), (count, 3))
  memory = rng.integers(-1, draw(st.integers(0, 9)), count)
  sizes[:, 4] = np.where(memory < 0, sizes[:, 4], 1 + memory)
  options = PlanOptions(
    seed=draw(st.integers(0, 9)),
    shuffle=draw(st.booleans()),
    share=draw(st.integers(1, 3)),
    batch_samples=draw(st.integers(1, 12)),
    drop_last=draw(st.booleans()),
  )
  stream = rng.integers(0, draw(st.integers(1, 3)), count)
  if options.drop_last and max(np.bincount(stream)) < options.batch_samples:
    stream[:] = 0
  if options.drop_last and count < options.batch_samples:
    options = PlanOptions(batch_samples=1, drop_last=True)
  return sizes, options, {"memory": memory, "stream": stream}


def _plan(drawn):
  sizes, options, columns = drawn
  return RowPlan(sizes, CAPACITY, options, **columns)


def _samples(rows):
  return [i for row in rows for group in row for i in group]


def _steps(plan, epoch):
  """The rows of each step of an epoch, taken 3 at a time."""
  steps, rows = [], []
  position = plan.advance(epoch * EPOCH, 0)
  assert plan.begins_step(position)
  while position < (epoch + 1) * EPOCH:
    found, position = plan.take(position, 3)
    assert 1 <= len(found) <= 3
    rows += [plan.row(at) for at in found]
    assert {e for e, _ in rows} == {epoch}
    if plan.begins_step(position):
      steps.append([row for _, row in rows])
      rows = []
  assert not rows
  return steps


def _official(stream, batch, drop_last):
  """Steps of one epoch by hand: batches of one stream, one stream at a time."""
  whole = math.floor if drop_last else math.ceil
  return sum(whole(n / batch) for n in np.bincount(stream).tolist())


@given(drawn=plans())
def test_a_step_is_so_many_samples_of_one_stream(drawn):
  sizes, options, columns = drawn
  plan, stream = _plan(drawn), columns["stream"]
  for epoch in range(2):
    steps = _steps(plan, epoch)
    wanted = _official(stream, options.batch_samples, options.drop_last)
    assert len(steps) == plan.steps_in_epoch(epoch) == wanted
    assert plan.rows_by_window(epoch) == list(map(len, steps))
    seen, short = [], []
    for rows in steps:
      samples = _samples(rows)
      (kind,) = set(stream[samples].tolist())
      assert len(samples) <= options.batch_samples
      short += [kind] if len(samples) < options.batch_samples else []
      seen += samples
      for row in rows:
        firsts = [group[0] for group in row]
        used = np.append(
          sizes[firsts, :5].sum(axis=0), sizes[_samples([row]), 5:].sum(axis=0)
        )
        assert row and (used <= FULL).all()
        for group in row:
          memories = set(columns["memory"][list(group)].tolist())
          assert len(group) == 1 or (len(memories) == 1 and min(memories) >= 0)
          assert len(group) <= options.share
    assert len(short) == len(set(short))  # at most one of each stream
    assert len(seen) == len(set(seen))
    if options.drop_last:
      assert not short
      left = np.bincount(np.delete(stream, seen), minlength=1)
      assert (left < options.batch_samples).all()
    else:
      assert sorted(seen) == list(range(len(sizes)))


@given(drawn=plans(), order=st.randoms())
def test_any_row_is_found_without_those_before(drawn, order):
  plan = _plan(drawn)
  positions = [0]
  while positions[-1] < 3 * EPOCH:
    positions.append(plan.advance(positions[-1], 1))
  found = {at: plan.row(at) for at in positions}
  order.shuffle(positions)
  fresh = _plan(drawn)
  assert {at: fresh.row(at) for at in positions} == found


@given(drawn=plans(), rows=st.integers(1, 9))
def test_micro_batches_of_any_size_are_the_same_steps(drawn, rows):
  plan = _plan(drawn)
  ones = list(
    itertools.islice(_taken(plan, 1), sum(map(plan.rows_in_epoch, range(2))))
  )
  many = list(itertools.islice(_taken(plan, rows), 2 * len(ones)))
  flat = [at for part, _ in many for at in part][: len(ones)]
  assert flat == [at for part, _ in ones for at in part]
  for part, after in many:
    # Fewer only where the step ends.
    assert len(part) == rows or plan.begins_step(after)
    assert len({at // plan._stride for at in part}) == 1


def _taken(plan, rows):
  position = 0
  while True:
    part, position = plan.take(position, rows)
    yield part, position


def test_steps_of_all_streams_follow_in_random_order():
  stream = np.arange(64) % 2
  sizes = np.ones((64, 7), np.int64) * (0, 0, 0, 0, 1, 1, 1)
  options = PlanOptions(batch_samples=8)
  plan = RowPlan(sizes, CAPACITY, options, stream=stream)
  orders, members = set(), set()
  for epoch in range(6):
    steps = _steps(plan, epoch)
    orders.add(tuple(stream[_samples(rows)[0]] for rows in steps))
    members |= {frozenset(_samples(rows)) for rows in steps}
  assert len(orders) > 1
  assert len(members) == 6 * 8  # each epoch puts other samples together


def test_weights_count():
  sizes = np.ones((30, 7), np.int64)
  weight = np.where(np.arange(30) < 10, 0.5, 2.0)
  options = PlanOptions(batch_samples=8, drop_last=True)
  plan = RowPlan(
    sizes, Size(*[9] * 7), options, weight=weight, stream=np.arange(30) // 10
  )
  assert plan.samples_by_stream(0) == {0: 5, 1: 20, 2: 20}
  assert plan.steps_in_epoch(0) == len(_steps(plan, 0)) == 4


@pytest.mark.parametrize("batch", [1, 10, 11, 1000, 1001, 5000])
def test_steps_of_few_and_of_many_samples(batch):
  """A row a sample: positions of a step are room enough for them."""
  sizes = np.tile(FULL, (2 * batch + 1, 1))
  plan = RowPlan(sizes, CAPACITY, PlanOptions(batch_samples=batch))
  first, position = plan.take(0, batch)
  assert len(first) == batch and first[0] == 0
  assert position == 10 ** len(str(batch - 1)) and plan.begins_step(position)
  assert len(_steps(plan, 0)) == 3


def test_nothing_left_of_short_streams():
  sizes = np.ones((30, 7), np.int64)
  options = PlanOptions(batch_samples=16, drop_last=True)
  with pytest.raises(UserError) as error:
    RowPlan(sizes, Size(*[9] * 7), options, stream=np.arange(30) % 2)
  for part in ("config.batch_samples=16", "(15, 15 samples)",
               "set config.drop_last=False"):  # fmt: skip
    assert part in str(error.value)


def test_other_steps_are_another_plan():
  sizes = np.ones((30, 7), np.int64)
  ways = (
    {},
    {"batch_samples": 4},
    {"batch_samples": 8},
    {"batch_samples": 8, "drop_last": True},
  )
  prints = [
    RowPlan(sizes, CAPACITY, PlanOptions(**way)).fingerprint() for way in ways
  ]
  assert len(set(prints)) == 4


@given(drawn=plans(), seed=st.integers(0, 9))
def test_the_rows_of_a_step_are_in_order_of_their_work(drawn, seed):
  """They hold the step's samples; where they are not dealt, the same rows."""
  sizes, options, columns = drawn
  work = np.random.default_rng(seed).random(len(sizes))
  plan = RowPlan(sizes, CAPACITY, options, work=work, **columns)
  for step, other in zip(_steps(plan, 0), _steps(_plan(drawn), 0)):
    assert sorted(_samples(step)) == sorted(_samples(other))
    assert plan.dealt or sorted(step) == sorted(other)
    assert len(step) == len(other)
    whole = whole_numbers(work)
    sums = [whole[_samples([row])].sum() for row in step]
    assert sums == sorted(sums, reverse=True)
  assert plan.fingerprint() != _plan(drawn).fingerprint()


def test_a_stream_has_rows_of_its_own():
  """Six memories of 5 fill two rows of 20; of another stream, six rows of 5."""
  sizes = np.tile([0, 0, 0, 0, 5, 1, 1], (12, 1))
  columns = {"stream": np.arange(12) % 2}
  options = PlanOptions(batch_samples=6)
  small = Size(memory=5, queries=12, decoder=12)
  plan = RowPlan(
    sizes, CAPACITY, options, stream_capacity={1: small}, **columns
  )
  found = {
    int(columns["stream"][_samples(step)[0]]): len(step)
    for step in _steps(plan, 0)
  }
  assert found == {0: 2, 1: 6}
  for position in (0, 10):
    sample = plan.row(position)[1][0][0]
    assert plan.capacity(position) == (CAPACITY, small)[sample % 2]
  plain = RowPlan(sizes, CAPACITY, options, **columns)
  assert plan.fingerprint() != plain.fingerprint()
