"""NVIDIA GPUs, as far as `hourjax.plan` and a run's MFU need them.

Their facts stand in the same form as those of TPUs (`parallel.chips`). What
only a TPU has, such as tiles of our kernels, is unknown.

Peaks (dense, without sparsity), HBM and NVLink are NVIDIA's published figures,
of the large ones those of SXM modules. The shares of the peak that are assumed
come from what cuDNN's attention and large language models are reported to
reach. Nothing here was measured: `python -m hourjax.bench gpu` does.
"""

import os
import re
import subprocess
from collections.abc import Mapping

from hourjax.errors import UserError
from hourjax.parallel.chips import CHIPS, Chip, Efficiency, chip_of

# A chip and how many of it: "v5e-8".
_NAME = re.compile(r"([a-z0-9]+?)(?:-(\d+))?")

# Share of the memory that jax takes with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92,
# in GiB for each GB that is built in.
_TAKEN = 0.92 * 1e9 / (1 << 30)


def _gpu(
  name: str,
  kinds: tuple[str, ...],
  *,
  tflops: float,
  hbm: int,
  bandwidth: float,
  nvlink: float,
  network: float,
  price: float,
) -> Chip:
  """Returns the facts of a GPU.

  Args:
    name: as topologies are written, "h100" in "h100:8".
    kinds: `device_kind` of jax, in all spellings known.
    tflops: of dense bfloat16 products.
    hbm: GB that are built in.
    bandwidth: TB a second of HBM.
    nvlink: GB a second to other GPUs of the machine, in one direction.
    network: GB a second to other machines, in one direction.
    price: $ of an hour, an example.
  """
  return Chip(
    name=name,
    kinds=kinds,
    devices=1,
    flops=tflops * 1e12,
    hbm=hbm,
    usable=round(hbm * _TAKEN, 1),
    hbm_bandwidth=bandwidth * 1e12,
    # All GPUs of a machine are joined by switches. A group of them counts as a
    # closed ring, which uses two links at a time.
    dims=1,
    link=nvlink * 1e9 / 2,
    wraps=1,
    dcn=network * 1e9,
    largest=(4096,),
    host=8,
    price=price,
    tiles={},
    efficiency=Efficiency(
      dense=0.60, memaug=(0.62, 0.50), causal=(0.55, 0.45), tower=0.25
    ),
  )


GPUS = {
  chip.name: chip
  for chip in (
    _gpu("a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"),
         tflops=312, hbm=80, bandwidth=2.04,
         nvlink=300, network=25, price=2.70),
    _gpu("h100", ("NVIDIA H100 80GB HBM3",), tflops=989, hbm=80, bandwidth=3.35,
         nvlink=450, network=50, price=3.90),
    _gpu("h200", ("NVIDIA H200",), tflops=989, hbm=141, bandwidth=4.8,
         nvlink=450, network=50, price=5.00),
    _gpu("b200", ("NVIDIA B200",), tflops=2250, hbm=180, bandwidth=8.0,
         nvlink=900, network=50, price=8.00),
    # Without NVLink: of PCIe.
    _gpu("rtx4090", ("NVIDIA GeForce RTX 4090",), tflops=165, hbm=24,
         bandwidth=1.01, nvlink=32, network=3, price=0.50),
    _gpu("l4", ("NVIDIA L4",), tflops=121, hbm=24, bandwidth=0.30,
         nvlink=32, network=3, price=0.75),
  )
}  # fmt: skip


def device_facts(device_kind: str) -> Chip | None:
  """Returns the facts of a jax device, TPU or GPU; None if it is unknown."""
  for chip in GPUS.values():
    if device_kind in chip.kinds:
      return chip
  return chip_of(device_kind)


def peak_flops(device_kind: str) -> float | None:
  """Returns bf16 operations a second of one jax device of this kind, or None.

  Of a device, not a chip, so that `jax.device_count()` times it is what a
  run can reach (a TPU7x chip is two devices).
  """
  chip = device_facts(device_kind)
  return None if chip is None else chip.device_flops


def named_devices(
  name: str, environ: Mapping[str, str] = os.environ
) -> tuple[Chip, int]:
  """Returns the chip that a name stands for, and how many devices there are.

  Nothing here uses a device: a configuration that asks for chip=auto is read
  before the processes of a run have found each other, which jax allows only
  until then.

  Args:
    name: "auto" for those of this machine, or a chip and how many of it, such
      as "v5e-8" or "h100"; one without a number.
    environ: may say JAX_PLATFORMS=cpu, with which nothing is looked for.

  Raises:
    UserError: the name is unknown, or this machine has no accelerator.
  """
  if name == "auto":
    found = None
    if environ.get("JAX_PLATFORMS", "") != "cpu":
      found = _tpus() or _gpus()
    if found is None:
      raise UserError(
        "chip=auto found no TPU and no NVIDIA GPU on this machine"
        + " (JAX_PLATFORMS is cpu)" * (environ.get("JAX_PLATFORMS") == "cpu")
        + f"; name what it is to run on, such as chip=v5e-1: {_known()}"
      )
    return found
  match = _NAME.fullmatch(name)
  chip = match and (CHIPS | GPUS).get(match[1])
  count = int(match[2] or 1) if match else 0
  if not chip or not count:
    raise UserError(
      f"chip={name} is unknown; write auto, or a chip and how many of it, such"
      f" as v5e-8: {_known()}"
    )
  return chip, count * chip.devices


def _known() -> str:
  return f"known are {', '.join([*CHIPS, *GPUS])}"


def _tpus() -> tuple[Chip, int] | None:
  """Returns the TPU chips of this machine; None without any."""
  try:
    # No part of jax's interface, but the one way that leaves the chips alone.
    from jax._src import hardware_utils

    count, version = hardware_utils.num_available_tpu_chips_and_device_id()
  except (ImportError, AttributeError, OSError):
    return None
  chip = CHIPS.get(getattr(version, "name", ""))
  return (chip, count * chip.devices) if chip and count else None


def _gpus() -> tuple[Chip, int] | None:
  """Returns the NVIDIA GPUs of this machine; None without any.

  Raises:
    UserError: its GPUs are not in the table.
  """
  query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
  try:
    answer = subprocess.run(
      query, capture_output=True, text=True, timeout=30, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return None
  names = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
  if not names:
    return None
  for chip in GPUS.values():
    if names[0] in chip.kinds:
      return chip, len(names)
  raise UserError(
    f"chip=auto found {names[0]}, which hourjax/parallel/gpus.py does not know;"
    f" name one with as much memory: {', '.join(GPUS)}"
  )
