import json

import ml_dtypes
import numpy as np
import pytest

from hourjax.data import features
from hourjax.data.features import FeatureStore
from hourjax.errors import UserError

SHAPE = (4, 6)


def _features(frames=5, seed=0):
  return np.random.default_rng(seed).normal(size=(frames, *SHAPE))


@pytest.fixture
def store(tmp_path):
  store = FeatureStore(tmp_path, create=True)
  store.write("show/one.mp4", _features(), 5.004)
  return store


def test_chosen_frames_come_back_in_bfloat16(store, tmp_path):
  frames = np.array([0, 0, 3, 4])
  for opened in (store, FeatureStore(tmp_path)):
    assert "show/one.mp4" in opened and len(opened) == 1
    assert opened.stored("show/one.mp4") == (5, 5.0)
    read = opened.read("show/one.mp4", frames, SHAPE)
    assert read.dtype == ml_dtypes.bfloat16
    expected = _features().astype(ml_dtypes.bfloat16)[frames]
    np.testing.assert_array_equal(read, expected)


def test_float32_survives_as_bfloat16(tmp_path):
  store = FeatureStore(tmp_path, create=True)
  store.write("a.mp4", _features().astype(np.float32), 5)
  read = store.read("a.mp4", np.arange(5), SHAPE).astype(np.float32)
  np.testing.assert_allclose(read, _features(), rtol=2**-8)
  assert store.path("a.mp4").stat().st_size < 5 * 4 * 6 * 2 + 200


def test_no_store(tmp_path):
  with pytest.raises(UserError, match=r"index.jsonl does not exist; run"):
    FeatureStore(tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_truncated_and_missing_file(store):
  path = store.path("show/one.mp4")
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(UserError, match=r"one.mp4.npy cannot be read.*delete"):
    store.read("show/one.mp4", np.array([0]), SHAPE)
  path.unlink()
  with pytest.raises(UserError, match=r"one.mp4.npy cannot be read"):
    store.read("show/one.mp4", np.array([0]), SHAPE)


def test_another_tower_is_named_with_both_shapes(store):
  message = r"\(5, 4, 6\), the index .* expect bfloat16 \(5, 4, 7\); extract"
  with pytest.raises(UserError, match=message):
    store.read("show/one.mp4", np.array([0]), (4, 7))


def test_float32_file_is_refused(store):
  np.save(store.path("show/one.mp4"), _features().astype(np.float32))
  with pytest.raises(UserError, match="float32"):
    store.read("show/one.mp4", np.array([0]), SHAPE)


@pytest.mark.parametrize(
  "line", ['{"video": "two.mp4", "fra', '{"video": "two.mp4"}', "5", "[]"]
)
def test_broken_index_line_is_named(store, tmp_path, line):
  with open(tmp_path / "index.jsonl", "a") as file:
    file.write(line + "\n")
  with pytest.raises(UserError, match=r"index.jsonl, line 2 is broken"):
    FeatureStore(tmp_path)


def test_interrupted_write_leaves_nothing_under_the_final_name(
  store, tmp_path, monkeypatch
):
  def half(file, array):
    file.write(array.tobytes()[:50])
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(features.np, "save", half)
    with pytest.raises(KeyboardInterrupt):
      store.write("show/two.mp4", _features(seed=1), 5)
  assert not store.path("show/two.mp4").exists()
  reopened = FeatureStore(tmp_path)
  assert "show/two.mp4" not in reopened and "show/one.mp4" in reopened
  reopened.write("show/two.mp4", _features(seed=1), 5)
  read = FeatureStore(tmp_path).read("show/two.mp4", np.arange(5), SHAPE)
  np.testing.assert_array_equal(
    read, _features(seed=1).astype(ml_dtypes.bfloat16)
  )
  assert not list(tmp_path.rglob("*.partial"))


def test_array_is_in_place_before_its_index_line(tmp_path, monkeypatch):
  store = FeatureStore(tmp_path, create=True)

  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(json, "dumps", stop)
    with pytest.raises(KeyboardInterrupt):
      store.write("one.mp4", _features(), 5)
  assert store.path("one.mp4").exists()
  assert "one.mp4" not in FeatureStore(tmp_path, create=True)
