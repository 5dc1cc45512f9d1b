"""NVIDIA GPUs, as far as `hourjax.plan` and a run's MFU need them.

Their facts stand in the same form as those of TPUs (`parallel.chips`). What
only a TPU has, such as tiles of our kernels, is unknown.

Peaks (dense, without sparsity), HBM and NVLink are NVIDIA's published figures,
of the large ones those of SXM modules. The shares of the peak that are assumed
come from what cuDNN's attention and large language models are reported to
reach. Nothing here was measured: `python -m hourjax.bench gpu` does.
"""

from hourjax.parallel.chips import (
  Chip,
  Efficiency,
  chip_of,
)

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
