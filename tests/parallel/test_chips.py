"""The table of chips agrees with jax's own, and with the launch scripts'."""

import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic import tpu_info
from jax.sharding import AbstractDevice, AbstractMesh

from hourjax.errors import UserError
from hourjax.kernels.tpu.tiles import Tiles
from hourjax.parallel.chips import (
  CHIPS,
  GIB,
  attention_tiles,
  chip_of,
  parse_tiles,
)
from hourjax.parallel.gpus import peak_flops

KINDS = [kind for chip in CHIPS.values() for kind in chip.kinds]


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_is_what_jax_takes_it_for(kind):
  chip = chip_of(kind)
  known = tpu_info.get_tpu_info_for_chip(
    tpu_info.chip_version_from_device_kind(kind), chip.cores
  )
  # Of one core; published figures and jax's differ in the third digit.
  flops = chip.cores * known.bf16_ops_per_second
  bandwidth = chip.cores * known.mem_bw_bytes_per_second
  assert peak_flops(kind) == pytest.approx(flops, rel=0.01)
  assert bandwidth == pytest.approx(chip.hbm_bandwidth / chip.devices, rel=0.15)
  assert chip.vmem == known.vmem_capacity_bytes
  if chip.knows("matrix_units"):
    assert chip.matrix_units == known.num_mxus
    assert chip.matrix_side == known.mxu_column_size


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_hold_together(chip):
  assert chip.limit < 1.01 * chip.hbm * GIB / chip.devices
  assert len(chip.largest) == chip.dims
  assert chip.largest[0] % chip.wraps == 0
  assert chip.kernel_vmem < chip.vmem


def test_a_missing_fact_fails_when_it_is_read():
  chip = CHIPS["v4"]
  assert not chip.knows("bench") and chip.knows("link")
  with pytest.raises(UserError, match=r"v4 has no bench; add it to .*chips.py"):
    _ = chip.bench
  with pytest.raises(UserError, match="v4 has no matrix_side"):
    _ = chip.flops_per_cycle


def test_operations_of_a_cycle():
  known = {"v5e": 131_072, "v5p": 131_072, "v6e": 524_288, "tpu7x": 524_288}
  assert {name: CHIPS[name].flops_per_cycle for name in known} == known


def test_launch_scripts_agree():
  """They run without jax, on laptops, and so repeat some facts."""
  path = Path(__file__).parents[2] / "launch/tpu/accelerators.py"
  text = path.read_text().replace("from tpu.errors import LaunchError", "")
  spec = importlib.util.spec_from_loader("accelerators", loader=None)
  module = importlib.util.module_from_spec(spec)
  exec(compile(text, str(path), "exec"), vars(module))
  known = {
    chip.accelerator.prefix: chip
    for chip in CHIPS.values()
    if chip.knows("accelerator")
  }
  assert set(module.FAMILIES) == set(known)
  for prefix, family in module.FAMILIES.items():
    chip = known[prefix]
    counts = chip.accelerator.counts
    assert family.cores == counts
    assert family.one_host == chip.accelerator.one_host
    assert max(family.sizes) <= math.prod(chip.largest) * counts
    assert module.parse(f"{prefix}-{16 * counts}").workers == 16 // chip.host


def compiled_for(kind):
  device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
  mesh = AbstractMesh((1,), ("data",), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def test_tiles_of_the_chip_that_is_compiled_for():
  assert attention_tiles(jnp.bfloat16) is None  # no TPU
  with compiled_for("TPU v6 lite"):
    tiles = attention_tiles(jnp.bfloat16)
    assert tiles == CHIPS["v6e"].attention_tiles("bfloat16")
    text = "256,512,256,128"
    changed = attention_tiles(jnp.bfloat16, forward=text)
    assert changed == tiles._replace(forward=Tiles(256, 512, 256, 128))
    changed = attention_tiles(jnp.bfloat16, backward=text)
    assert changed == tiles._replace(backward=Tiles(256, 512, 256, 128))
    with pytest.raises(UserError, match="v6e has no attention tiles for int8"):
      attention_tiles(jnp.int8)


def test_tiles_of_float32_are_smaller():
  exact, narrow = (
    CHIPS["v6e"].attention_tiles(x) for x in (jnp.float32, jnp.bfloat16)
  )
  for kernel in ("forward", "backward"):
    small, large = getattr(exact, kernel), getattr(narrow, kernel)
    assert small.rows * small.keys < large.rows * large.keys


def test_an_unknown_generation_is_refused():
  message = "known for TPU v9, only for v4, v5e"
  with compiled_for("TPU v9"), pytest.raises(UserError, match=message):
    attention_tiles(jnp.bfloat16)


@pytest.mark.parametrize(
  "text",
  ["", "1024", "1024,1024,512", "1024,1024,512,500", "128,256,96,128",
   "1024,1024,384,512", "256,1024,512,512", "1024,1024,512,x"],
)  # fmt: skip
def test_text_that_names_no_tiles(text):
  with pytest.raises(UserError, match=f"forward_tiles is {text!r}; give rows"):
    parse_tiles(text, "forward_tiles")
