import dataclasses
import itertools

import numpy as np
import pytest

from hourjax.batch import IGNORE, Batch
from hourjax.data import pipeline
from hourjax.data.dataset import Dataset, SampleOptions
from hourjax.data.demo.tokenizer import train_tokenizer
from hourjax.data.packing.row_plan import EPOCH, PlanOptions, RowPlan
from hourjax.data.pipeline import ReadOptions, batches
from hourjax.data.records.record import Record, Turn
from hourjax.data.rows import RowSpec, Size, build_row, row_of, stack_rows
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer

SPEC = RowSpec(
  Size(features=48, memory=1400, queries=600, decoder=700), 4, 16, 6, 8
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Stored features of five videos."""
  folder = tmp_path_factory.mktemp("features")
  store, rng = FeatureStore(folder, create=True), np.random.default_rng(0)
  for n in range(5):
    store.write(f"{n}.mp4", rng.normal(size=(5 + n, 4, 6)), 5 + n)
  return folder


@pytest.fixture(scope="module")
def dataset(root):
  """A conversation about each video and two texts; rows hold one or two."""
  records = [_record(f"v{n}", f"{n}.mp4") for n in range(5)]
  return _dataset(records + [_record(f"t{n}") for n in range(2)], root)


def _record(name, *videos):
  mark = "<image>\n" * len(videos)
  turns = (Turn("human", f"{mark}What?"), Turn("gpt", f"It is {name}."))
  return Record(name, "video" if videos else "text", videos, turns, "", {})


def _dataset(records, root, spec=SPEC):
  made = Dataset.from_records(
    records,
    tokenizer=Tokenizer(train_tokenizer([]), "test"),
    spec=spec,
    options=SampleOptions(seed=3),
    media_root=root,
    features=FeatureStore(root),
  )
  assert not made.skipped
  return made


def _plan(dataset, batch_samples=0):
  return RowPlan(
    dataset.sizes,
    SPEC.capacity,
    PlanOptions(seed=1, batch_samples=batch_samples),
    memory=dataset.columns.video,
  )


def _take(dataset, count, plan=None, **options):
  stream = batches(dataset, plan or _plan(dataset), SPEC, rows=2, **options)
  return list(itertools.islice(stream, count))


def _assert_same(one, two):
  for name, x, y in zip(one._fields, one, two, strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)


def test_batches_are_the_rows_of_the_plan(dataset):
  plan, position = _plan(dataset), 0
  assert plan.rows_in_epoch(0) >= 4
  for made in _take(dataset, plan.rows_in_epoch(0) // 2 + 2):
    rows, count = [], 0
    for _ in range(2):
      epoch, groups = plan.row(position)
      samples = [dataset.sample(i, epoch) for (i,) in groups]
      rows.append(build_row(samples, SPEC))
      count += len(samples)
      position = plan.advance(position, 1)
    _assert_same(made.batch, stack_rows(rows))
    assert made.position == position
    assert made.samples == count and not made.unread
  assert position > EPOCH  # into the second epoch


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_step_of_samples_is_filled_up_with_empty_rows(dataset, rows):
  """Steps of 3, 3 and 1 samples; each sample once, the rest is padding."""
  plan, position, steps = _plan(dataset, 3), 0, [[]]
  empty = build_row([], SPEC)
  assert (empty.target == IGNORE).all() and not empty.decoder_segment.any()
  stream = batches(dataset, plan, SPEC, rows=rows)
  while len(steps) <= 4:
    made = next(stream)
    found, position = plan.take(position, rows)
    assert 0 < len(found) <= rows and made.position == position
    assert made.samples == sum(len(plan.row(at)[1]) for at in found)
    for number in range(rows):
      groups, epoch = (), 0
      if number < len(found):
        epoch, groups = plan.row(found[number])
        steps[-1] += [i for (i,) in groups]
      samples = [dataset.sample(i, epoch) for (i,) in groups]
      _assert_same(row_of(made.batch, number), build_row(samples, SPEC))
    if made.ends_step:
      steps.append([])
  assert sorted(map(len, steps[:3])) == [1, 3, 3]
  assert sorted(itertools.chain(*steps[:3])) == list(range(7))
  assert len(steps[3]) in (1, 3)  # of the second epoch


@pytest.mark.parametrize("batch_samples", [0, 3])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_starting_at_a_position_equals_coming_there(
  dataset, steps, batch_samples
):
  plan = _plan(dataset, batch_samples)
  whole = _take(dataset, 8, plan)
  rest = _take(dataset, 8 - steps, plan, start=whole[steps - 1].position)
  for one, two in zip(whole[steps:], rest, strict=True):
    _assert_same(one.batch, two.batch)
    assert one.position == two.position


def test_threads_change_nothing(dataset):
  one = _take(dataset, 4, options=ReadOptions(threads=1, ahead=1))
  many = _take(dataset, 4, options=ReadOptions(threads=8, ahead=6))
  for x, y in zip(one, many, strict=True):
    _assert_same(x.batch, y.batch)


@pytest.mark.parametrize("batch_samples", [0, 5])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_fill_parts_of_the_same_global_batches(
  dataset, hosts, batch_samples
):
  """In the steps of 5 and 2 samples some hosts have nothing but padding."""
  plan = _plan(dataset, batch_samples)
  streams = [
    batches(dataset, plan, SPEC, rows=4, mine=range(i, 4, hosts))
    for i in range(hosts)
  ]
  whole = batches(dataset, plan, SPEC, rows=4)
  for _ in range(5):
    parts, one = [next(s) for s in streams], next(whole)
    for name, array in one.batch._asdict().items():
      together = np.stack([getattr(p.batch, name) for p in parts], axis=1)
      together = together.reshape(array.shape)
      np.testing.assert_array_equal(together, array, err_msg=name)
    assert {p.position for p in parts} == {one.position}
    assert {p.ends_step for p in parts} == {one.ends_step}
    assert sum(p.samples for p in parts) == one.samples


def test_sharing_a_memory_changes_no_conversation(root):
  """What a sample's text reads is the same, the memory is there once."""
  room = dataclasses.replace(
    SPEC, capacity=Size(features=64, memory=1400, queries=2000, decoder=2000)
  )
  videos = ("1.mp4", "1.mp4", "4.mp4", "1.mp4")
  records = [_record(f"r{i}", name) for i, name in enumerate(videos)]
  made = _dataset(records, root, room)
  plan = RowPlan(
    made.sizes,
    room.capacity,
    PlanOptions(share=3),
    memory=made.columns.video,
  )
  assert plan.rows_in_epoch(0) == 1
  groups = plan.row(0)[1]
  assert sorted(map(sorted, groups)) == [[0, 1, 3], [2]]
  (one,) = itertools.islice(batches(made, plan, room, rows=1), 1)
  row = Batch(*(x[0] for x in one.batch))
  assert len(np.unique(row.memory_segment)) == 3  # two memories and padding
  order = [i for group in groups for i in group]
  for segment, index in enumerate(order, start=1):
    alone = build_row([made.sample(index)], room)
    mine, its = row.query_segment == segment, alone.query_segment == 1
    assert mine.sum() == its.sum()
    (reads,) = np.unique(row.query_reads[mine])
    at = np.flatnonzero(row.memory_segment == reads)
    np.testing.assert_array_equal(
      row.memory_position[at], alone.memory_position[alone.memory_segment == 1]
    )
    for name in ("query_token", "query_position"):
      np.testing.assert_array_equal(
        getattr(row, name)[mine], getattr(alone, name)[its]
      )
    source = row.query_source[mine]
    visual = source >= 0
    np.testing.assert_array_equal(
      source[visual] - at[0], alone.query_source[its][visual]
    )
    mine, its = row.decoder_segment == segment, alone.decoder_segment == 1
    for name in ("decoder_token", "decoder_position", "target"):
      np.testing.assert_array_equal(
        getattr(row, name)[mine], getattr(alone, name)[its]
      )


def test_what_cannot_be_read_leaves_padding(dataset, root):
  """Poison in a broken file must not reach the batch."""
  plan = _plan(dataset)
  whole = _take(dataset, 6, plan)
  broken = root / "2.mp4.npy"
  content = broken.read_bytes()
  broken.write_bytes(content[: len(content) // 2])
  try:
    damaged = _take(dataset, 6, plan)
  finally:
    broken.write_bytes(content)
  failures = [item for made in damaged for item in made.unread]
  assert {(item.id, item.kind) for item in failures} == {("v2", "damaged")}
  assert all(str(broken) in item.reason for item in failures)
  for one, two in zip(whole, damaged, strict=True):
    assert two.samples == one.samples - len(two.unread)
    assert two.position == one.position
    assert np.isfinite(two.batch.features.astype(np.float32)).all()
    missing = sum(int(dataset.sizes[2][-1]) for _ in two.unread)
    there = [(made.batch.decoder_segment > 0).sum() for made in (one, two)]
    assert there[0] - there[1] == missing
    if not two.unread:
      _assert_same(one.batch, two.batch)


@pytest.mark.parametrize("groups, each", [(4, 2), (2, 4), (3, 2)])
def test_groups_of_devices_get_about_the_same_work(groups, each):
  """Rows come in descending order, the empty ones last."""
  count = groups * each
  work = np.sort(np.random.default_rng(count).lognormal(size=count))[::-1]
  work[-1] = 0
  order = pipeline.heavy_with_light(list(range(count)))
  assert sorted(order) == list(range(count))
  dealt = work[order].reshape(groups, each).sum(axis=1)
  plain = work.reshape(groups, each).sum(axis=1)
  assert dealt.max() < plain.max()
  assert pipeline.heavy_with_light([0, 1, 2, None]) == [0, None, 1, 2]
  assert pipeline.heavy_with_light([0, 1, 2]) == [0, 2, 1]
