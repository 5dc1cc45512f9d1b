"""An hour is asked about on four chips, as the TPU compiler sees it."""

import json
import os
import subprocess
import sys

import pytest

from hourjax.planning.compiler.compile_pool import ENVIRONMENT


@pytest.mark.slow
def test_3b_on_four_chips_of_v5e():
  done = subprocess.run(
    [
      *(sys.executable, "-m", "tests.inference.compile_for_tpu"),
      *("3b", "v5e:2x2", "3600"),
    ],
    env=os.environ | ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert not done.returncode, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert all(figures["gib"] < 4 for figures in found.values())
  assert "attention_forward" in found["read_memory"]["calls"]
  assert "attention_forward_causal" in found["prefill"]["calls"]
  # A token sends its logits and less: neither weights nor the cache travel.
  logits = 4 * 151_936
  assert 0 < found["decode"]["largest_collective"] <= logits
