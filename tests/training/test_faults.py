"""What happens to a run of one process, with real signals, disks and files."""

import contextlib
import json
import pathlib
import random
import shutil
import signal
import subprocess
import time

import ml_dtypes
import numpy as np
import pytest

from hourjax.training.checkpoint_format import (
  checkpoint_folder,
  checkpoint_steps,
)
from tests.training import runs

pytestmark = pytest.mark.slow
STEPS = 72
KILLS = 20


@pytest.fixture(scope="module")
def start(data):
  """Starts a training of `STEPS` steps, of the projector alone."""

  def start(workdir, **changes):
    base = {
      "steps": STEPS,
      "checkpoint_every": 1000,
      "optimizer__memaug": 0.0,
      "optimizer__decoder": 0.0,
    }
    return runs.Training(data, workdir, toy=True, **(base | changes))

  return start


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
  """Losses of a run that nothing happened to."""
  workdir = tmp_path_factory.mktemp("alone")
  status, said = start(workdir).ended()
  assert status == 0, said
  found = runs.losses(workdir)
  assert [line[0] for line in found] == list(range(1, STEPS + 1))
  assert len({line[1] for line in found}) == STEPS
  return found


def _steps(workdir):
  return checkpoint_steps(checkpoint_folder(workdir))


def _half_saved(workdir):
  return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def test_killed_twenty_times(start, alone, tmp_path):
  """Kills while a checkpoint is written, during a start, and at other times.

  What is compared is all: losses, gradient norms and tokens as equal floats.
  """
  rng = random.Random(0)
  cut, reached = 0, [0]
  for kill in range(KILLS):
    run = start(tmp_path, checkpoint_every=2)
    before = runs.logged(tmp_path)
    if kill % 2:
      run.when(
        lambda before=before: (
          _half_saved(tmp_path) and runs.logged(tmp_path) != before
        )
      )
      time.sleep(rng.uniform(0, 0.01))
    elif kill % 4:
      time.sleep(rng.uniform(0, 2))
    else:
      run.when(lambda before=before: runs.logged(tmp_path) not in (0, before))
      time.sleep(rng.uniform(0, 0.3))
    run.process.kill()
    status, said = run.ended()
    assert status in (-signal.SIGKILL, 0), said
    assert "damaged" not in said
    cut += _half_saved(tmp_path)
    reached.append(max(_steps(tmp_path), default=0))
  assert reached == sorted(reached)  # no kill cost a finished checkpoint
  assert cut >= KILLS // 4
  status, said = start(tmp_path).ended()
  assert status == 0, said
  assert runs.losses(tmp_path) == alone
  assert not _half_saved(tmp_path)


def test_steps_of_samples_killed_and_asked_to_leave(start, tmp_path):
  """Of 4 and 2 samples, in micro-batches of one row and then of two."""
  samples = {"batch_samples": 4, "accumulate": 1, "batch_rows": 2, "steps": 48}
  status, said = start(tmp_path / "alone", **samples).ended()
  assert status == 0, said
  workdir = tmp_path / "run"
  for signals in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
    run = start(workdir, checkpoint_every=3, **samples)
    before = runs.logged(workdir)
    run.when(lambda before=before: runs.logged(workdir) >= before + 5)
    run.process.send_signal(signals)
    assert run.ended()[0] in (-signal.SIGKILL, 0)
  status, said = start(workdir, **samples).ended()
  assert status == 0 and "4 samples of one stream" in said, said
  assert runs.losses(workdir) == runs.losses(tmp_path / "alone")
  rows = runs.read_metrics(workdir)
  assert {row["samples_per_step"] for row in rows} == {2, 4}


@pytest.mark.parametrize(
  "number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_asked_to_leave(start, alone, tmp_path, number, status):
  """It saves after the step at hand, though no checkpoint was due."""
  run = start(tmp_path)
  assert run.when(lambda: runs.logged(tmp_path) >= 3)
  run.process.send_signal(number)
  left, said = run.ended(timeout=30)
  assert left == status, said
  (step,) = _steps(tmp_path)
  assert 3 <= step < STEPS and f"left after step {step} of {STEPS}" in said
  assert number.name in said
  status, said = start(tmp_path).ended()
  assert status == 0, said
  assert runs.losses(tmp_path) == alone


def test_asked_twice_leaves_at_once(start, tmp_path):
  run = start(tmp_path)
  assert run.when(lambda: runs.logged(tmp_path) >= 1)
  run.process.send_signal(signal.SIGSTOP)  # so that both signals come at once
  run.process.send_signal(signal.SIGINT)
  run.process.send_signal(signal.SIGCONT)
  run.process.send_signal(signal.SIGTERM)
  status, said = run.ended(timeout=30)
  assert status in (-signal.SIGTERM, -signal.SIGINT), said


def test_damage_is_said_and_the_one_before_used(start, alone, tmp_path):
  every = STEPS // 2
  status, said = start(tmp_path, checkpoint_every=every).ended()
  assert status == 0, said
  folder = tmp_path / "checkpoints"
  largest = max(
    (path for path in (folder / str(STEPS)).rglob("*") if path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  content = bytearray(largest.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 16] = bytes(x ^ 255 for x in content[middle:][:16])
  largest.write_bytes(content)
  status, said = start(tmp_path).ended()
  assert status == 0, said
  assert f"WARNING: {folder}/{STEPS} is damaged and now in" in said
  assert f"goes on from step {STEPS - every}" in said
  assert runs.losses(tmp_path) == alone

  for path in folder.iterdir():
    (path / "about" / "metadata").write_text("{")
  status, said = start(tmp_path).ended()
  assert status == 2 and "Traceback" not in said, said
  assert f"all 2 checkpoints of {folder} are damaged" in said
  for step in (STEPS, STEPS - every):
    assert f"\n  {step}: about/metadata cannot be read" in said


@contextlib.contextmanager
def _small_disk(folder, megabytes):
  folder.mkdir()
  options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
  if subprocess.run(["mount", *options], capture_output=True).returncode:
    pytest.skip("mounting a small disk is not permitted here")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", folder], check=True)


def _fill(run, disk):
  """Leaves a few blocks, for the metrics; the run holds still meanwhile."""
  run.process.send_signal(signal.SIGSTOP)
  time.sleep(0.2)
  free = shutil.disk_usage(disk).free - 300_000
  (disk / "filler").write_bytes(bytes(max(free, 0)))
  run.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_a_full_disk(start, alone, tmp_path, on_error):
  with _small_disk(tmp_path / "disk", 64) as disk:
    workdir = disk / "run"
    run = start(workdir, on_save_error=on_error, checkpoint_every=2)
    assert run.when(lambda: len(_steps(workdir)) > 1)
    _fill(run, disk)
    before = runs.logged(workdir)
    if on_error == "continue":
      assert run.when(lambda: runs.logged(workdir) > before + 8)
      (disk / "filler").unlink()
    status, said = run.ended()
    assert "could not be saved" in said and "No space left" in said
    assert len(said) < 20_000  # readable
    steps = _steps(workdir)
    assert not _half_saved(workdir)
    if on_error == "continue":
      assert status == 0, said
      assert "training goes on" in said and "Traceback" not in said
    else:
      assert status == 2, said
      assert f"the newest is that of step {steps[-1]}" in said
      assert runs.logged(workdir) < STEPS
      (disk / "filler").unlink()
      status, said = start(workdir).ended()
      assert status == 0 and "damaged" not in said, said
    assert runs.losses(workdir) == alone


def test_no_file_may_grow_that_large(start, alone, tmp_path, data):
  """The same where no disk can be mounted: the kernel refuses large files."""
  run = start(tmp_path, file_bytes=2**16, checkpoint_every=24)
  status, said = run.ended()
  # Nothing could be saved, so the run must not look as if it had been.
  assert status == 2, said
  assert "could not be saved" in said and "File too large" in said
  assert _steps(tmp_path) == []
  assert runs.losses(tmp_path) == alone


def _poisoned(data, folder, names):
  """A copy of the features; those of the named videos overflow anything."""
  shutil.copytree(data / "features", folder)
  for name in names:
    path = folder / f"{name}.mp4.npy"
    array = np.load(path, mmap_mode="r+")
    array.view(ml_dtypes.bfloat16)[:] = 3e38
    array.flush()
  return folder


def test_steps_that_are_not_finite_are_skipped(start, data, tmp_path):
  features = _poisoned(data, tmp_path / "features", ["train_0002"])
  about = {
    record["id"]: record["video"]
    for record in json.loads((data / "train.json").read_text())
  }
  workdir = tmp_path / "run"
  run = start(
    workdir, data__features=features, steps=12, checkpoint_every=1,
    keep_checkpoints=100, max_nonfinite=12,
  )  # fmt: skip
  status, said = run.ended()
  assert status == 0, said
  lines = [
    json.loads(line)
    for line in (workdir / "nonfinite.jsonl").read_text().splitlines()
  ]
  skipped = [line["step"] for line in lines]
  assert 0 < len(skipped) < 12
  for line in lines:
    names = [name for row in line["rows"].values() for name in row]
    assert any("train_0002" in about[name] for name in names)
    assert f"step {line['step']} is skipped: loss nan" in said
    assert all(f'"{name}"' in said for name in names)
  # Nothing is saved in a bad series but the end of the run.
  steps = set(range(1, 13)) - set(skipped) | {12}
  assert set(_steps(workdir)) == steps
  rows = runs.read_metrics(workdir)
  assert rows[-1]["skipped_steps"] == len(skipped)
  finite = [row["step"] for row in rows if np.isfinite(row["loss"])]
  assert finite == sorted(set(range(1, 13)) - set(skipped))


def test_too_many_in_a_row(start, data, alone, tmp_path):
  """It stops with a checkpoint from before; mended, it goes on from there."""
  names = [f"train_000{i}" for i in (1, 2, 3)]
  features = _poisoned(data, tmp_path / "features", names)
  workdir = tmp_path / "run"
  run = start(workdir)
  assert run.when(lambda: runs.logged(workdir) >= 3)
  run.process.terminate()
  assert run.ended()[0] == 0
  good = max(_steps(workdir))
  status, said = start(
    workdir, data__features=features, max_nonfinite=3
  ).ended()
  assert status == 2 and "Traceback" not in said, said
  assert f"step {good + 3}: loss or gradient was not finite in 3 steps" in said
  assert f"The newest checkpoint, of step {good}, is from before them" in said
  assert max(_steps(workdir)) == good
  status, said = start(workdir).ended()
  assert status == 0, said
  assert runs.losses(workdir) == alone
  assert (workdir / "nonfinite.jsonl").read_text() == ""


def test_another_configuration(start, tmp_path):
  workdir = pathlib.Path(tmp_path)
  assert start(workdir, steps=1).ended()[0] == 0
  status, said = start(workdir, steps=1, optimizer__clip=0.5).ended()
  assert status == 2 and "Traceback" not in said, said
  assert "optimizer.clip: 1.0 -> 0.5" in said
