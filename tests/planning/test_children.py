"""Children that answer, die or take too long."""

import time

from hourjax.planning.compile_pool import ask_child

CHILD = "tests.planning.dying"


def test_an_answer():
  found = ask_child(CHILD, {"a": [1, 2]}, limit=60, flags="--x")
  assert found.answer == {"flags": "--x", "task": {"a": [1, 2]}}
  assert (found.late, found.reason) == (False, "")


def test_a_child_compiles_whatever_is_in_the_cache(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  assert ask_child(CHILD, "cache", limit=60).answer is False


def test_an_abort_is_survived_and_says_why():
  found = ask_child(CHILD, "abort", limit=60)
  assert found.answer is None and not found.late
  assert "Check failed: 32 <= 16" in found.reason


def test_an_exception_says_why():
  found = ask_child(CHILD, "raise", limit=60)
  assert found.reason == "ValueError: the compiler's reason"


def test_a_child_that_takes_too_long_is_stopped():
  began = time.monotonic()
  found = ask_child(CHILD, "sleep", limit=1)
  assert time.monotonic() - began < 20
  assert found.late and found.answer is None
  assert found.reason == "not compiled within 1 s"
