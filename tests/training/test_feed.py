import json
import threading

import jax
import numpy as np
import pytest

from hourjax.batch import Batch
from hourjax.data.dataset import Unread
from hourjax.data.pipeline import Delivered
from hourjax.data.rows import RowSpec, Size, empty_rows
from hourjax.errors import UserError
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.training.batch_sharding import Placing
from hourjax.training.data_loader import Feed, UnreadLedger

SPEC = RowSpec(Size(features=3, memory=5, queries=2, decoder=4), 1, 1, 2, 2)
LOST = Unread("r1", "missing", "record r1: a.npy does not exist")
BROKEN = Unread("r2", "damaged", "record r2: b.npy is cut off")


def _delivered(number, samples=10, unread=()):
  batch = empty_rows(SPEC, 6)
  for array in batch:
    array[:] = 0
  batch.decoder_token[:] = np.arange(24).reshape(6, 4) + 100 * number
  return Delivered(batch, number, samples, tuple(unread))


def _placing():
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  return Placing(mesh, SPEC, 6)


def test_micro_batches_on_the_device_in_order():
  feed = Feed((_delivered(n) for n in range(99)), _placing())
  for n in range(4):
    batch, delivered = next(feed)
    assert delivered.position == n
    assert isinstance(batch, Batch)
    assert all(isinstance(x, jax.Array) for x in batch)
    assert batch.decoder_token.shape == (6, 4)
    assert batch.features.dtype == "bfloat16"
    np.testing.assert_array_equal(
      batch.decoder_token, delivered.batch.decoder_token
    )
  feed.close()


def test_the_next_batch_is_read_before_it_is_asked_for():
  asked, read = threading.Event(), threading.Event()

  def slow():
    yield _delivered(0)
    read.set()
    asked.wait(10)
    yield _delivered(1)

  feed = Feed(slow(), _placing())
  next(feed)
  assert read.wait(10)
  asked.set()
  assert next(feed)[1].position == 1
  assert feed.waited >= 0
  feed._pool.shutdown()


def test_errors_of_the_reader_reach_the_caller():
  def broken():
    yield _delivered(0)
    raise UserError("disk gone")

  feed = Feed(broken(), _placing())
  next(feed)
  with pytest.raises(UserError, match="disk gone"):
    next(feed)


def test_unread_samples_are_listed_and_counted(tmp_path):
  ledger = UnreadLedger(tmp_path, start=0, max_share=0.01)
  ledger.add(1, _delivered(1))
  assert not (tmp_path / "unread.jsonl").exists()
  ledger.add(2, _delivered(2, unread=[LOST, BROKEN]))
  ledger.add(3, _delivered(3, unread=[LOST]))
  assert ledger.counts == {"missing": 2, "damaged": 1}
  lines = (tmp_path / "unread.jsonl").read_text().splitlines()
  assert [json.loads(x)["step"] for x in lines] == [2, 2, 3]
  assert json.loads(lines[0])["reason"] == LOST.reason
  # A run that goes on from step 2 takes step 3 again.
  again = UnreadLedger(tmp_path, start=2, max_share=0.01)
  assert again.counts == {"missing": 1, "damaged": 1}
  assert len((tmp_path / "unread.jsonl").read_text().splitlines()) == 2


def test_too_many_unread_samples_stop_the_run(tmp_path):
  ledger = UnreadLedger(tmp_path, start=0, max_share=0.003)
  for step in (1, 2, 3):
    ledger.add(step, _delivered(step, unread=[LOST]))
  with pytest.raises(UserError) as error:
    ledger.add(4, _delivered(4, unread=[BROKEN]))
  for part in (
    "step 4: 4 of 44 samples",
    "config.data.max_skipped=0.003",
    LOST.reason,
    BROKEN.reason,
    str(tmp_path),
  ):
    assert part in str(error.value)


def test_a_share_below_the_limit_goes_on(tmp_path):
  ledger = UnreadLedger(tmp_path, start=0, max_share=0.003)
  for step in range(1, 50):
    ledger.add(step, _delivered(step, samples=999, unread=[LOST]))
  assert ledger.counts == {"missing": 49}


def test_processes_keep_ledgers_of_their_own(tmp_path):
  for process in (0, 1):
    ledger = UnreadLedger(tmp_path, start=0, max_share=1, process=process)
    ledger.add(1, _delivered(1, unread=[(LOST, BROKEN)[process]]))
  first, second = (
    json.loads((tmp_path / name).read_text())
    for name in ("unread.jsonl", "unread-1.jsonl")
  )
  assert first["id"] == LOST.id and second["id"] == BROKEN.id
