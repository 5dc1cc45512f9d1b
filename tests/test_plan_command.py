"""The plan command, with the real TPU compiler and without it."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run(*arguments, module="hourjax.plan"):
  return subprocess.run(
    [
      sys.executable,
      "-m",
      module,
      "--config=configs/demo.py:stage=3",
      "--config.optimizer.name=adamw",
      *arguments,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.slow
def test_a_step_that_fits():
  done = _run(
    "--topology=v5e:2x4",
    "--data=full",
    "--config.mesh.fsdp=2",
    "--config.mesh.seq=4",
    "--config.model.memaug_layers=1",
    "--config.model.decoder.layers=1",
    "--json",
  )
  assert done.returncode == 0, done.stderr
  data = json.loads(done.stdout)
  assert data["fits"] and data["chips"] == 8
  computed = data["computed"]
  memory = computed["memory_bytes"]
  # The demo's step takes megabytes, most of them the kernels' code and
  # buffers.
  assert 1e6 < memory["total"] < 1e9
  assert memory["optimizer"] == pytest.approx(2 * memory["gradients"], rel=0.01)
  # What each axis is for travels along it; only the loop over labels has a
  # length that the data decides.
  assert {"seq", "fsdp", "fsdp+seq"} <= set(computed["sent_by_axis"])
  assert all(line["sent"] > 0 for line in computed["traffic"])
  guessed = sum(x["sent"] for x in computed["traffic"] if x["guessed"])
  assert guessed < 0.2 * sum(x["sent"] for x in computed["traffic"])
  assert 0 < data["estimated"]["mfu"] < 1


@pytest.mark.slow
def test_a_step_on_gpus():
  """16 of them on two machines: heads along a machine, weights over both."""
  done = _run("--topology=h100:16", "--data=full", "--config.mesh.fsdp=8",
              "--config.mesh.seq=2", "--config.model.dtype=bfloat16",
              "--config.model.gradient_dtype=bfloat16",
              "--config.batch_rows=8", "--json")  # fmt: skip
  assert done.returncode == 0, done.stderr
  data = json.loads(done.stdout)
  assert data["fits"] and (data["chips"], data["hosts"]) == (16, 2)
  assert "compiler for CPUs" in " ".join(data["assumed"])
  computed = data["computed"]
  assert computed["memory_bytes"]["temporaries"] > 1e6
  traffic = {(x["axes"], x["kind"], x["dtype"]) for x in computed["traffic"]}
  # Weights and, as the configuration says, their gradients are bfloat16.
  assert {
    ("fsdp+seq", "all-gather", "bf16"),
    ("seq", "all-to-all", "bf16"),
  } <= traffic
  assert ("fsdp", "reduce-scatter", "bf16") in traffic
  assert ("fsdp+seq", "all-gather", "f32") not in traffic
  done = _run("--topology=h100:2", "--exact")
  assert done.returncode == 2
  assert done.stderr.startswith("error: --exact: no program for h100:2 can be")


@pytest.mark.slow
def test_a_step_that_does_not_fit():
  done = _run(
    "--topology=v5e:1x1", "--data=full", "--config.batch_rows=2048", "--nofix"
  )
  assert done.returncode == 1, done.stderr
  assert "DOES NOT FIT: accumulate: RESOURCE_EXHAUSTED" in done.stdout


@pytest.mark.slow
def test_a_change_with_which_a_step_fits():
  done = _run(
    "--topology=v5e:1x1",
    "--data=full",
    "--config.batch_rows=2048",
    "--compile_limit=9",
    module="tests.planning.small_memory",
  )
  assert done.returncode == 1, done.stderr
  assert "DOES NOT FIT: accumulate: RESOURCE_EXHAUSTED" in done.stdout
  last = done.stdout.splitlines()[-1]
  assert last == "fits with --config.batch_rows=1024 --config.accumulate=2"


def test_mistakes_are_reported_without_a_traceback():
  done = _run("--topology=v5e:32x16")
  assert done.returncode == 2
  assert done.stderr.startswith("error: --topology=v5e:32x16: there is no such")
  assert "Traceback" not in done.stderr
  done = _run("--topology=v5e:2x4", f"--calibration={__file__}")
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {__file__} is not JSON")


def test_several_slices_need_a_search():
  done = _run("--topology=v5e:4x4,v6e:2x4")
  assert done.returncode == 2
  assert done.stderr.startswith("error: --topology names several slices; give")


@pytest.mark.slow
def test_its_compilers_end_with_it():
  """SIGTERM ends the command, and no process goes on compiling for it."""
  command = [sys.executable, "-m", "hourjax.plan", "--topology=v5e:2x4",
             "--config=configs/demo.py:stage=3", "--data=full"]  # fmt: skip
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
  try:
    until = time.monotonic() + 120
    while not (workers := _workers_of(process.pid)):
      assert process.poll() is None and time.monotonic() < until
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    time.sleep(1)
    # A process that has ended, and that nobody waits for, has no command line.
    lines = [Path(f"/proc/{pid}/cmdline") for pid in workers]
    assert not [path for path in lines if path.exists() and path.read_bytes()]
  finally:
    process.kill()


def _workers_of(pid: int) -> list[str]:
  """Processes that compile for a process."""
  found = []
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      words = path.read_bytes().split(b"\0")
      if (
        b"hourjax.planning.compiler.compile_worker" in words
        and b"%d" % pid in words
      ):
        found.append(path.parent.name)
  return found
