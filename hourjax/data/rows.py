"""Rows: samples laid side by side in fixed capacities, told apart by ids."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from hourjax.batch import IGNORE, Batch
from hourjax.data.layout import Layout
from hourjax.errors import UserError

Visual = Literal["features", "frames", "tiles"]


@dataclasses.dataclass(frozen=True)
class Size:
  """What a sample takes of a row, and what a row can hold.

  Attributes:
    features: stored feature tokens (frames x tokens a frame).
    frames: video frames that come as pixels.
    tiles: image tiles that come as pixels.
    blends: blended tokens of scaled-down images.
    memory: memory tokens, S.
    queries: MemAug queries, T.
    decoder: decoder positions, L.
  """

  features: int = 0
  frames: int = 0
  tiles: int = 0
  blends: int = 0
  memory: int = 0
  queries: int = 0
  decoder: int = 0

  def __add__(self, other: "Size") -> "Size":
    return Size(
      *(a + b for a, b in zip(self.astuple(), other.astuple(), strict=True))
    )

  def astuple(self) -> tuple[int, ...]:
    return dataclasses.astuple(self)

  def fits(self, capacity: "Size") -> bool:
    return all(a <= b for a, b in zip(self.astuple(), capacity.astuple()))


def check_fits(size: Size, capacity: Size, name: str) -> None:
  """Raises UserError naming every capacity that one sample exceeds."""
  over = [
    f"config.rows.{field.name}={getattr(capacity, field.name)} <"
    f" {getattr(size, field.name)} of {name}"
    for field in dataclasses.fields(Size)
    if getattr(size, field.name) > getattr(capacity, field.name)
  ]
  if over:
    raise UserError(
      "sample larger than a row: "
      + "; ".join(over)
      + "; raise these capacities or leave the sample out"
    )


@dataclasses.dataclass(frozen=True)
class Sample:
  """One laid-out sample with its visual input.

  Attributes:
    name: record id.
    layout: index arithmetic of the sample.
    kind: where its visual tokens come from.
    visual: [F, Q, V] stored features, or [n, h, w, 3] pixels (uint8, or float
      in [-1, 1]); None for text.
  """

  name: str
  layout: Layout
  kind: Visual = "features"
  visual: np.ndarray | None = None

  @property
  def size(self) -> Size:
    return layout_size(
      self.layout, self.kind, 0 if self.visual is None else len(self.visual)
    )


def layout_size(layout: Layout, kind: Visual, images: int) -> Size:
  """Size of a sample from its layout and its number of frames or tiles."""
  repository = layout.repository
  visual = repository.visual if kind == "features" else images
  return Size(
    blends=len(repository.blend_source),
    memory=len(repository.source),
    queries=len(layout.query_token),
    decoder=len(layout.decoder_token),
    **{kind: visual},
  )


@dataclasses.dataclass(frozen=True)
class RowSpec:
  """Static shapes of a row.

  Attributes:
    capacity: how much a row holds.
    frame_tokens: tokens of a pooled frame (Q).
    tile_tokens: tokens of a tile (P).
    width: of the tower's features (V).
    image_size: pixels along one side of frames and tiles.
  """

  capacity: Size
  frame_tokens: int
  tile_tokens: int
  width: int
  image_size: int

  def visual_base(self, kind: Visual) -> int:
    """Row number of the first visual token of a kind (see `batch`)."""
    capacity = self.capacity
    frames = capacity.features
    tiles = frames + capacity.frames * self.frame_tokens
    return {"features": 0, "frames": frames, "tiles": tiles}[kind]

  @property
  def blend_base(self) -> int:
    tiles = self.visual_base("tiles")
    return tiles + self.capacity.tiles * self.tile_tokens


def build_row(samples: Sequence[Sample], spec: RowSpec) -> Batch:
  """One row, without the leading B axis; sample n has segment id n + 1.

  Pixels are uint8 unless a sample brings floats.

  Raises:
    UserError: if the samples do not fit.
  """
  row = _empty_row(spec, _pixel_dtype(samples))
  used = Size()
  for number, sample in enumerate(samples, start=1):
    check_fits(used + sample.size, spec.capacity, sample.name)
    _place(row, sample, number, used, spec)
    used = used + sample.size
  return row


def stack_rows(rows: Sequence[Batch]) -> Batch:
  """Rows to a batch with a leading B axis."""
  return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


def _pixel_dtype(samples):
  floats = [
    sample.visual.dtype
    for sample in samples
    if sample.visual is not None and sample.kind != "features"
  ]
  return np.result_type(*floats) if floats else np.uint8


def _empty_row(spec: RowSpec, pixels) -> Batch:
  c, side = spec.capacity, spec.image_size

  def ints(n, fill=0):
    return np.full(n, fill, np.int32)

  return Batch(
    features=np.zeros((c.features, spec.width), ml_dtypes.bfloat16),
    frames=np.zeros((c.frames, side, side, 3), pixels),
    tiles=np.zeros((c.tiles, side, side, 3), pixels),
    blend_source=np.zeros((c.blends, 4), np.int32),
    blend_weight=np.zeros((c.blends, 4), np.float32),
    memory_source=ints(c.memory, -1),
    memory_position=ints(c.memory),
    memory_segment=ints(c.memory),
    query_token=ints(c.queries, -1),
    query_source=ints(c.queries, -1),
    query_position=ints(c.queries),
    query_segment=ints(c.queries),
    query_reads=ints(c.queries),
    decoder_token=ints(c.decoder),
    decoder_source=ints(c.decoder, -1),
    decoder_position=ints(c.decoder),
    decoder_segment=ints(c.decoder),
    target=ints(c.decoder, IGNORE),
  )


def _place(row: Batch, sample: Sample, number, used: Size, spec: RowSpec):
  """Writes one sample into the row, its indices shifted to row numbers."""
  layout, size = sample.layout, sample.size
  repository = layout.repository
  offset = _visual_offset(sample, used, spec)

  def to_row(source):
    blend = spec.blend_base + used.blends - repository.visual
    shift = np.where(source >= repository.visual, blend, offset)
    return np.where(source < 0, -1, source + shift)

  def part(column, field):
    start = getattr(used, field)
    return column[start : start + getattr(size, field)]

  if sample.visual is not None:
    part(getattr(row, sample.kind), sample.kind)[:] = sample.visual.reshape(
      getattr(size, sample.kind), *getattr(row, sample.kind).shape[1:]
    )
  part(row.blend_source, "blends")[:] = to_row(repository.blend_source)
  part(row.blend_weight, "blends")[:] = repository.blend_weight
  part(row.memory_source, "memory")[:] = to_row(repository.source)
  part(row.memory_position, "memory")[:] = repository.position
  part(row.memory_segment, "memory")[:] = number
  part(row.query_token, "queries")[:] = layout.query_token
  part(row.query_source, "queries")[:] = _shift(
    layout.query_source, used.memory
  )
  part(row.query_position, "queries")[:] = layout.query_position
  part(row.query_segment, "queries")[:] = number
  part(row.query_reads, "queries")[:] = number
  part(row.decoder_token, "decoder")[:] = layout.decoder_token
  part(row.decoder_source, "decoder")[:] = _shift(
    layout.decoder_source, used.queries
  )
  part(row.decoder_position, "decoder")[:] = np.arange(size.decoder)
  part(row.decoder_segment, "decoder")[:] = number
  part(row.target, "decoder")[:] = layout.targets


def _visual_offset(sample: Sample, used: Size, spec: RowSpec) -> int:
  tokens = {
    "features": 1,
    "frames": spec.frame_tokens,
    "tiles": spec.tile_tokens,
  }[sample.kind]
  before = getattr(used, sample.kind) * tokens
  return spec.visual_base(sample.kind) + before


def _shift(source, by):
  return np.where(source < 0, -1, source + by)
