"""Settings with which a model is trained on one chip, or on those of one host.

What takes memory is counted by formulas; of settings that fit, the fastest is
taken. They are tried in this order:

    base      layers' inputs     cost beside the first
    bfloat16  on the device
    bfloat16  on the host        2 x 3 GB over PCIe for an hour of video, 3B
    int8      on the device      weights rounded (0.7 %), and converted again
    int8      on the host
    nf4       on the host        weights rounded (10 %)

Without adapters the base is float32, and only the layers' inputs can move. A
row holds `hours` of video on each device; its memory is projected in chunks, so
that the memory itself is the largest array (`config.model.memory_chunk`).
"""

import bisect
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.models import lora
from hourjax.models.config import ModelConfig
from hourjax.models.lora import LoraConfig
from hourjax.models.params import VISION, param_shapes
from hourjax.parallel.chips import CHIPS, GIB, Chip
from hourjax.parallel.gpus import GPUS

# Share of what a program may use that the formulas may fill. Beside eleven
# schedules of the TPU compiler (3B and 7B, all bases, one chip and eight) they
# are between 3 % too little and 11 % too much of the total.
_FILL = 0.96
_CHUNK = 15_616  # memory tokens that are projected at a time
_WORDS = 1024  # of the questions and answers about the videos of a row
# Bytes of temporaries for each layer and each square of the width: kernels in
# other layouts, and one layer's kernels converted.
_KERNELS = {
  "float32": 20.0,
  "bfloat16": 12.3,
  "int8": 9.7,
  "int4": 6.4,
  "nf4": 6.4,
}
_BASES: tuple[lora.Base, ...] = ("bfloat16", "int8", "nf4")


@dataclasses.dataclass(frozen=True)
class Fit:
  """Holds settings that fit, and why they were taken.

  Attributes:
    settings: values of keys of the configuration, by dotted key.
    notes: sentences for people.
    needed: bytes of a device, by what takes them.
  """

  settings: dict[str, Any]
  notes: list[str]
  needed: dict[str, int]

  @property
  def total(self) -> int:
    """Returns the bytes of a device."""
    return sum(self.needed.values())


def row_of(hours: float, model: ModelConfig, max_frames: int = 512) -> Size:
  """Returns the capacity of a row for features of so much video.

  Args:
    hours: of video, at a frame a second.
    model: whose frames have so many tokens.
    max_frames: that temporal forgetting keeps of a video.
  """
  tokens = model.pool_side**2
  frames = max(128, math.ceil(hours * 3600))
  # Short videos keep a quarter of their frames, so that an hour of them has
  # more queries than one video of an hour.
  kept = min(max_frames, frames // 4) * (tokens // 4 + 1)
  kept += frames // 8 * (tokens // 4 + 1) // 8
  return Size(
    features=frames * tokens,
    memory=frames * (tokens + 1),
    queries=-(-(kept + _WORDS // 2) // 128) * 128,
    decoder=-(-(kept + _WORDS) // 128) * 128,
  )


def _in_chunks(rows: Size) -> tuple[Size, int]:
  """Returns rows whose memory chunks divide, and the tokens of a chunk.

  What they do not divide is cut off afterwards, by a copy of the memory.
  """
  pieces = max(1, round(rows.memory / _CHUNK))
  chunk = -(-rows.memory // pieces // 128) * 128
  return dataclasses.replace(rows, memory=pieces * chunk), chunk


def fit_one_host(
  model: ModelConfig,
  chip: Chip,
  devices: int,
  *,
  hours: float = 1.0,
  options: LoraConfig,
  rows: Size | None = None,
) -> Fit:
  """Returns the fastest settings that fit the devices of one host.

  Args:
    model: sizes of the model.
    chip: what there is.
    devices: how many of it, over which base and optimizer are split.
    hours: of video in a row.
    options: of adapters; rank 0 trains all but the tower.
    rows: capacity of a row, if not that of `hours`.

  Raises:
    UserError: nothing fits; names what is missing and the smallest change.
  """
  limit = int(_FILL * chip.limit)
  try:
    row = rows or row_of(hours, model)
    tried = list(_settings(model, devices, row, options))
  except ValueError as error:  # of targets or rank
    raise UserError(str(error)) from None
  for fit in tried:
    if fit.total <= limit:
      return dataclasses.replace(
        fit, notes=[_sentence(fit, chip, devices), *fit.notes]
      )
  tokens = model.pool_side**2
  hours = row.features / tokens / 3600
  least = min(tried, key=lambda fit: fit.total)
  raise UserError(
    f"training {'adapters' if options.rank else 'all'} of this model with"
    f" {row.memory:,} memory tokens in a row ({hours:.3g} hours of video)"
    f" needs {least.total / GIB:.1f} GiB of each of {devices} {chip.name} with"
    " all that saves memory"
    f" ({_parts(least.needed)}), and a program may use"
    f" {limit / GIB:.1f}; {_remedy(model, chip, devices, hours, options)}"
  )


def _settings(
  model: ModelConfig, devices: int, rows: Size, options: LoraConfig
) -> Iterator[Fit]:
  """Yields settings from the fastest to the smallest."""
  rows, chunk = _in_chunks(rows)
  for base in _BASES if options.rank else ("float32",):
    for offload in ("device", "host"):
      if base == "nf4" and offload == "device":
        continue
      own = dataclasses.replace(options, base=base)
      needed = _needed(model, rows, devices, own, offload)
      settings: dict[str, Any] = {
        **{f"rows.{k}": v for k, v in dataclasses.asdict(rows).items()},
        "batch_rows": devices,
        "mesh.fsdp": devices,
        "model.remat": "full",
        "model.memory_chunk": chunk,
        "model.offload": offload,
      }
      notes = []
      if options.rank:
        settings["lora.base"] = base
      else:
        settings["optimizer.mu_dtype"] = "bfloat16"
      if offload == "host":
        notes.append(
          "what the backward pass needs of each layer waits in the host's"
          " memory (model.offload=host): on the device it would not fit"
        )
      if base in ("int8", "nf4"):
        notes.append(
          f"the base is kept in {base} (lora.base={base}): in bfloat16 it would"
          " not fit"
        )
      yield Fit(settings, notes, needed)


def _needed(
  model: ModelConfig,
  rows: Size,
  devices: int,
  options: LoraConfig,
  offload: str,
) -> dict[str, int]:
  """Returns the bytes of a device, by what takes them."""
  frozen, trained = parameter_bytes(model, options)
  # Trained ones have gradients and two moments, all float32; without adapters
  # the first moment is bfloat16.
  state = trained * (4 if options.rank else 3.5)
  features = rows.features * model.vision.width * 2
  return {
    "weights": int(frozen / devices),
    "training state": int(state / devices),
    "two micro-batches": 2 * features,
    **temporaries(model, rows, options, offload),
  }


def parameter_bytes(
  model: ModelConfig, options: LoraConfig, *, tower: bool = False
) -> tuple[float, float]:
  """Returns the bytes of frozen and of trained parameters, the latter float32.

  Args:
    model: sizes of the model.
    options: of adapters; without any all but the tower is trained.
    tower: whether adapters are trained with pixels, which need the tower.
  """
  shapes = param_shapes(model)
  if options.rank:
    stored = lora.stored_shapes(options, shapes)
    bits = sum(
      x.size * (4 if x.dtype.name.endswith("int4") else 8 * x.dtype.itemsize)
      for path, x in stored.items()
      if tower or not path.startswith(VISION)
    )
    layers = lora.target_layers(options, shapes)
    own = lora.adapter_shapes(options, layers, shapes)
    return bits / 8, 4.0 * sum(x.size for x in own.values())
  frozen = sum(math.prod(x) for p, x in shapes.items() if p.startswith(VISION))
  return 4.0 * frozen, 4.0 * (sum(map(math.prod, shapes.values())) - frozen)


def temporaries(
  model: ModelConfig, rows: Size, options: LoraConfig, offload: str
) -> dict[str, int]:
  """Returns what a row takes while it is computed, by what takes it.

  Args:
    model: sizes of the model; its memory is projected in chunks.
    rows: capacity of the row.
    options: of adapters.
    offload: see `ModelConfig`.
  """
  decoder = model.decoder
  width, depth = decoder.width, decoder.layers
  if options.rank:
    kernels = _KERNELS[options.base] * depth * width**2
  else:
    # The gradient of the embeddings, before and after it is summed; a layer's
    # weights, and one gradient.
    kernels = 16.0 * decoder.vocab * width + 10 * width * decoder.mlp
  kept = (
    4 * width * depth * rows.decoder
    + 6 * width * model.memaug_layers * rows.queries
  )
  return {
    "memory and its gradient": 4 * rows.memory * width,
    "inputs of layers": 0 if offload == "host" else kept,
    "one layer at work": int(66 * rows.queries * width + kernels) + (150 << 20),
  }


def _sentence(fit: Fit, chip: Chip, devices: int) -> str:
  """Returns what was chosen, in one sentence."""
  return (
    f"{devices} x {chip.name}: {fit.total / GIB:.1f} of"
    f" {chip.limit / GIB:.1f} GiB{' of each' * (devices > 1)} by formulas"
    f" ({_parts(fit.needed)})"
  )


def _parts(needed: Mapping[str, int]) -> str:
  return ", ".join(f"{k} {v / GIB:.1f}" for k, v in needed.items() if v)


def _remedy(
  model: ModelConfig,
  chip: Chip,
  devices: int,
  hours: float,
  options: LoraConfig,
) -> str:
  """Returns the smallest changes with which it would fit."""

  def fits(chip: Chip, devices: int, hours: float, options: LoraConfig) -> bool:
    limit = int(_FILL * chip.limit)
    found = _settings(model, devices, row_of(hours, model), options)
    return any(fit.total <= limit for fit in found)

  ways = []
  if not options.rank and fits(
    chip, devices, hours, dataclasses.replace(options, rank=16)
  ):
    ways.append("rank=16 trains adapters, which fit")
  # Rows with more memory never take less: bisected, in steps of three minutes.
  steps = range(1, math.ceil(hours * 20))
  most = bisect.bisect(
    steps, False, key=lambda n: not fits(chip, devices, n / 20, options)
  )
  if most:
    ways.append(f"hours={most / 20:g} fits")
  larger = sorted(
    (other for other in (CHIPS | GPUS).values() if other.limit > chip.limit),
    key=lambda other: other.limit,
  )
  for other in larger:
    if fits(other, other.devices, hours, options):
      ways.append(f"chip={other.name} fits ({other.limit / GIB:.0f} GiB)")
      break
  for count in (2, 4, 8):
    if count > devices and fits(chip, count, hours, options):
      ways.append(f"chip={chip.name}-{count} fits")
      break
  return "; ".join(ways) or "no chip that is known fits it"
