"""The table of chips agrees with jax's own and with the kernels' tiles."""

import pytest
from jax._src.pallas.mosaic import tpu_info

from hourjax.benchmarks import schedule
from hourjax.kernels.tpu import tiles
from hourjax.parallel.chips import CHIPS, GIB, chip_of, peak_flops

KINDS = [kind for chip in CHIPS.values() for kind in chip.kinds]


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_is_what_jax_takes_it_for(kind):
  chip = chip_of(kind)
  cores = 2 if chip.name in ("v4", "v5p") else 1  # of a device
  known = tpu_info.get_tpu_info_for_chip(
    tpu_info.chip_version_from_device_kind(kind), cores
  )
  # Of one core; published figures and jax's differ in the third digit.
  flops = cores * known.bf16_ops_per_second
  bandwidth = cores * known.mem_bw_bytes_per_second
  assert peak_flops(kind) == pytest.approx(flops, rel=0.01)
  assert bandwidth == pytest.approx(chip.hbm_bandwidth / chip.devices, rel=0.15)


def test_other_devices_have_no_peak():
  assert peak_flops("cpu") is None
  assert peak_flops("NVIDIA H100 80GB HBM3") is None


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_hold_together(chip):
  assert chip.compiler in tiles.CHIPS
  assert chip.limit < 1.01 * chip.hbm * GIB / chip.devices
  assert len(chip.largest) == chip.dims
  assert chip.largest[0] % chip.wraps == 0


def test_generations_with_a_schedule_are_known():
  assert set(schedule.FLOP_PER_CYCLE) <= set(CHIPS)
