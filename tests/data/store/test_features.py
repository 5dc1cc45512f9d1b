import os
import threading
import uuid

import ml_dtypes
import numpy as np
import pytest

from hourjax.data.store.array_file import is_finite
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.jsonl import JsonlWriter
from tests import tampering

SHAPE = (4, 6)
NAME = "show/one.mp4"
BF16 = ml_dtypes.bfloat16


def _features(frames=5, seed=0, shape=SHAPE):
  return np.random.default_rng(seed).normal(size=(frames, *shape))


@pytest.fixture(params=["folder", "file", "memory"])
def root(request, tmp_path):
  urls = {
    "file": f"file://{tmp_path}/store",
    "memory": f"memory://{uuid.uuid4().hex}",
  }
  return urls.get(request.param, tmp_path / "store")


@pytest.fixture
def store(root):
  store = FeatureStore(root, create=True)
  store.write(NAME, _features(), 5.004)
  return store


@pytest.fixture
def local(tmp_path):
  store = FeatureStore(tmp_path / "store", create=True)
  store.write(NAME, _features(), 5.004)
  return store


# --- reading ----------------------------------------------------------------


@pytest.mark.parametrize(
  "frames", [[0, 1, 2, 3, 4], [0, 0, 3, 4], [4, 2, 2, 0], [3], []]
)
def test_chosen_frames_come_back_in_bfloat16(store, root, frames):
  frames = np.array(frames, int)
  for opened in (store, FeatureStore(root)):
    assert NAME in opened and len(opened) == 1
    assert list(opened.videos()) == [NAME]
    assert opened.stored(NAME) == (5, 5.0)
    read = opened.read(NAME, frames, SHAPE)
    assert read.dtype == BF16
    np.testing.assert_array_equal(read, _features().astype(BF16)[frames])


@pytest.mark.parametrize("seed", range(5))
def test_blocks_and_runs_of_a_long_video(root, seed):
  """Frames of 100 KB: several blocks a run, and many runs."""
  rng = np.random.default_rng(seed)
  shape = (50, 1000)
  features = rng.normal(size=(90, *shape)).astype(BF16)
  store = FeatureStore(root, create=True)
  store.write("a", features, 90)
  count = int(rng.integers(1, 91))
  for frames in (
    np.sort(rng.choice(90, count, replace=False)),
    rng.integers(0, 90, count),
    np.arange(90),
  ):
    out = np.full((len(frames) + 2, *shape), 7, BF16)
    store.read_into("a", frames.astype(np.int32), out[1:-1])
    np.testing.assert_array_equal(out[1:-1], features[frames])
    assert (out[0] == 7).all() and (out[-1] == 7).all()


def test_threads_read_side_by_side(store):
  def read(seed):
    frames = np.random.default_rng(seed).permutation(5)
    got = store.read(NAME, frames, SHAPE)
    same.append((got == _features().astype(BF16)[frames]).all())

  same = []
  threads = [threading.Thread(target=read, args=(i,)) for i in range(16)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert same == [True] * 16


def test_an_out_that_cannot_be_filled(store):
  out = np.zeros((*SHAPE, 5), BF16).transpose(2, 0, 1)
  with pytest.raises(ValueError, match="not C-contiguous"):
    store.read_into(NAME, np.arange(5), out)
  with pytest.raises(IndexError, match=r"frames 0 to 5 of show/one.mp4"):
    store.read(NAME, np.array([0, 5]), SHAPE)
  with pytest.raises(IndexError, match="frames -1 to 0"):
    store.read(NAME, np.array([0, -1]), SHAPE)


def test_a_file_of_numpys_own(local):
  """An array as the first version of the store wrote it."""
  with open(local.path(NAME), "wb") as file:
    np.save(file, _features(seed=3).astype(BF16).view("V2"))
  read = local.read(NAME, np.arange(5), SHAPE)
  np.testing.assert_array_equal(read, _features(seed=3).astype(BF16))
  stored = np.load(local.path(NAME)).view(BF16)
  np.testing.assert_array_equal(stored, read)


# --- what can be wrong with a file ------------------------------------------


def _rewrite(store, change):
  key = f"{NAME}.npy"
  store.storage.write(key, change(store.storage.read(key)))


@pytest.mark.parametrize("frames", [[0], [0, 1, 2, 3, 4], [0, 0]])
@pytest.mark.parametrize("keep", [0, 50, 130, -10, -1])
def test_truncated_file(store, keep, frames):
  _rewrite(store, lambda data: data[:keep])
  with pytest.raises(UserError, match=r"one.mp4.npy cannot be read.*it ends"):
    store.read(NAME, np.array(frames), SHAPE)


def test_missing_file(local):
  local.path(NAME).unlink()
  with pytest.raises(UserError, match=r"npy cannot be read \(.*No such"):
    local.read(NAME, np.array([0]), SHAPE)


def test_missing_object(root):
  store = FeatureStore(root, create=True)
  store.record("a.mp4", store.writer("a.mp4", 3, SHAPE, 3.0).stored)
  with pytest.raises(UserError, match=r"a.mp4.npy cannot be read"):
    FeatureStore(root).read("a.mp4", np.arange(3), SHAPE)


def test_not_an_array(store):
  _rewrite(store, lambda data: b"x" * len(data))
  with pytest.raises(UserError, match=r"npy cannot be read \(not a .npy file"):
    store.read(NAME, np.array([0]), SHAPE)


@pytest.mark.parametrize("shape", [(4, 7), (3, 6), (1, 24)])
def test_another_tower_is_named_with_both_shapes(store, shape):
  message = (
    rf"holds \|V2 \(5, 4, 6\).*expect bfloat16 \(5, {shape[0]}, {shape[1]}"
  )
  with pytest.raises(UserError, match=message + r"\); extract with this"):
    store.read(NAME, np.array([0]), shape)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", ">f4"])
def test_other_types_are_refused(local, dtype):
  np.save(local.path(NAME), _features().astype(dtype))
  with pytest.raises(UserError, match=f"holds {np.dtype(dtype)} "):
    local.read(NAME, np.array([0]), SHAPE)


def test_another_length_than_the_index_says(local):
  other = _features(6).astype(BF16).view("V2")
  np.save(local.path(NAME), other)
  with pytest.raises(UserError, match=r"\(6, 4, 6\).*\(5, 4, 6\)"):
    local.read(NAME, np.array([0]), SHAPE)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(store, value):
  spoiled = _features().astype(BF16)
  spoiled[3, 1, 2] = value
  data = spoiled.tobytes()
  _rewrite(store, lambda old: old[: -len(data)] + data)
  store.read(NAME, np.array([0, 1, 2, 4]), SHAPE)
  with pytest.raises(UserError, match=r"one.mp4.npy holds NaN or infinite"):
    store.read(NAME, np.array([0, 3]), SHAPE)


@pytest.mark.slow
def test_every_bfloat16_is_judged_right():
  bits = np.arange(2**16, dtype=np.uint16)
  judged = [is_finite(bits[i : i + 1]) for i in range(2**16)]
  expected = np.isfinite(bits.view(BF16).astype(np.float32))
  np.testing.assert_array_equal(judged, expected)


# --- writing ----------------------------------------------------------------


def test_chunks_and_types(root):
  features = _features(7)
  store = FeatureStore(root, create=True)
  with store.writer("a.mp4", 7, SHAPE, 7) as writer:
    writer.add(features[:2].astype(np.float32))
    writer.add(features[2:2].astype(BF16))
    writer.add(features[2:].astype(BF16))
  assert "a.mp4" not in FeatureStore(root, create=True)
  store.record("a.mp4", writer.stored)
  read = FeatureStore(root).read("a.mp4", np.arange(7), SHAPE)
  np.testing.assert_array_equal(read, features.astype(np.float32).astype(BF16))


def test_the_disk_holds_each_chunk_at_once(tmp_path):
  store = FeatureStore(tmp_path, create=True)
  with store.writer("a.mp4", 2, (64, 1152), 2) as writer:
    writer.add(_features(1, shape=(64, 1152)))
    (partial,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert partial.stat().st_size == 128 + 64 * 1152 * 2
    assert partial.name != "a.mp4.npy"
    writer.add(_features(1, shape=(64, 1152)))


class _Stop(BaseException):
  pass


@pytest.mark.parametrize("error", [_Stop, KeyboardInterrupt])
def test_an_abandoned_writer_leaves_nothing(store, root, tmp_path, error):
  before = set(tmp_path.rglob("*.npy"))
  with pytest.raises(error), store.writer("a.mp4", 3, SHAPE, 3) as writer:
    writer.add(_features(2))
    raise error
  assert set(tmp_path.rglob("*.npy")) == before
  assert not [p for p in store.temp_files.folder.glob("*") if p.is_file()]
  assert "a.mp4" not in FeatureStore(root)


def test_what_a_writer_refuses(local, tmp_path):
  with (
    pytest.raises(UserError, match="frames 1 to 2: the tower gives NaN"),
    local.writer("a", 3, SHAPE, 3) as writer,
  ):
    writer.add(_features(1))
    writer.add(np.full((2, *SHAPE), np.nan))
  with (
    pytest.raises(UserError, match="infinite"),  # too large for bfloat16
    local.writer("a", 3, SHAPE, 3) as writer,
  ):
    writer.add(np.full((2, *SHAPE), 3.4e38, np.float32))
  with (
    pytest.raises(ValueError, match=r"features \(4, 4, 6\) after 0 frames"),
    local.writer("a", 3, SHAPE, 3) as writer,
  ):
    writer.add(_features(4))
  with (
    pytest.raises(ValueError, match=r"a.npy: 2 frames of 3"),
    local.writer("a", 3, SHAPE, 3) as writer,
  ):
    writer.add(_features(2))
  assert not local.path("a").exists()
  assert not list(local.temp_files.folder.iterdir())


def test_a_name_that_the_file_system_refuses(local):
  with pytest.raises(UserError, match=r"too long.*rename the video"):
    local.write("x" * 254 + ".mp4", _features(), 5)
  assert not list(local.temp_files.folder.iterdir())


# --- the index --------------------------------------------------------------


def test_no_store(tmp_path):
  with pytest.raises(UserError, match=r"none holds no index\*.jsonl; run"):
    FeatureStore(tmp_path / "none")
  assert not (tmp_path / "none").exists()
  with pytest.raises(UserError, match=r"holds no index\*.jsonl; run"):
    FeatureStore(f"memory://{uuid.uuid4().hex}")


def test_the_indices_of_all_workers_are_one(root):
  for worker in range(3):
    store = FeatureStore(root, create=True, worker=worker)
    store.write(f"{worker}.mp4", _features(seed=worker), 5)
  FeatureStore(root, create=True, worker="beam-x").write("b", _features(), 5)
  store = FeatureStore(root)
  assert sorted(store.videos()) == ["0.mp4", "1.mp4", "2.mp4", "b"]
  keys = [f"index-0000{i}.jsonl" for i in range(3)] + ["index-beam-x.jsonl"]
  assert store.storage.list("index") == keys
  for worker in range(3):
    np.testing.assert_array_equal(
      store.read(f"{worker}.mp4", np.arange(5), SHAPE),
      _features(seed=worker).astype(BF16),
    )


def test_the_single_index_of_before(store, root):
  line = b'{"video": "old.mp4", "frames": 3, "duration": 3.5}\n'
  store.storage.write("index.jsonl", line)
  assert FeatureStore(root).stored("old.mp4") == (3, 3.5)
  assert len(FeatureStore(root)) == 2


def test_a_reopened_index_goes_on(store, root):
  again = FeatureStore(root, create=True)
  again.write("two.mp4", _features(seed=1), 5)
  assert list(FeatureStore(root).videos()) == [NAME, "two.mp4"]


def test_a_torn_line_of_a_kill_costs_its_video_only(store, root):
  data = store.storage.read("index-00000.jsonl")
  store.storage.write("index-00000.jsonl", data + b'{"video": "two.mp4", "fr')
  assert list(FeatureStore(root).videos()) == [NAME]
  FeatureStore(root, create=True).write("two.mp4", _features(), 5)
  assert list(FeatureStore(root).videos()) == [NAME, "two.mp4"]


@pytest.mark.parametrize(
  "line",
  [
    '{"video": "two.mp4"}',
    '{"video": "two.mp4", "frames": "many", "duration": 1}',
    '{"frames": 1, "duration": 1}',
    '{"video": "", "frames": 1, "duration": 1}',
    '{"video": ["two.mp4"], "frames": 1, "duration": 1}',
    '{"video": "two.mp4", "frames": -1, "duration": 1}',
    '{"video": "two.mp4", "frames": true, "duration": 1}',
    '{"video": "two.mp4", "frames": 1.5, "duration": 1}',
    '{"video": "two.mp4", "frames": 1000000000, "duration": 1}',
    '{"video": "two.mp4", "frames": 1, "duration": -1}',
    '{"video": "two.mp4", "frames": 1, "duration": 1e9}',
    '{"video": "two.mp4", "frames": 1, "duration": NaN}',
    '{"video": "two.mp4", "frames": 1, "duration": null}',
  ],
)
def test_a_broken_row_is_named(store, root, line):
  data = store.storage.read("index-00000.jsonl")
  store.storage.write("index-00000.jsonl", data + line.encode() + b"\n")
  with pytest.raises(UserError, match=r"index-00000.jsonl: .*delete the line"):
    FeatureStore(root)


def test_keys_that_are_not_known_are_left_alone(store, root):
  line = b'{"video": "a", "frames": 3, "duration": 3.5, "share": 0.97}\n'
  store.storage.write("index-00001.jsonl", line)
  assert FeatureStore(root).stored("a")[:2] == (3, 3.5)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (tampering.POINTER, "Git-LFS pointer"),
    (b"[" * 20_000 + b"\n", "line 1 is broken"),
    (b"[]\n", "line 1 is broken .no JSON object"),
    (b"\xff\n", "line 1 is broken"),
    (b"9" * 5000 + b"\n", "line 1 is broken"),
  ],
)
def test_an_index_that_is_something_else(store, root, content, message):
  store.storage.write("index-00000.jsonl", content)
  with pytest.raises(UserError, match=rf"index-00000\.jsonl.*{message}"):
    FeatureStore(root)


@pytest.mark.parametrize("content", [b"[" * 20_000, b"[]", b"\xff", b""])
def test_a_tower_file_that_is_something_else(store, content):
  store.storage.write("tower.json", content)
  with pytest.raises(UserError, match=r"tower\.json says"):
    store.claim("t", SHAPE)


HEADERS = {
  "nested": "(" * 3000,
  "no dictionary": "[]",
  "keys of two types": "{1: 2, 'a': 3}",
  "unhashable": "{[]: 1}",
  "negative": "{'descr': '|V2', 'fortran_order': False, 'shape': (-5, 4, 6)}",
  "huge": f"{{'descr': '|V2', 'fortran_order': False, 'shape': ({2**70},)}}",
  "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (5, 4, 6)}",
  "code": "{'descr': __import__('os').getcwd(), 'fortran_order': False}",
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_cannot_be_meant(store, header):
  text = HEADERS[header].ljust(117)[:117].encode() + b"\n"
  start = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
  _rewrite(store, lambda data: (start + text).ljust(len(data), b"\0"))
  with pytest.raises(UserError, match=r"one.mp4.npy (cannot be read|holds)"):
    store.read(NAME, np.arange(5), SHAPE)


def test_a_pipe_and_a_folder_are_no_features(local):
  for make in (os.mkfifo, os.mkdir):
    local.path(NAME).unlink()
    make(local.path(NAME))
    with pytest.raises(UserError, match=r"one.mp4.npy cannot be read"):
      local.read(NAME, np.array([0]), SHAPE)


def test_a_root_that_no_file_system_takes():
  with pytest.raises(UserError, match=r"holds no index\*\.jsonl; run"):
    FeatureStore("x" * 5000)


def test_array_is_in_place_before_its_index_line(local, monkeypatch):
  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(JsonlWriter, "add", stop)
    with pytest.raises(KeyboardInterrupt):
      local.write("two.mp4", _features(), 5)
  assert local.path("two.mp4").exists()
  assert "two.mp4" not in FeatureStore(local.root)


def test_towers_do_not_mix(store, root):
  store.claim("aa", SHAPE)
  FeatureStore(root).claim("aa", SHAPE)
  message = r"tower.json says .*'aa'.*this run's tower is .*'bb'.*--tower"
  with pytest.raises(UserError, match=message):
    FeatureStore(root).claim("bb", SHAPE)
  with pytest.raises(UserError, match=r"'width': 7"):
    FeatureStore(root).claim("aa", (4, 7))


def test_a_store_that_does_not_answer_holds_no_other_tower(local, monkeypatch):
  """Its own message says what to do; --tower has nothing to do with it."""

  def refuse(key):
    raise UserError("gs://b: no answer; check the network", kind="unreachable")

  local.claim("aa", SHAPE)
  monkeypatch.setattr(local.storage, "read", refuse)
  with pytest.raises(UserError, match=r"^gs://b: no answer; check the network"):
    local.claim("aa", SHAPE)


@pytest.mark.parametrize("content", ["", "{", "\udcff", "[" * 10_000])
def test_a_tower_that_cannot_be_read_is_another_one(local, content):
  path = local.root / "tower.json"
  path.write_text(content, errors="surrogateescape")
  with pytest.raises(UserError, match=r"tower.json says 'unreadable'.*--tower"):
    local.claim("aa", SHAPE)
