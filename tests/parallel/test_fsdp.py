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
    timeout=120,
  )
  assert not done.returncode, done.stderr[-2000:]
  errors = json.loads(done.stdout)
  assert len(errors) == 8 and max(errors.values()) < 1e-4, errors
