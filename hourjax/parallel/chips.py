"""The one table of TPU generations: every fact that hourjax uses of a chip.

To add a generation, or to change a tile of the attention kernels, edit
`CHIPS` and nothing else. A fact that nobody has measured or looked up yet is
None; whoever reads it gets an error that names it, never a wrong number.

Peaks and HBM are Google's published figures (cloud.google.com/tpu/docs). The
bytes of HBM that a program may use are what the compiler allows. ICI and DCN
bandwidths are what "How To Scale Your Model" (Austin et al., 2025) gives as
achievable. Tiles and efficiencies come from the compiler's schedules, as
`python -m hourjax.bench attention` prints them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hourjax.errors import UserError
from hourjax.kernels.constants import LANES
from hourjax.kernels.tpu.tiles import AttentionTiles, Tiles

GIB = 1 << 30
MIB = 1 << 20

# Stands for a fact that nobody has entered. Its type is that of any fact, since
# reading it raises.
UNKNOWN: Any = None

# Assumed ratio of measured speed to that of the compiler's schedule, which
# contains neither stalls nor waiting for HBM.
CLOCK_SHARE = 0.85


class Efficiency(NamedTuple):
  """Holds the share of a chip's bf16 peak that each kind of work reaches.

  Attributes:
    dense: products with weights. Large language models of MaxText report 55
      to 66 % MFU on v5e and 64 to 71 % on v5p, rematerialisation and traffic
      included; products alone are faster.
    memaug: MemAug's attention, (forward, backward): the share that the
      compiler's schedule reaches with its overhead, times `CLOCK_SHARE`.
    causal: the decoder's attention, likewise: the share for a row of 16,640
      positions that are one sample, where `planning.roofline.CAUSAL_BLOCK`
      counts as work.
    tower: XLA's attention in the vision tower, head dim 72.
  """

  dense: float
  memaug: tuple[float, float]
  causal: tuple[float, float]
  tower: float


class Accelerator(NamedTuple):
  """Describes how Cloud TPU names slices to rent, such as "v5litepod-16".

  `launch/tpu/accelerators.py` runs on laptops without jax and so repeats
  these facts; a test compares the two.

  Attributes:
    prefix: what stands before the hyphen.
    counts: what the number after the hyphen counts in one chip: 1, or 2 where
      it counts TensorCores.
    one_host: chips of the largest slice that has a single host.
  """

  prefix: str
  counts: int
  one_host: int


class BenchTopologies(NamedTuple):
  """Names the slices for which `hourjax.bench attention` compiles.

  Attributes:
    of_8: the topology of 8 devices.
    of_64: the topology of 64 devices.
  """

  of_8: str
  of_64: str


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Chip:
  """Holds the facts of one generation of TPU.

  A chip has one or two devices, as jax counts them, and a device one or two
  TensorCores. Reading a fact that is None raises a UserError.

  Attributes:
    name: the generation as topologies are written, "v5e" in "v5e:16x16".
    kinds: `device_kind` of its devices, in all spellings known.
    devices: devices that jax counts in a chip.
    cores: TensorCores of a device.
    flops: bf16 operations a second of a chip.
    hbm: GiB of HBM that are built into a chip.
    usable: GiB of HBM of a device that a program may use.
    hbm_bandwidth: bytes a second of a chip.
    dims: dimensions of its torus; a chip has two links in each.
    link: bytes a second of one ICI link in one direction.
    wraps: a dimension of the torus whose length is a multiple of this is a
      ring: its last chip is linked to its first.
    dcn: bytes a second of a chip between slices, in one direction.
    largest: chips of the largest slice along each dimension.
    host: chips of a VM.
    price: $ for a chip-hour on demand in a US region. It is an example:
      prices differ by region and change.
    vmem: bytes of vector memory that are built into a core.
    kernel_vmem: bytes of it that a kernel may take; the compiler wants the
      rest for itself.
    tiles: by dtype, the tiles of the forward and of the backward attention
      kernel.
    efficiency: share of the peak that is assumed in estimates.
    matrix_units: matrix units of a core.
    matrix_side: rows and columns of such a unit.
    matrix_rows: rows that enter a unit in one cycle.
    bench: topologies of the attention benchmark.
    accelerator: how Cloud TPU rents it.
  """

  name: str
  kinds: tuple[str, ...]
  devices: int
  flops: float
  hbm: int
  usable: float
  hbm_bandwidth: float
  dims: int
  link: float
  wraps: int
  dcn: float
  largest: tuple[int, ...]
  host: int
  price: float
  tiles: dict[str, tuple[Tiles, Tiles]]
  efficiency: Efficiency
  cores: int = UNKNOWN
  vmem: int = UNKNOWN
  kernel_vmem: int = UNKNOWN
  matrix_units: int = UNKNOWN
  matrix_side: int = UNKNOWN
  matrix_rows: int = UNKNOWN
  bench: BenchTopologies = UNKNOWN
  accelerator: Accelerator = UNKNOWN

  def __getattribute__(self, name: str) -> Any:
    """Returns a fact.

    Raises:
      UserError: nobody has entered the fact for this generation.
    """
    value = object.__getattribute__(self, name)
    if value is None and name in CHIP_FACTS:
      raise UserError(
        f"{self.name} has no {name}; add it to its entry in"
        " hourjax/parallel/chips.py"
      )
    return value

  def __repr__(self) -> str:
    return f"Chip({self.name})"

  def knows(self, name: str) -> bool:
    """Returns whether the fact of this name is entered."""
    return vars(self)[name] is not None

  @property
  def device_flops(self) -> float:
    """Returns bf16 operations a second of a device."""
    return self.flops / self.devices

  @property
  def limit(self) -> int:
    """Returns the bytes of HBM of a device that a program may use."""
    return int(self.usable * GIB)

  @property
  def flops_per_cycle(self) -> int:
    """Returns bf16 operations of one core in one cycle.

    A unit multiplies and adds `matrix_rows` rows with its matrix in a cycle.
    """
    of_a_row = 2 * self.matrix_side**2
    return self.matrix_units * of_a_row * self.matrix_rows

  def attention_tiles(self, dtype: jax.typing.DTypeLike) -> AttentionTiles:
    """Returns the tiles and limits of the attention kernels for a dtype.

    Raises:
      UserError: there are no tiles for this dtype.
    """
    name = jnp.dtype(dtype).name
    if name not in self.tiles:
      raise UserError(
        f"{self.name} has no attention tiles for {name}, only for"
        f" {', '.join(self.tiles)}; cast the arrays, or add tiles to"
        " hourjax/parallel/chips.py"
      )
    return AttentionTiles(*self.tiles[name], vmem=self.kernel_vmem)


CHIP_FACTS = frozenset(field.name for field in dataclasses.fields(Chip))

# An exact float32 product is six bfloat16 ones: larger tiles of them would be
# programs that take the compiler minutes. The same for all generations.
_EXACT = Tiles(rows=512, keys=256, chunk=256, unit=256)

CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      kinds=("TPU v4",),
      devices=1,
      cores=2,
      flops=275e12,
      hbm=32,
      usable=30.75,
      hbm_bandwidth=1.23e12,
      dims=3,
      link=4.5e10,
      wraps=4,
      dcn=6.25e9,
      largest=(16, 16, 16),
      host=4,
      price=3.22,
      vmem=16 * MIB,
      kernel_vmem=15 * MIB,
      tiles={
        "bfloat16": (
          Tiles(rows=1024, keys=512, chunk=256, unit=512),
          Tiles(rows=1024, keys=512, chunk=256, unit=512),
        ),
        "float32": (_EXACT, _EXACT),
      },
      # No schedule was read for v4: the shares are assumed.
      efficiency=Efficiency(
        dense=0.75, memaug=(0.75, 0.75), causal=(0.70, 0.70), tower=0.3
      ),
    ),
    Chip(
      name="v5e",
      kinds=("TPU v5 lite", "TPU v5e"),
      devices=1,
      cores=1,
      flops=197e12,
      hbm=16,
      usable=15.75,
      hbm_bandwidth=8.2e11,
      dims=2,
      link=4.5e10,
      wraps=16,
      dcn=3.125e9,
      largest=(16, 16),
      host=4,
      price=1.20,
      vmem=128 * MIB,
      kernel_vmem=110 * MIB,
      tiles={
        "bfloat16": (
          Tiles(rows=1024, keys=1024, chunk=512, unit=512),
          Tiles(rows=1024, keys=1024, chunk=512, unit=512),
        ),
        "float32": (_EXACT, _EXACT),
      },
      efficiency=Efficiency(
        dense=0.75,
        memaug=(0.94 * CLOCK_SHARE, 0.97 * CLOCK_SHARE),
        causal=(0.95 * CLOCK_SHARE, 0.97 * CLOCK_SHARE),
        tower=0.3,
      ),
      matrix_units=4,
      matrix_side=128,
      matrix_rows=1,
      bench=BenchTopologies(of_8="v5e:2x4", of_64="v5e:8x8"),
      accelerator=Accelerator("v5litepod", counts=1, one_host=8),
    ),
    Chip(
      name="v5p",
      kinds=("TPU v5", "TPU v5p"),
      devices=1,
      cores=2,
      flops=459e12,
      hbm=95,
      usable=95.74,
      hbm_bandwidth=2.765e12,
      dims=3,
      link=9e10,
      wraps=4,
      dcn=6.25e9,
      largest=(16, 20, 28),
      host=4,
      price=4.20,
      vmem=64 * MIB,
      kernel_vmem=60 * MIB,
      tiles={
        "bfloat16": (
          Tiles(rows=1024, keys=1024, chunk=512, unit=512),
          Tiles(rows=1024, keys=1024, chunk=512, unit=512),
        ),
        "float32": (_EXACT, _EXACT),
      },
      efficiency=Efficiency(
        dense=0.78,
        memaug=(0.93 * CLOCK_SHARE, 0.96 * CLOCK_SHARE),
        causal=(0.94 * CLOCK_SHARE, 0.98 * CLOCK_SHARE),
        tower=0.3,
      ),
      matrix_units=4,
      matrix_side=128,
      matrix_rows=1,
      bench=BenchTopologies(of_8="v5p:2x2x2", of_64="v5p:4x4x4"),
      accelerator=Accelerator("v5p", counts=2, one_host=4),
    ),
    Chip(
      name="v6e",
      kinds=("TPU v6 lite", "TPU v6e"),
      devices=1,
      cores=1,
      flops=918e12,
      hbm=32,
      usable=31.25,
      hbm_bandwidth=1.64e12,
      dims=2,
      link=9e10,
      wraps=16,
      dcn=1.25e10,
      largest=(16, 16),
      host=4,
      price=2.70,
      vmem=128 * MIB,
      kernel_vmem=110 * MIB,
      tiles={
        "bfloat16": (
          Tiles(rows=2048, keys=2048, chunk=512, unit=512),
          Tiles(rows=2048, keys=1024, chunk=256, unit=512),
        ),
        "float32": (_EXACT, _EXACT),
      },
      efficiency=Efficiency(
        dense=0.65,
        memaug=(0.59 * CLOCK_SHARE, 0.60 * CLOCK_SHARE),
        causal=(0.58 * CLOCK_SHARE, 0.61 * CLOCK_SHARE),
        tower=0.15,
      ),
      matrix_units=2,
      matrix_side=256,
      matrix_rows=2,
      bench=BenchTopologies(of_8="v6e:2x4", of_64="v6e:8x8"),
      accelerator=Accelerator("v6e", counts=1, one_host=8),
    ),
    Chip(
      name="tpu7x",
      kinds=("TPU7x",),
      devices=2,
      cores=1,
      flops=2307e12,
      hbm=192,
      usable=94.75,
      hbm_bandwidth=7.4e12,
      dims=3,
      link=9e10,
      wraps=4,
      dcn=1.25e10,
      largest=(16, 16, 36),
      host=4,
      price=12.00,
      vmem=64 * MIB,
      kernel_vmem=60 * MIB,
      tiles={
        "bfloat16": (
          Tiles(rows=2048, keys=2048, chunk=512, unit=512),
          Tiles(rows=2048, keys=1024, chunk=256, unit=512),
        ),
        "float32": (_EXACT, _EXACT),
      },
      efficiency=Efficiency(
        dense=0.65,
        memaug=(0.63 * CLOCK_SHARE, 0.67 * CLOCK_SHARE),
        causal=(0.62 * CLOCK_SHARE, 0.67 * CLOCK_SHARE),
        tower=0.15,
      ),
      matrix_units=2,
      matrix_side=256,
      matrix_rows=2,
      bench=BenchTopologies(of_8="tpu7x:2x2x1", of_64="tpu7x:4x4x2"),
    ),
  )
}


def chip_of(device_kind: str) -> Chip | None:
  """Returns the generation of a jax device; None if it is not a known TPU."""
  for chip in CHIPS.values():
    if device_kind in chip.kinds:
      return chip
  return None


def compiled_for() -> str:
  """Returns the `device_kind` for which a function is being traced.

  That is the kind of the mesh that is set (its devices may be of a topology,
  for compiling without a TPU), and else of the default device.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    device = jax.config.values["jax_default_device"]
  if device is None or isinstance(device, str):
    device = jax.devices(device)[0]
  return device.device_kind


def attention_tiles(
  dtype: jax.typing.DTypeLike, *, forward: str = "", backward: str = ""
) -> AttentionTiles | None:
  """Returns the kernels' tiles for the TPU that is compiled for.

  Args:
    dtype: of the queries, keys and values.
    forward: tiles of the forward kernel instead of the table's, in the form
      that `parse_tiles` reads; empty takes those of the table.
    backward: tiles of the backward kernel, likewise.

  Returns:
    Tiles and limits, or None where no TPU is compiled for.

  Raises:
    UserError: for a TPU that is not in `CHIPS`, a dtype without tiles, or
      text that names no tiles.
  """
  kind = compiled_for()
  chip = chip_of(kind)
  if chip is not None:
    tiles = chip.attention_tiles(dtype)
    if forward:
      tiles = tiles._replace(forward=parse_tiles(forward, "forward"))
    if backward:
      tiles = tiles._replace(backward=parse_tiles(backward, "backward"))
    return tiles
  if kind.startswith("TPU"):
    raise UserError(
      f"no attention tiles are known for {kind}, only for {', '.join(CHIPS)};"
      " add the generation to hourjax/parallel/chips.py (bench attention"
      " --tune finds its tiles)"
    )
  return None


def parse_tiles(text: str, name: str) -> Tiles:
  """Reads tiles that are written as "rows,keys,chunk,unit".

  Args:
    text: four numbers, such as "1024,1024,512,512".
    name: of the setting, for the message.

  Raises:
    UserError: it is not four multiples of 128, or a chunk does not divide the
      keys, or a unit is larger than the rows.
  """
  numbers = text.split(",")
  if len(numbers) == 4 and all(n.strip().isdecimal() for n in numbers):
    tiles = Tiles(*map(int, numbers))
    lanes = all(n > 0 and n % LANES == 0 for n in tiles)
    if lanes and tiles.keys % tiles.chunk == 0 and tiles.unit <= tiles.rows:
      return tiles
  raise UserError(
    f"{name} is {text!r}; give rows,keys,chunk,unit as multiples of {LANES},"
    " the chunk a divisor of the keys and the unit at most the rows, such as"
    " 1024,1024,512,512"
  )
