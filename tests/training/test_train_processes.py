"""Runs of two processes: preempted, shrunk, grown, and with one that fails."""

import signal

import numpy as np
import pytest

from hourjax.training.checkpoint_format import (
  checkpoint_folder,
  checkpoint_steps,
)
from tests.training import runs

pytestmark = pytest.mark.slow
STEPS = 24


@pytest.fixture(scope="module")
def start(data):
  """Starts the processes of a run; each step is of two rows in any case."""

  def start(workdirs, *, devices=1, last=None, **changes):
    base = {
      "steps": STEPS, "checkpoint_every": 1000, "batch_rows": 2,
      "accumulate": 1, "mesh__fsdp": -1, "eval_every": 8, "eval_rows": 3,
      "data__dataset": f"{data}/held_out",
    } | changes  # fmt: skip
    environments = runs.hosts(len(workdirs), devices)
    if len(workdirs) == 1:
      environments = [{"XLA_FLAGS": environments[0]["XLA_FLAGS"]}]
    processes = []
    options = [base] * (len(workdirs) - 1) + [base | (last or {})]
    for workdir, env, own in zip(workdirs, environments, options):
      processes.append(runs.Training(data, workdir, env=env, **own))
    return processes

  return start


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
  """Losses, and held-out ones, of two devices that nothing happened to."""
  workdir = tmp_path_factory.mktemp("alone")
  (run,) = start([workdir], devices=2)
  status, said = run.ended()
  assert status == 0 and "cpu x 2" in said, said
  evaluated = runs.evaluations(workdir)
  assert [row["step"] for row in evaluated] == [8, 16, 24]
  return runs.losses(workdir), evaluated


def _ended(processes, **options):
  """Statuses, and what the processes said."""
  results = [process.ended(**options) for process in processes]
  return [status for status, _ in results], [said for _, said in results]


def _preempt(processes, workdir, which):
  """SIGTERM to one of them, two steps from now; the step all left after."""
  begin = runs.logged(workdir)
  assert processes[0].when(lambda: runs.logged(workdir) >= begin + 2)
  processes[which].process.send_signal(signal.SIGTERM)
  statuses, said = _ended(processes, timeout=60)
  assert set(statuses) == {0}, "\n".join(said)
  step = max(checkpoint_steps(checkpoint_folder(workdir)))
  assert begin + 2 <= step < STEPS
  assert f"left after step {step} of {STEPS}" in said[0]
  return step


def test_two_processes_one_and_two_again(start, alone, tmp_path):
  """Preempted twice on the way.

  The devices add up the same two numbers, whoever holds them: losses are
  equal floats. On one device a sum is taken in another order.
  """
  first = _preempt(start([tmp_path] * 2), tmp_path, which=1)
  second = _preempt(start([tmp_path], devices=2), tmp_path, which=0)
  assert second > first
  statuses, said = _ended(start([tmp_path] * 2))
  assert statuses == [0, 0] and f"from step {second}; cpu x 2" in said[0], said
  assert (runs.losses(tmp_path), runs.evaluations(tmp_path)) == alone


def test_steps_of_samples_on_two_processes_and_one(start, tmp_path):
  """Of 4 and 2 samples; in the last micro-batch one process has no sample."""
  samples = {"batch_samples": 4, "steps": 16}
  (run,) = start([tmp_path / "alone"], devices=2, **samples)
  status, said = run.ended()
  assert status == 0 and "4 samples of one stream" in said, said
  workdir = tmp_path / "run"
  processes = start([workdir] * 2, **samples)
  assert processes[0].when(lambda: runs.logged(workdir) >= 3)
  processes[0].process.send_signal(signal.SIGTERM)
  statuses, said = _ended(processes, timeout=60)
  assert set(statuses) == {0}, said
  assert max(checkpoint_steps(checkpoint_folder(workdir))) < 16
  (run,) = start([workdir], devices=2, **samples)
  status, said = run.ended()
  assert status == 0, said
  assert runs.losses(workdir) == runs.losses(tmp_path / "alone")


def test_another_mesh_on_the_way(start, alone, tmp_path):
  """A checkpoint of one device goes on on two, split over seq."""
  processes = start([tmp_path])
  step = _preempt(processes, tmp_path, which=0)
  processes = start([tmp_path] * 2, mesh__fsdp=1, mesh__seq=2)
  statuses, said = _ended(processes)
  assert statuses == [0, 0], said
  found = runs.losses(tmp_path)
  alone, evaluated = alone
  assert [line[0] for line in found] == list(range(1, STEPS + 1))
  assert [line[3] for line in found] == [line[3] for line in alone]  # tokens
  np.testing.assert_allclose(found, alone, rtol=2e-4)
  for row, expected in zip(runs.evaluations(tmp_path), evaluated, strict=True):
    assert row == pytest.approx(expected, rel=2e-4)
  assert 0 < step < STEPS


def test_only_one_of_them_finds_a_mistake(start, tmp_path):
  """Both end, both say which, and no one waits."""
  processes = start([tmp_path] * 2, last={"data__tokenizer": "nowhere"})
  statuses, said = _ended(processes, timeout=90)
  assert statuses == [2, 2], said
  assert "error: tokenizer folder nowhere" in said[1]
  assert "Traceback" not in said[1]
  assert "error: process 1 of 2: tokenizer folder nowhere" in said[0]
  assert "Traceback" not in said[0]


def test_folders_that_are_not_shared(start, tmp_path):
  processes = start([tmp_path / "one", tmp_path / "two"])
  statuses, said = _ended(processes, timeout=90)
  assert statuses == [2, 2], said
  assert "error: process 1 does not see what process 0 writes" in said[1]
  assert "use a --workdir that all hosts share" in said[0]


def test_one_is_gone(start, tmp_path):
  """The other does not wait for ever."""
  processes = start([tmp_path] * 2)
  assert processes[0].when(lambda: runs.logged(tmp_path) >= 2)
  processes[1].process.kill()
  statuses, said = _ended(processes, timeout=150)
  assert statuses[1] == -signal.SIGKILL
  assert statuses[0] not in (0, -signal.SIGKILL), said
