import itertools

import numpy as np
import pytest

from hourjax.data.dataset import Dataset, SampleOptions
from hourjax.data.demo.tokens import train_tokenizer
from hourjax.data.features import FeatureStore
from hourjax.data.pipeline import ReadOptions, batches
from hourjax.data.plan import RowPlan
from hourjax.data.records import Record, Turn
from hourjax.data.rows import RowSpec, Size, build_row, stack_rows
from hourjax.data.tokenizer import Tokenizer

SPEC = RowSpec(
  Size(features=48, memory=1400, queries=600, decoder=700), 4, 16, 6, 8
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  """Five videos with stored features and two texts; rows hold one or two."""
  root = tmp_path_factory.mktemp("features")
  store, rng = FeatureStore(root, create=True), np.random.default_rng(0)
  records = []
  for n in range(5):
    frames = 5 + n
    store.write(f"{n}.mp4", rng.normal(size=(frames, 4, 6)), frames)
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", f"It is {n}."))
    records.append(Record(f"v{n}", "video", (f"{n}.mp4",), turns, "", {}))
  for n in range(2):
    turns = (Turn("human", "What?"), Turn("gpt", f"Text {n}."))
    records.append(Record(f"t{n}", "text", (), turns, "", {}))
  made = Dataset(
    records,
    tokenizer=Tokenizer(train_tokenizer([]), "test"),
    spec=SPEC,
    options=SampleOptions(seed=3),
    media_root=root,
    features=store,
  )
  assert not made.skipped
  return made


def _take(dataset, count, **options):
  plan = RowPlan(dataset.sizes, SPEC.capacity, seed=1)
  stream = batches(dataset, plan, SPEC, rows=2, **options)
  return list(itertools.islice(stream, count))


def _assert_same(one, two):
  for name, x, y in zip(one._fields, one, two, strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)


def test_batches_are_the_rows_of_the_plan(dataset):
  plan = RowPlan(dataset.sizes, SPEC.capacity, seed=1)
  count = plan.rows_in_epoch(0) + 2  # into the second epoch
  assert count > 4
  for number, batch in enumerate(_take(dataset, count // 2)):
    rows = []
    for k in (2 * number, 2 * number + 1):
      epoch, members = plan.row(k)
      rows.append(build_row([dataset.sample(i, epoch) for i in members], SPEC))
    _assert_same(batch, stack_rows(rows))


@pytest.mark.parametrize("start", [1, 4, 7])
def test_start_equals_skipping(dataset, start):
  rows = [
    [x[n] for x in batch] for batch in _take(dataset, 8) for n in range(2)
  ]
  for number, batch in enumerate(_take(dataset, 3, start=start)):
    expected = rows[start + 2 * number : start + 2 * number + 2]
    for x, y in zip(batch, zip(*expected, strict=True), strict=True):
      np.testing.assert_array_equal(x, np.stack(y))


def test_threads_change_nothing(dataset):
  one = _take(dataset, 4, options=ReadOptions(threads=1, ahead=1))
  many = _take(dataset, 4, options=ReadOptions(threads=8, ahead=16))
  for x, y in zip(one, many, strict=True):
    _assert_same(x, y)
