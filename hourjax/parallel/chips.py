"""Generations of TPU: what a chip can do, and what jax calls it.

Peaks and HBM are Google's published figures (cloud.google.com/tpu/docs); the
bytes of HBM that a program may use are what the compiler allows; ICI and DCN
are what "How To Scale Your Model" (Austin et al., 2025) gives as achievable.
"""

from typing import NamedTuple

GIB = 1 << 30


class Chip(NamedTuple):
  """One generation. A chip has one or two devices, as jax counts them.

  Attributes:
    name: as topologies are written, "v5e" in "v5e:16x16".
    kinds: `device_kind` of its devices, in all spellings known.
    flops: bf16 operations a second of a chip.
    hbm: GiB of a chip that are built in.
    usable: GiB of a device that a program may use.
    hbm_bandwidth: bytes a second of a chip.
    dims: of its torus; it has two links in each.
    link: bytes a second of one ICI link in one direction.
    wraps: length of a torus dimension from whose multiples on the last chip
      is linked to the first.
    dcn: bytes a second of a chip between slices, in one direction.
    devices: that jax counts in a chip.
    largest: the largest slice's chips along each dimension.
    host: chips of a VM.
    price: $ for a chip-hour on demand in a US region. It is an example:
      prices differ by region and change.
    compiler: its name in Pallas' `TpuInfo`.
  """

  name: str
  kinds: tuple[str, ...]
  flops: float
  hbm: int
  usable: float
  hbm_bandwidth: float
  dims: int
  link: float
  wraps: int
  dcn: float
  devices: int
  largest: tuple[int, ...]
  host: int
  price: float
  compiler: str

  @property
  def device_flops(self) -> float:
    """bf16 operations a second of a device."""
    return self.flops / self.devices

  @property
  def limit(self) -> int:
    """Bytes of HBM of a device that a program may use."""
    return int(self.usable * GIB)


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      kinds=("TPU v4",),
      flops=275e12,
      hbm=32,
      usable=30.75,
      hbm_bandwidth=1.23e12,
      dims=3,
      link=4.5e10,
      wraps=4,
      dcn=6.25e9,
      devices=1,
      largest=(16, 16, 16),
      host=4,
      price=3.22,
      compiler="v4",
    ),
    Chip(
      name="v5e",
      kinds=("TPU v5 lite", "TPU v5e"),
      flops=197e12,
      hbm=16,
      usable=15.75,
      hbm_bandwidth=8.2e11,
      dims=2,
      link=4.5e10,
      wraps=16,
      dcn=3.125e9,
      devices=1,
      largest=(16, 16),
      host=4,
      price=1.20,
      compiler="v5e",
    ),
    Chip(
      name="v5p",
      kinds=("TPU v5", "TPU v5p"),
      flops=459e12,
      hbm=95,
      usable=95.74,
      hbm_bandwidth=2.765e12,
      dims=3,
      link=9e10,
      wraps=4,
      dcn=6.25e9,
      devices=1,
      largest=(16, 20, 28),
      host=4,
      price=4.20,
      compiler="v5p",
    ),
    Chip(
      name="v6e",
      kinds=("TPU v6 lite", "TPU v6e"),
      flops=918e12,
      hbm=32,
      usable=31.25,
      hbm_bandwidth=1.64e12,
      dims=2,
      link=9e10,
      wraps=16,
      dcn=1.25e10,
      devices=1,
      largest=(16, 16),
      host=4,
      price=2.70,
      compiler="v6e",
    ),
    Chip(
      name="tpu7x",
      kinds=("TPU7x",),
      flops=2307e12,
      hbm=192,
      usable=94.75,
      hbm_bandwidth=7.4e12,
      dims=3,
      link=9e10,
      wraps=4,
      dcn=1.25e10,
      devices=2,
      largest=(16, 16, 36),
      host=4,
      price=12.00,
      compiler="7x",
    ),
  )
}


def chip_of(device_kind: str) -> Chip | None:
  """The generation of a jax device, or None if it is no TPU known here."""
  for chip in CHIPS.values():
    if device_kind in chip.kinds:
      return chip
  return None


def peak_flops(device_kind: str) -> float | None:
  """bf16 operations a second of one jax device of this kind, or None.

  Of a device, not a chip, so that `jax.device_count()` times it is what a
  run can reach (a TPU7x chip is two devices).
  """
  chip = chip_of(device_kind)
  return None if chip is None else chip.device_flops
