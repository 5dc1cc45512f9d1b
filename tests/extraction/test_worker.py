"""Whole runs in this process; tests/test_extract.py runs the command.

All of them that can use one batch size, so that one tower is compiled.
"""

import json
import os
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from tests import videos
from tests.extraction import towers

BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def params():
  return towers.params()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Every awkward video in one folder, and what is expected of each."""
  root = tmp_path_factory.mktemp("videos")
  good, bad = videos.good(root), videos.bad(root)
  (root / "notes.txt").write_text("not looked at")
  (root / ".hidden.mp4").write_text("not looked at")
  return root, good, bad


@pytest.fixture(scope="module")
def extracted(folder, params, tmp_path_factory):
  out = tmp_path_factory.mktemp("store")
  failed = towers.extract(params, folder[0], out, batch_frames=8, threads=3)
  return FeatureStore(out), failed


def test_every_good_video_is_stored_and_no_other(folder, extracted):
  _, good, bad = folder
  store, failed = extracted
  assert set(store.videos()) == set(good)
  assert {item.id for item in failed} == set(bad)
  for name, (pictures, seconds) in good.items():
    frames, duration = store.stored(name)
    assert frames == min(pictures, 128), name
    if seconds is not None:
      assert duration == pytest.approx(seconds, abs=0.02), name


def test_features_are_those_of_the_official_frames(folder, extracted, params):
  """Batches of 8 held frames of several of these videos."""
  root, good, _ = folder
  store, _ = extracted
  for name in good:
    expected = towers.oracle(params, root / name)
    got = towers.read_all(store, name).astype(np.float32)
    # bfloat16 keeps 8 bits; the encoder's own error is far below that.
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-4)


def test_failures_are_listed_with_their_reasons(folder, extracted):
  _, _, bad = folder
  store, failed = extracted
  lines = (store.root / "failures-00000.jsonl").read_text().splitlines()
  rows = {row["file"]: row["reason"] for row in map(json.loads, lines)}
  assert rows == {item.id: item.reason for item in failed}
  assert rows.keys() == bad.keys()
  for name, pattern in bad.items():
    assert re.search(pattern, rows[name]), rows[name]


def test_nothing_half_written_is_left(extracted):
  store, _ = extracted
  names = {p.name for p in store.root.rglob("*") if p.is_file()}
  arrays = {f"{name.split('/')[-1]}.npy" for name in store.videos()}
  rest = {"index-00000.jsonl", "failures-00000.jsonl", "tower.json"}
  assert names == arrays | rest


def test_a_second_start_tries_only_the_failed_ones(
  folder, extracted, params, capsys
):
  root, good, bad = folder
  store, _ = extracted
  times = {name: store.path(name).stat().st_mtime_ns for name in good}
  again = towers.extract(params, root, store.root, batch_frames=8)
  assert {item.id for item in again} == set(bad)
  assert {n: store.path(n).stat().st_mtime_ns for n in good} == times
  printed = capsys.readouterr().out
  assert f"({len(good)} were there), {len(bad)} failed" in printed
  assert "failed zero.mp4: " in printed
  lines = (store.root / "failures-00000.jsonl").read_text().splitlines()
  assert len(lines) == len(bad)


def test_a_mended_file_is_taken_and_no_longer_listed(params, tmp_path):
  root = tmp_path / "videos"
  root.mkdir()
  (root / "a.mp4").touch()
  out = tmp_path / "store"
  assert len(towers.extract(params, root, out, batch_frames=8)) == 1
  videos.write(root / "a.mp4", 5)
  assert towers.extract(params, root, out, batch_frames=8) == []
  assert (out / "failures-00000.jsonl").read_text() == ""
  assert "a.mp4" in FeatureStore(out)


@pytest.mark.slow
@pytest.mark.parametrize("batch, threads", [(1, 4), (7, 1), (64, 4)])
def test_batches_and_threads_change_nothing(
  params, extracted, folder, tmp_path, batch, threads
):
  names = tmp_path / "names.txt"
  names.write_text(
    "matroska.mkv\nshows/a b - été 東京.mp4\n\none.mp4\ncut.mp4\n"
  )
  towers.extract(
    params,
    folder[0],
    tmp_path / "store",
    batch_frames=batch,
    threads=threads,
    names=names,
  )
  store = FeatureStore(tmp_path / "store")
  assert len(store) == 3
  for name in store.videos():
    one, two = towers.read_all(store, name), towers.read_all(extracted[0], name)
    np.testing.assert_allclose(
      one.astype(np.float32), two.astype(np.float32), rtol=2**-7, atol=1e-5
    )


def test_workers_share_the_videos(params, folder, extracted, tmp_path):
  root, good, bad = folder
  out, shares = tmp_path / "store", []
  for i in range(3):
    before = set(FeatureStore(out, create=True).videos())
    failed = towers.extract(params, root, out, batch_frames=8, worker=(i, 3))
    now = set(FeatureStore(out).videos())
    shares.append((now - before) | {item.id for item in failed})
    assert (out / f"index-0000{i}.jsonl").exists()
  names = sorted([*good, *bad])
  assert shares == [set(names[i::3]) for i in range(3)]
  assert set(FeatureStore(out).videos()) == set(good)


def test_a_store_behind_a_url(params, folder, tmp_path, extracted):
  names = tmp_path / "names.txt"
  names.write_text("shows/a b - été 東京.mp4\nmatroska.mkv\n")
  out = f"file://{tmp_path}/store"
  assert (
    towers.extract(params, folder[0], out, batch_frames=8, names=names) == []
  )
  store = FeatureStore(out)
  for name in store.videos():
    np.testing.assert_array_equal(
      towers.read_all(store, name), towers.read_all(extracted[0], name)
    )
  assert len(store) == 2


def test_a_tower_that_gives_nan_fails_each_video(params, tmp_path):
  root = tmp_path / "videos"
  for i in range(2):
    videos.write(root / f"{i}.mp4", 40)
  spoiled = dict(params)
  spoiled["vision/position"] = params["vision/position"] * np.nan
  failed = towers.extract(spoiled, root, tmp_path / "store", batch_frames=8)
  assert len(failed) == 2
  assert all("the tower gives NaN" in item.reason for item in failed)
  assert not list((tmp_path / "store").rglob("*.npy"))


def test_another_tower_may_not_go_on(params, folder, extracted):
  other = towers.other_params()
  with pytest.raises(UserError, match=r"tower.json says .*same --tower"):
    towers.extract(other, folder[0], extracted[0].root, batch_frames=8)


def test_what_is_asked_wrongly(params, folder, tmp_path):
  out = tmp_path / "store"
  with pytest.raises(UserError, match="holds no video"):
    towers.extract(params, tmp_path, out)
  with pytest.raises(UserError, match="is not a folder on this machine"):
    towers.extract(params, tmp_path / "none", out)
  with pytest.raises(UserError, match="worker 3 of 3; the first is 0"):
    towers.extract(params, folder[0], out, worker=(3, 3))
  assert not out.exists()


def test_a_name_that_is_not_there_fails_alone(params, folder, tmp_path):
  names = tmp_path / "names.txt"
  names.write_text("nowhere.mp4\none.mp4\n")
  failed = towers.extract(
    params, folder[0], tmp_path / "store", batch_frames=8, names=names
  )
  assert [item.id for item in failed] == ["nowhere.mp4"]
  assert "No such file" in failed[0].reason


@pytest.mark.parametrize("url", [False, True])
def test_a_name_that_is_not_utf8_works_or_fails_alone(params, tmp_path, url):
  root = tmp_path / "videos"
  videos.write(root / "a.mp4", 3)
  odd = os.fsdecode(b"odd \xff.mp4")
  shutil.copy(root / "a.mp4", root / odd)
  out = f"file://{tmp_path}/store" if url else tmp_path / "store"
  failed = towers.extract(params, root, out, batch_frames=8)
  stored = set(FeatureStore(out).videos())
  assert "a.mp4" in stored
  assert stored | {item.id for item in failed} == {"a.mp4", odd}
