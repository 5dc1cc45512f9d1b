"""The comparison with torch, at a tiny size: both sides compute the same."""

import pytest

from hourjax.benchmarks import cpu

pytest.importorskip("torch")


def test_both_sides_compute_the_same(tmp_path):
  sizes = cpu.Sizes(16, 4, 2, 8, memory=(90,), repeats=1)
  found = cpu.measure_cpu(tmp_path, sizes)["memory of 90"]
  # float32 on numbers of order 1, as in tests/models/test_memaug.py.
  assert found["difference"] < 5e-6
  assert found["difference of gradients"] < 5e-6
  for part in ("forward", "with gradients"):
    assert found[part]["ours, s"] > 0 and found[part]["ratio"] > 0
