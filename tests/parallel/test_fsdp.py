"""Gradients of sharded weights."""

import json
import subprocess
import sys


def test_a_ring_sums_what_all_devices_have():
  done = subprocess.run(
    [sys.executable, "-m", "tests.parallel.ring_product"],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert not done.returncode, done.stderr[-2000:]
  assert max(json.loads(done.stdout)) < 1e-5
