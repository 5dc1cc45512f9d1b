"""`python -m hourjax.extract` seen from a shell: exit codes, signals, disks."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from hourjax.data.store.features import FeatureStore
from hourjax.weights.shards import save_params
from tests import videos
from tests.extraction import towers

ROOT = Path(__file__).parents[1]
MANY = 30


def _arguments(folder, out, **options):
  config = towers.write_config(folder.parent / "config.py")
  # A tower from a folder: to draw one, each process would compile the draw.
  tower = folder.parent / "tower"
  if not tower.exists():
    save_params(towers.params(), towers.MODEL, tower)
  values = {"videos": folder, "out": out, "config": config, "tower": tower}
  values |= options
  return [sys.executable, "-m", "hourjax.extract"] + [
    f"--{key}={value}" for key, value in values.items()
  ]


def _start(arguments, **options):
  return subprocess.Popen(
    arguments,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def _run(arguments, **options):
  process = _start(arguments, **options)
  try:
    stdout, stderr = process.communicate(timeout=900)
  finally:
    process.kill()
  assert "Traceback" not in stderr, stderr
  return process.returncode, stdout, stderr


def _indexed(out):
  path = out / "index-00000.jsonl"
  return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture
def many(tmp_path):
  """Thirty equal videos, so that a run takes a while."""
  folder = tmp_path / "videos"
  first = videos.write(folder / "00.mp4", 450)
  for i in range(1, MANY):
    shutil.copy(first, folder / f"{i:02d}.mp4")
  return folder, tmp_path / "store"


@pytest.mark.slow
def test_good_and_bad_videos_in_one_folder(tmp_path):
  folder, out = tmp_path / "videos", tmp_path / "store"
  folder.mkdir()
  good, bad = videos.good(folder), videos.bad(folder)
  code, stdout, stderr = _run(_arguments(folder, out))
  assert code == 3, stderr
  total = len(good) + len(bad)
  assert f"{len(good)} of {total} videos in {out} (0 were there)" in stdout
  assert f"{len(bad)} failed; " in stdout and " frames/s; the limit" in stdout
  for name in bad:
    assert f"  failed {name}: " in stdout
  assert f"{total}/{total}" in stderr  # the bar
  assert set(FeatureStore(out).videos()) == set(good)
  lines = (out / "failures-00000.jsonl").read_text().splitlines()
  assert {json.loads(line)["file"] for line in lines} == set(bad)
  for name in bad:
    (folder / name).unlink()
  code, stdout, stderr = _run(_arguments(folder, out))
  assert code == 0, stderr
  assert f"all {len(good)} videos are in {out}" in stdout


def test_a_mistake(tmp_path):
  folder = tmp_path / "videos"
  videos.write(folder / "a.mp4", 3)
  code, _, stderr = _run(_arguments(folder, tmp_path / "store", tower="none"))
  assert code == 2
  # A slow machine first reports that the tower is being read.
  assert "error: none/config.json does not exist" in stderr.splitlines()[-1]
  assert "--tower takes a SigLIP folder" in stderr
  assert not (tmp_path / "store").exists()


def _until_some_are_stored(process, out):
  for _ in range(6000):
    if _indexed(out) >= 3:
      return
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  raise AssertionError("nothing was stored within a minute")


def _stamps(out):
  return {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}


@pytest.mark.slow
def test_kill_and_resume(many):
  """One decoding thread: what the kill costs is the video in hand."""
  folder, out = many
  arguments = _arguments(folder, out, threads=1, batch_frames=16)
  process = _start(arguments)
  _until_some_are_stored(process, out)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  store, before = FeatureStore(out), _stamps(out)
  assert 3 <= len(store) < MANY
  # An array may be in place without its line, and counts for nothing.
  assert 0 <= len(before) - len(store) <= 1
  for name in store.videos():  # all whole
    store.read(name, np.arange(128), towers.SHAPE)
  code, stdout, stderr = _run(arguments)
  assert code == 0, stderr
  assert f"{MANY} of {MANY} videos in {out} ({len(store)} were there)" in stdout
  assert len(FeatureStore(out)) == MANY
  after = _stamps(out)
  kept = [store.path(name) for name in store.videos()]
  assert all(after[path] == before[path] for path in kept)
  assert not list(out.glob(".partial-*"))


@pytest.mark.parametrize(
  "number, code",
  [
    (signal.SIGINT, 130),
    (signal.SIGTERM, 143),
  ],
)
@pytest.mark.slow
def test_interrupt_and_terminate(many, number, code):
  folder, out = many
  process = _start(_arguments(folder, out, threads=2, batch_frames=16))
  _until_some_are_stored(process, out)
  process.send_signal(number)
  stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == code, stderr
  assert "Traceback" not in stderr
  stored = len(FeatureStore(out))
  assert 3 <= stored < MANY
  assert f"{stored} of {MANY} videos in {out}" in stdout
  assert len(_stamps(out)) == stored
  assert not list(out.glob(".partial-*"))


@pytest.fixture
def small_and_large(tmp_path):
  folder = tmp_path / "videos"
  videos.write(folder / "0 small.mp4", 5)
  videos.write(folder / "1 large.mp4", 128)
  videos.write(folder / "2 small.mp4", 5)
  return folder, tmp_path / "store"


def _check_full(code, stderr, out, reason):
  assert code == 1
  assert f"error: {out}: " in stderr and reason in stderr
  assert "what is stored so far counts, make room and start again" in stderr


@pytest.mark.slow
def test_a_file_that_may_not_grow(small_and_large):
  """The kernel refuses writes past 10 kB, as a full disk does."""
  folder, out = small_and_large
  arguments = _arguments(folder, out, threads=1, batch_frames=4)
  limit = (10_000, 10_000)
  code, _, stderr = _run(
    arguments,
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
  )
  _check_full(code, stderr, out, "File too large")
  assert set(FeatureStore(out).videos()) == {"0 small.mp4"}
  assert [path.name for path in _stamps(out)] == ["0 small.mp4.npy"]
  assert not list(out.glob(".partial-*"))


@pytest.mark.slow
def test_a_full_disk(small_and_large):
  """A file system of 32 kB of its own, with the features on it."""
  folder, out = small_and_large
  out.mkdir()
  mount = f"mount -t tmpfs -o size=32k tmpfs {out}"
  unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
  if (
    shutil.which("unshare") is None
    or subprocess.run([*unshare, mount]).returncode
  ):
    pytest.skip("no small file system can be mounted here")
  command = " ".join(
    f"'{part}'" for part in _arguments(folder, out, threads=1, batch_frames=4)
  )
  # What is on it is lost with the namespace, so it is listed inside.
  script = f"{mount}; {command}; code=$?; cd {out}; find . -type f; exit $code"
  code, stdout, stderr = _run([*unshare, script])
  _check_full(code, stderr, out, "No space left on device")
  files = {line for line in stdout.splitlines() if line.startswith("./")}
  assert "./0 small.mp4.npy" in files
  assert not [name for name in files if "large" in name or "partial" in name]


@pytest.mark.slow
def test_full_hd_video_is_not_held_in_memory(tmp_path):
  """420 frames of 1920 x 1080 are 2,492 MiB, of which few are held at a time.

  So the bound holds for a video of any length; `test_streaming.py` counts the
  frames in flight.
  """
  folder, out = tmp_path / "videos", tmp_path / "store"
  videos.write_repeated(folder / "long.mp4", 420, 1, size=(1920, 1080))
  config = towers.write_config(
    tmp_path / "config.py",
    # Narrow but with more tokens: as many bytes as 64 tokens of width 1152.
    pool_side=16,
    vision={"image_size": 384, "patch_size": 48, "width": 288, "layers": 1},
  )
  arguments = [f"--config={config}", f"--videos={folder}", f"--out={out}"]
  code = f"""
    from absl import app
    from hourjax import extract
    from hourjax.benchmarks.figures import peak_mib
    try:
      app.run(extract.main, argv=["extract", *{arguments!r}])
    finally:
      print("MiB", peak_mib())
  """
  code, stdout, stderr = _run([sys.executable, "-c", textwrap.dedent(code)])
  assert code == 0, stderr
  assert FeatureStore(out).stored("long.mp4") == (420, 420.0)
  print(stdout)
  assert float(stdout.split("MiB")[-1]) < 1.5 * 1024
