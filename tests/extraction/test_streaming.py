"""The bounded queue, and extractions that are disturbed."""

import threading
import time

import numpy as np
import pytest

from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.extraction import streaming
from hourjax.extraction.streaming import BoundedQueue, QueueClosedError
from tests import videos
from tests.extraction import towers

# --- the queue ---------------------------------------------------------------


def _thread(work):
  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  return thread


def test_items_come_in_order_and_never_more_than_the_capacity():
  queue, held = BoundedQueue(3), []

  def put():
    for i in range(50):
      queue.put(i)

  thread = _thread(put)
  for i in range(50):
    held.append(len(queue._items))
    assert queue.get() == i
  thread.join(5)
  assert max(held) <= 3


def test_waiting_is_measured():
  queue = BoundedQueue(1)
  _thread(lambda: (time.sleep(0.2), queue.put("late")))
  assert queue.get() == "late"
  assert 0.15 < queue.waited < 2


def test_a_deadline():
  queue = BoundedQueue(1)
  with pytest.raises(TimeoutError):
    queue.get(time.monotonic() + 0.05)
  queue.put("there")
  assert queue.get(time.monotonic() - 1) == "there"


@pytest.mark.parametrize("work", ["get", "put"])
def test_closing_wakes_whoever_waits(work):
  queue, woken = BoundedQueue(1), []
  if work == "put":
    queue.put(0)

  def wait():
    with pytest.raises(QueueClosedError):
      queue.get() if work == "get" else queue.put(1)
    woken.append(True)

  thread = _thread(wait)
  time.sleep(0.05)
  queue.close()
  thread.join(5)
  assert woken
  with pytest.raises(QueueClosedError):
    queue.get()


# --- memory -----------------------------------------------------------------


def _settled(count) -> int:
  """Waits until a list no longer grows; returns its length."""
  length = -1
  while length != len(count):
    length = len(count)
    time.sleep(0.3)
  return length


@pytest.mark.parametrize("stalled", ["encoder", "writer"])
def test_frames_in_flight_are_bounded(params, tmp_path, monkeypatch, stalled):
  """Other stages stop when one does; how long the video is does not matter."""
  batch, chunks, frame_bytes = 8, 3, 32 * 32 * 3
  monkeypatch.setattr(streaming, "_QUEUE_BYTES", chunks * batch * frame_bytes)
  decode, encode = streaming.decode_frames, streaming.Encoder.__call__
  add = streaming.FeatureWriter.add
  decoded, encoded, in_flight = [], [], []

  def counting_decode(*args, **options):
    for chunk in decode(*args, **options):
      decoded.extend([1] * len(chunk))
      yield chunk

  def counting_encode(self, pixels):
    if stalled == "encoder" and not in_flight:
      in_flight.append(_settled(decoded))
    encoded.extend([1] * len(pixels))
    return encode(self, pixels)

  def stalled_add(self, features):
    if stalled == "writer" and not in_flight:
      in_flight.append(_settled(encoded))
    add(self, features)

  monkeypatch.setattr(streaming, "decode_frames", counting_decode)
  monkeypatch.setattr(streaming.Encoder, "__call__", counting_encode)
  monkeypatch.setattr(streaming.FeatureWriter, "add", stalled_add)
  root, out = tmp_path / "videos", tmp_path / "store"
  videos.write(root / "long.mp4", 128)
  assert towers.extract(params, root, out, batch_frames=batch, threads=1) == []
  assert len(decoded) == len(encoded) == 128
  if stalled == "encoder":
    # In the encoder, in the queue, and in the hands of the decoding thread.
    assert in_flight[0] == batch + chunks * batch + batch
  else:
    # With the writer, in the queue, and the batch that waits for room.
    assert in_flight[0] == batch + streaming._ENCODED_BATCHES * batch + batch


# --- runs that are disturbed -------------------------------------------------


@pytest.fixture(scope="module")
def params():
  return towers.params()


@pytest.fixture
def three(tmp_path):
  for i in range(3):
    videos.write(tmp_path / "videos" / f"{i}.mp4", 60)
  return tmp_path / "videos", tmp_path / "store"


def _left(out):
  return [p.name for p in out.rglob("*") if p.is_file() and "partial" in str(p)]


def _alive():
  return [t for t in threading.enumerate() if t.name.startswith("Thread-")]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), MemoryError()])
def test_an_error_while_writing_ends_the_run(params, three, monkeypatch, error):
  root, out = three
  finish, count = streaming.FeatureWriter.finish, []

  def second_fails(self):
    count.append(1)
    if len(count) == 2:
      raise error
    finish(self)

  before = len(_alive())
  with monkeypatch.context() as patch:
    patch.setattr(streaming.FeatureWriter, "finish", second_fails)
    with pytest.raises(type(error)):
      towers.extract(params, root, out, batch_frames=8, threads=2)
  assert len(_alive()) == before
  assert len(FeatureStore(out)) == len(list(out.rglob("*.npy"))) == 1
  assert _left(out) == []
  assert towers.extract(params, root, out, batch_frames=8) == []
  assert len(FeatureStore(out)) == 3


def test_an_interrupt_keeps_what_is_finished(params, three, monkeypatch):
  root, out = three
  encode, calls = streaming.Encoder.__call__, []

  def stop(self, pixels):
    calls.append(1)
    if len(calls) == 12:  # of 8 frames each: in the second video
      raise KeyboardInterrupt
    return encode(self, pixels)

  before = len(_alive())
  with monkeypatch.context() as patch:
    patch.setattr(streaming.Encoder, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
      towers.extract(params, root, out, batch_frames=8, threads=1)
  assert len(_alive()) == before and _left(out) == []
  assert set(FeatureStore(out).videos()) <= {"0.mp4"}
  assert towers.extract(params, root, out, batch_frames=8) == []


def test_an_error_that_no_check_foresees_fails_one_video(
  params, three, monkeypatch
):
  root, out = three
  decode = streaming.decode_frames

  def odd(path, *args, **kwargs):
    chunks = decode(path, *args, **kwargs)
    for chunk in chunks:
      yield chunk[:3]
      if path.name == "1.mp4":
        raise RuntimeError("surprise")
      yield chunk[3:]

  monkeypatch.setattr(streaming, "decode_frames", odd)
  (failed,) = towers.extract(params, root, out, batch_frames=8, threads=2)
  assert failed.id == "1.mp4"
  assert "RuntimeError: surprise" in failed.reason
  store = FeatureStore(out)
  assert set(store.videos()) == {"0.mp4", "2.mp4"}
  for name in store.videos():
    np.testing.assert_allclose(
      towers.read_all(store, name).astype(np.float32),
      towers.oracle(params, root / name),
      rtol=2**-8,
      atol=1e-4,
    )


def test_a_failed_video_leaves_no_file_behind_while_others_run(
  params, tmp_path
):
  """What it had written is gone by the time its outcome is reported."""
  root = tmp_path / "videos"
  videos.bad(root)
  videos.write(root / "plain.mp4", 150)
  store = FeatureStore(tmp_path / "store", create=True)
  left = {}

  def on_outcome(outcome):
    # The folder is made with the first file in it.
    left[outcome.name] = len(list(store.temp_files.folder.glob("*")))

  streaming.StreamingExtractor(
    ["cut.mp4", "zero.mp4", "plain.mp4"],
    root=root,
    store=store,
    encoder=streaming.Encoder(params, towers.MODEL, batch_frames=8),
    on_outcome=on_outcome,
  ).run()
  assert left == {"cut.mp4": 0, "zero.mp4": 0, "plain.mp4": 0}


def test_two_runs_of_one_worker_at_a_time(params, three):
  root, out = three
  with (
    FeatureStore(out, create=True).temp_files.locked(),
    pytest.raises(UserError, match="another extraction is writing"),
  ):
    towers.extract(params, root, out, batch_frames=8)


def test_a_finished_video_does_not_wait_for_the_batch(
  params, three, monkeypatch
):
  """One decoding thread that stalls: the first video is stored meanwhile."""
  root, out = three
  monkeypatch.setattr(streaming, "_BATCH_SECONDS", 0.2)
  decode, stored = streaming.decode_frames, threading.Event()
  record = FeatureStore.record

  def note(self, video, entry):
    record(self, video, entry)
    stored.set()

  def stall(path, *args, **kwargs):
    if path.name == "1.mp4":
      assert stored.wait(20), "the first video was not stored"
    yield from decode(path, *args, **kwargs)

  monkeypatch.setattr(streaming, "decode_frames", stall)
  monkeypatch.setattr(FeatureStore, "record", note)
  assert towers.extract(params, root, out, batch_frames=64, threads=1) == []
