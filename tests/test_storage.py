import uuid

import numpy as np
import pytest
import tensorstore as ts

from hourjax import storage
from hourjax.errors import UserError
from hourjax.storage import Bucket, Folder, open_storage


@pytest.fixture(params=["folder", "file", "memory"])
def store(request, tmp_path):
  """Storage in a folder, and in a bucket of TensorStore."""
  if request.param == "folder":
    return open_storage(tmp_path / "store")
  if request.param == "file":
    return open_storage(f"file://{tmp_path}/store")
  return open_storage(f"memory://{uuid.uuid4().hex}")


def _parts(*spans):
  return [(start, np.zeros(size, np.uint8)) for start, size in spans]


def test_kinds(tmp_path):
  assert isinstance(open_storage(tmp_path), Folder)
  assert isinstance(open_storage(str(tmp_path / "a:b")), Folder)
  assert isinstance(open_storage(f"file://{tmp_path}"), Bucket)


def test_whole_objects(store):
  with pytest.raises(OSError, match=r"no such object|No such file"):
    store.read("a.txt")
  store.write("a.txt", b"one")
  store.write("a.txt", b"two")
  store.write("deep/er/été 東京.npy", b"three")
  assert store.read("a.txt") == b"two"
  assert store.read("deep/er/été 東京.npy") == b"three"


def test_list_is_flat_and_sorted(store):
  assert store.list("index") == []
  for key in ("index-2.jsonl", "index-1.jsonl", "indey", "index/x", "a"):
    store.write(key, b"")
  assert store.list("index") == ["index-1.jsonl", "index-2.jsonl"]


@pytest.mark.parametrize("count", [1, 5, 3 * storage._IN_FLIGHT])
def test_parts_are_filled_in_order(store, count):
  data = np.random.default_rng(count).integers(0, 256, 9000, dtype=np.uint8)
  store.write("data", data.tobytes())
  starts = np.random.default_rng(1).integers(0, 8000, count)
  parts = _parts(*((int(start), 1000) for start in starts))
  for done, _ in enumerate(store.read_parts("data", parts)):
    start, out = parts[done]
    np.testing.assert_array_equal(out, data[start : start + 1000])
  assert done == count - 1


@pytest.mark.parametrize("spans", [[(95, 10)], [(0, 4), (200, 1)]])
def test_parts_past_the_end(store, spans):
  store.write("data", bytes(100))
  with pytest.raises(OSError, match="it ends before byte"):
    list(store.read_parts("data", _parts(*spans)))


def test_parts_of_nothing(store):
  with pytest.raises(OSError, match=r"no such object|No such file"):
    list(store.read_parts("data", _parts((0, 4))))


def test_put_file(store, tmp_path):
  file = tmp_path / "partial"
  file.write_bytes(b"data")
  store.put_file(file, "shows/a b.npy")
  assert store.read("shows/a b.npy") == b"data"
  assert not file.exists()


def test_a_failed_write_keeps_the_old_object(tmp_path, monkeypatch):
  store = Folder(tmp_path)
  store.write("a", b"old")

  def stop(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.replace", stop)
  with pytest.raises(OSError, match="No space left"):
    store.write("a", b"new")
  assert store.read("a") == b"old"
  assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- URLs -------------------------------------------------------------------


def test_gs_urls_name_bucket_and_folder():
  bucket = Bucket("gs://some-bucket/features/run 1")
  spec = bucket._store.spec().to_json()
  assert spec["driver"] == "gcs" and spec["bucket"] == "some-bucket"
  assert spec["path"] in ("features/run 1/", "features/run%201/")
  assert bucket.location("a.npy") == "gs://some-bucket/features/run 1/a.npy"


@pytest.mark.parametrize("url", ["foo://x/y", "gs://", "gs://UP/x"])
def test_urls_that_cannot_be(url):
  with pytest.raises(UserError, match="is no URL that TensorStore opens"):
    Bucket(url)


def test_a_silent_server_ends_in_a_remedy(monkeypatch):
  """Without a network there is no response; with one, no such bucket."""
  monkeypatch.setattr(storage, "_READ_SECONDS", 1)
  with pytest.raises(UserError, match=r"^gs://hourjax-.*check the network.*cr"):
    Bucket("gs://hourjax-none-such/x").read("index.jsonl")


def test_a_server_that_refuses(monkeypatch):
  bucket = Bucket(f"memory://{uuid.uuid4().hex}")

  refused, future = ts.Promise.new()
  refused.set_exception(PermissionError("PERMISSION_DENIED: no access"))
  monkeypatch.setattr(
    bucket, "_store", type("S", (), {"read": lambda *_: future})()
  )
  with pytest.raises(UserError, match="PERMISSION_DENIED: no access; check"):
    bucket.read("a")


def test_one_context_for_all():
  name = uuid.uuid4().hex
  Bucket(f"memory://{name}").write("a", b"1")
  assert Bucket(f"memory://{name}/").read("a") == b"1"
  alone = ts.KvStore.open(f"memory://{name}/").result()
  assert alone.read("a").result().state == "missing"
