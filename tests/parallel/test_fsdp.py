"""Gradients of sharded weights."""

import json
import subprocess
import sys


def test_rings_sum_what_all_devices_have():
  """Over one axis or two, along either dimension, beside copies and heads."""
  done = subprocess.run(
    [sys.executable, "-m", "tests.parallel.ring_product"],
    capture_output=True,
    text=True,
    timeout=180,
  )
  assert not done.returncode, done.stderr[-2000:]
  errors = json.loads(done.stdout)
  exact, rounded = (
    [error for name, error in errors.items() if name.startswith(sent)]
    for sent in ("float32", "bfloat16")
  )
  assert len(exact) == len(rounded) == 8
  assert max(exact) < 1e-5
  assert min(rounded) > 1e-4 and max(rounded) < 0.02
