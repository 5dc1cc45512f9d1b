"""Facts of GPUs."""

import pytest

from hourjax.parallel.chips import CHIPS, GIB
from hourjax.parallel.gpus import GPUS, device_facts, peak_flops


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_figures_hold_together(gpu):
  # jax's part of the memory is that of XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.
  assert gpu.limit == pytest.approx(0.92 * gpu.hbm * 1e9, rel=0.01)
  assert gpu.limit < gpu.hbm * GIB
  for kind in gpu.kinds:
    assert device_facts(kind) is gpu
    assert peak_flops(kind) == gpu.flops


def test_a_tpu_is_found_and_another_device_is_not():
  assert device_facts("TPU v5e") is CHIPS["v5e"]
  assert device_facts("NVIDIA H100 PCIe") is None  # it is slower
  assert peak_flops("cpu") is None
