"""The training data of a run: weights, prefetching, samples that fail."""

import json
import threading

import jax
import numpy as np
import pytest

from hourjax.batch import Batch
from hourjax.data.columns import ColumnsBuilder, Measures
from hourjax.data.dataset import Unread
from hourjax.data.pipeline import Delivered
from hourjax.data.rows import RowSpec, Size, empty_rows
from hourjax.errors import UserError
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.data_loader import (
  DataLoader,
  UnreadSampleLog,
  sample_weights,
)

SPEC = RowSpec(Size(features=3, memory=5, queries=2, decoder=4), 1, 1, 2, 2)
LOST = Unread("r1", "missing", "record r1: a.npy does not exist")
BROKEN = Unread("r2", "damaged", "record r2: b.npy is cut off")


def _delivered(number, samples=10, unread=()):
  batch = empty_rows(SPEC, 6)
  for array in batch:
    array[:] = 0
  batch.decoder_token[:] = np.arange(24).reshape(6, 4) + 100 * number
  return Delivered(batch, number, False, samples, tuple(unread))


def _sharding():
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  return BatchSharding(mesh, SPEC, 6)


def test_micro_batches_on_the_device_in_order():
  loader = DataLoader((_delivered(n) for n in range(99)), _sharding())
  for n in range(4):
    batch, delivered = next(loader)
    assert delivered.position == n
    assert isinstance(batch, Batch)
    assert all(isinstance(x, jax.Array) for x in batch)
    assert batch.decoder_token.shape == (6, 4)
    assert batch.features.dtype == "bfloat16"
    np.testing.assert_array_equal(
      batch.decoder_token, delivered.batch.decoder_token
    )
  loader.close()


def test_the_next_batch_is_read_before_it_is_asked_for():
  asked, read = threading.Event(), threading.Event()

  def slow():
    yield _delivered(0)
    read.set()
    asked.wait(10)
    yield _delivered(1)

  loader = DataLoader(slow(), _sharding())
  next(loader)
  assert read.wait(10)
  asked.set()
  assert next(loader)[1].position == 1
  assert loader.waited >= 0
  loader._pool.shutdown()


def test_errors_of_the_reader_reach_the_caller():
  def broken():
    yield _delivered(0)
    raise UserError("disk gone")

  loader = DataLoader(broken(), _sharding())
  next(loader)
  with pytest.raises(UserError, match="disk gone"):
    next(loader)


def test_unread_samples_are_listed_and_counted(tmp_path):
  log = UnreadSampleLog(tmp_path, start=0, max_share=0.01)
  log.add(1, _delivered(1))
  assert not (tmp_path / "unread.jsonl").exists()
  log.add(2, _delivered(2, unread=[LOST, BROKEN]))
  log.add(3, _delivered(3, unread=[LOST]))
  assert log.counts == {"missing": 2, "damaged": 1}
  lines = (tmp_path / "unread.jsonl").read_text().splitlines()
  assert [json.loads(x)["step"] for x in lines] == [2, 2, 3]
  assert json.loads(lines[0])["reason"] == LOST.reason
  # A run that goes on from step 2 takes step 3 again.
  again = UnreadSampleLog(tmp_path, start=2, max_share=0.01)
  assert again.counts == {"missing": 1, "damaged": 1}
  assert len((tmp_path / "unread.jsonl").read_text().splitlines()) == 2


def test_too_many_unread_samples_stop_the_run(tmp_path):
  log = UnreadSampleLog(tmp_path, start=0, max_share=0.003)
  for step in (1, 2, 3):
    log.add(step, _delivered(step, unread=[LOST]))
  with pytest.raises(UserError) as error:
    log.add(4, _delivered(4, unread=[BROKEN]))
  for part in (
    "step 4: 4 of 44 samples",
    "config.data.max_skipped=0.003",
    LOST.reason,
    BROKEN.reason,
    str(tmp_path),
  ):
    assert part in str(error.value)


def test_a_share_below_the_limit_goes_on(tmp_path):
  log = UnreadSampleLog(tmp_path, start=0, max_share=0.003)
  for step in range(1, 50):
    log.add(step, _delivered(step, samples=999, unread=[LOST]))
  assert log.counts == {"missing": 49}


def test_processes_keep_lists_of_their_own(tmp_path):
  for process in (0, 1):
    log = UnreadSampleLog(tmp_path, start=0, max_share=1, process=process)
    log.add(1, _delivered(1, unread=[(LOST, BROKEN)[process]]))
  first, second = (
    json.loads((tmp_path / name).read_text())
    for name in ("unread.jsonl", "unread-1.jsonl")
  )
  assert first["id"] == LOST.id and second["id"] == BROKEN.id


def _columns():
  builder = ColumnsBuilder()
  measures = Measures(0, 9, 0, 5)
  for source, stream in [
    ("ego4d", "long"),
    ("panda", "long"),
    ("panda", "short"),
    ("images", "short"),
  ]:
    builder.add(measures, source, stream)
  return builder.build()


@pytest.mark.parametrize(
  "text, expected",
  [
    ("", [1, 1, 1, 1]),
    ("panda=2", [1, 2, 2, 1]),
    ("long=0.5", [0.5, 0.5, 1, 1]),
    ("long=0.5, panda=3", [0.5, 1.5, 3, 1]),
    ("images=0", [1, 1, 1, 0]),
  ],
)
def test_weights_of_streams_and_sources(text, expected):
  assert sample_weights(_columns(), text).tolist() == expected


def test_a_name_that_is_both_stream_and_source():
  builder = ColumnsBuilder()
  for source, stream in [("a", "b"), ("b", "a"), ("a", "a")]:
    builder.add(Measures(0, 9, 0, 5), source, stream)
  columns = builder.build()
  with pytest.raises(UserError, match="stream:NAME or source:NAME if it is"):
    sample_weights(columns, "a=2")
  assert sample_weights(columns, "stream:a=2").tolist() == [1, 2, 2]
  assert sample_weights(columns, "source:a=3").tolist() == [3, 1, 3]


@pytest.mark.parametrize(
  "text", ["panda", "panda=", "panda=x", "panda=-1", "lng=2", "panda=inf"]
)
def test_weights_that_make_no_sense(text):
  with pytest.raises(UserError) as error:
    sample_weights(_columns(), text)
  for part in (text, "NAME=WEIGHT", "long, short", "ego4d, panda, images"):
    assert part in str(error.value)
