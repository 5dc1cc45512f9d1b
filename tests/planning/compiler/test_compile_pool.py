"""Worker processes that answer, die or take too long, and several of them."""

import threading
import time

import pytest

from hourjax.planning.compiler.compile_pool import run_all, run_worker

WORKER = "tests.planning.compiler.ending_worker"


def test_an_answer_with_flags_and_without_the_compilation_cache(monkeypatch):
  # These are for a CPU; the TPU compiler would take them, and schedule by them.
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  found = run_worker(WORKER, {"a": [1, 2]}, limit=60, flags="--x")
  assert found.answer == {
    "task": {"a": [1, 2]},
    "LIBTPU_INIT_ARGS": "--x",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_FLAGS": "",
  }
  assert (found.late, found.reason) == (False, "")


@pytest.mark.slow
def test_a_worker_compiles_whatever_is_in_the_cache(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  assert run_worker(WORKER, "cache", limit=60).answer is False


def test_an_abort_is_survived_and_says_why():
  found = run_worker(WORKER, "abort", limit=60)
  assert found.answer is None and not found.late
  assert "Check failed: 32 <= 16" in found.reason


def test_an_exception_says_why():
  found = run_worker(WORKER, "raise", limit=60)
  assert found.reason == "ValueError: the compiler's reason"


def test_a_worker_that_takes_too_long_is_stopped():
  began = time.monotonic()
  found = run_worker(WORKER, "sleep", limit=1)
  assert time.monotonic() - began < 20
  assert found.late and found.answer is None
  assert found.reason == "not compiled within 1 s"


def test_calls_run_beside_each_other_and_the_first_error_ends_them():
  both = threading.Barrier(2, timeout=30)
  assert run_all("x", {"a": both.wait, "b": both.wait}).keys() == {"a", "b"}
  ran = []

  def fail():
    raise ValueError("no")

  calls = {"bad": fail} | {
    n: lambda n=n: (time.sleep(0.1), ran.append(n)) for n in range(50)
  }
  with pytest.raises(ValueError, match="no"):
    run_all("x", calls)
  assert len(ran) < 50
