"""Rows: samples packed into fixed capacities, distinguished by segment ids.

Two samples of 3 and 2 decoder positions in a row of capacity 8:

    decoder_segment   1 1 1 2 2 0 0 0     0 is padding
    decoder_position  0 1 2 0 1 0 0 0

Indices of a sample count its own tokens; in a row they are shifted by what lies
before it (`Row`). See `hourjax.batch` for the arrays of a row.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Int32

from hourjax.batch import IGNORE, TOWER_FRAMES, Batch
from hourjax.data.layout import Layout
from hourjax.errors import UserError

Visual = Literal["features", "frames", "tiles"]
Loss = Literal["samples", "tokens"]
ROWS = "config.rows"  # the key of the capacities


@dataclasses.dataclass(frozen=True)
class Size:
  """Holds what a sample takes of a row, or what a row can hold.

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

  @classmethod
  def names(cls) -> tuple[str, ...]:
    """Returns the names of the capacities in their order."""
    return tuple(field.name for field in dataclasses.fields(cls))

  def astuple(self) -> tuple[int, ...]:
    """Returns the numbers in the order of `names`."""
    return dataclasses.astuple(self)

  def fits(self, capacity: "Size") -> bool:
    """Returns whether every number is at most that of the capacity."""
    return all(a <= b for a, b in zip(self.astuple(), capacity.astuple()))


def check_fits(size: Size, capacity: Size, name: str, key: str = ROWS) -> None:
  """Checks that one sample fits a row.

  Args:
    size: of the sample.
    capacity: of the row.
    name: of the sample, for the message.
    key: of the configuration, under which the capacity stands.

  Raises:
    UserError: it does not; names every capacity that it exceeds.
  """
  over = [
    f"{key}.{field.name}={getattr(capacity, field.name)} <"
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
  """Holds one laid-out sample with its visual input.

  Attributes:
    name: record id.
    layout: index arithmetic of the sample.
    kind: where its visual tokens come from.
    visual: [F, Q, V] stored features, or [n, h, w, 3] pixels (uint8, or float
      in [-1, 1]); None for text.
    reuses_memory: the sample reads the memory of the sample before it in the
      row, and has none of its own there.
    reuses_queries: the sample reads the queries of the sample before it, too:
      both are answers to one prompt, which MemAug then augments once.
    weights: [L], of each label in the loss; None for those of
      `label_weights`.
  """

  name: str
  layout: Layout
  kind: Visual = "features"
  visual: np.ndarray | None = None
  reuses_memory: bool = False
  reuses_queries: bool = False
  weights: np.ndarray | None = None

  @property
  def size(self) -> Size:
    """Returns what the sample takes of a row; a shared memory takes nothing."""
    images = 0 if self.visual is None else len(self.visual)
    size = layout_size(self.layout, self.kind, images)
    if self.reuses_queries:
      return Size(decoder=size.decoder)
    if self.reuses_memory:
      return Size(queries=size.queries, decoder=size.decoder)
    return size


def layout_size(layout: Layout, kind: Visual, images: int) -> Size:
  """Returns what a sample takes of a row.

  Args:
    layout: of the sample.
    kind: of its visual input.
    images: its frames or tiles that come as pixels.
  """
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
  """Describes the static shapes of a row.

  Attributes:
    capacity: how much a row holds.
    frame_tokens: tokens of a pooled frame (Q).
    tile_tokens: tokens of a tile (P).
    width: of the tower's features (V).
    image_size: pixels along one side of frames and tiles.
    loss: how labels are weighted, see `label_weights`.
  """

  capacity: Size
  frame_tokens: int
  tile_tokens: int
  width: int
  image_size: int
  loss: Loss = "tokens"

  def visual_base(self, kind: Visual) -> int:
    """Returns the index in a row at which visual tokens of a kind begin.

    Visual tokens are indexed through [features | frames | tiles | blends], as
    `hourjax.batch` says.
    With room for 8 feature tokens, 2 frames of 4 tokens and 1 tile, features
    begin at 0, frames at 8 and tiles at 16.
    """
    capacity = self.capacity
    frames = capacity.features
    tiles = frames + capacity.frames * self.frame_tokens
    return {"features": 0, "frames": frames, "tiles": tiles}[kind]

  @property
  def blend_base(self) -> int:
    """Returns the index in a row at which blended tokens begin."""
    tiles = self.visual_base("tiles")
    return tiles + self.capacity.tiles * self.tile_tokens


def label_weights(
  targets: Int32[np.ndarray, "L"], loss: Loss
) -> Float32[np.ndarray, "L"]:
  """Returns the weight of each label of one sample in the loss.

  The loss of a step is the weighted mean over its labels. With "tokens" each
  label weighs 1. With "samples" those of a sample weigh 1 together, so that the
  loss is the mean of the samples' own means. Targets [8 -100 9 -100] weigh
  [1 0 1 0] or [0.5 0 0.5 0]; a sample without labels weighs nothing.

  Args:
    targets: of the sample, after its sequence was cut.
    loss: "samples" or "tokens".
  """
  labelled = targets != IGNORE
  weights = labelled.astype(np.float32)
  if loss == "tokens":
    return weights
  return weights / np.float32(max(labelled.sum(), 1))


def build_row(samples: Sequence[Sample], spec: RowSpec) -> Batch:
  """Packs samples into one row, without the leading B axis.

  Pixels are uint8 unless a sample brings floats.

  Raises:
    UserError: the samples do not fit.
  """
  batch = empty_rows(spec, 1, _pixel_dtype(samples))
  row = Row(spec, row_of(batch, 0))
  for sample in samples:
    row.add(sample)
  return row.finish()


def empty_rows(
  spec: RowSpec, rows: int, pixels: npt.DTypeLike = np.uint8
) -> Batch:
  """Allocates uninitialised arrays [rows, ...].

  Their memory is aligned, so that the CPU backend takes them without a copy.

  Args:
    spec: of the rows.
    rows: how many.
    pixels: dtype of frames and tiles.
  """
  arrays = _arrays(spec, pixels)
  return Batch(*(_aligned((rows, *shape), dtype) for shape, dtype in arrays))


def batch_capacity(batch: Batch) -> Size:
  """Returns the capacity of the rows of a batch `[B, ...]`."""
  lengths = {_LENGTH[name]: x.shape[1] for name, x in batch._asdict().items()}
  return Size(**lengths)


def row_bytes(spec: RowSpec) -> int:
  """Returns the bytes of one row's arrays."""
  return sum(
    math.prod(shape) * np.dtype(dtype).itemsize
    for shape, dtype in _arrays(spec, np.uint8)
  )


def _arrays(
  spec: RowSpec, pixels: npt.DTypeLike
) -> list[tuple[tuple[int, ...], npt.DTypeLike]]:
  """Returns shape and dtype of each array of a row, in the order of `Batch`."""
  side = spec.image_size
  shapes = dict.fromkeys(Batch._fields, ((), np.int32))
  shapes |= {
    "features": ((spec.width,), ml_dtypes.bfloat16),
    "frames": ((side, side, 3), pixels),
    "tiles": ((side, side, 3), pixels),
    "blend_source": ((4,), np.int32),
    "blend_weight": ((4,), np.float32),
    "target_weight": ((), np.float32),
  }
  return [
    ((getattr(spec.capacity, _LENGTH[name]), *shapes[name][0]), shapes[name][1])
    for name in Batch._fields
  ]


def row_of(batch: Batch, number: int) -> Batch:
  """Returns views of one row of a batch."""
  return Batch(*(array[number] for array in batch))


class Row:
  """Fills one row sample by sample; the n-th sample has segment id n.

  Attributes:
    used: what the samples so far take.
  """

  def __init__(self, spec: RowSpec, arrays: Batch):
    """Starts an empty row.

    Args:
      spec: of the row.
      arrays: filled in place; what they hold before does not matter.
    """
    self._spec, self._arrays = spec, arrays
    self._count = 0
    # Of the memory placed last: its segment id, and how much of the row was
    # used before it. A sample with `reuses_memory` reads it.
    self._memory = (0, Size())
    self._first_query = 0  # of the queries placed last
    self.used = Size()

  @property
  def features_left(self) -> np.ndarray:
    """Returns the part [n, V] of the row that holds the next stored features.

    Reading features from disk directly into it saves a copy.
    """
    return self._arrays.features[self.used.features :]

  def add(self, sample: Sample) -> None:
    """Places a sample behind the last one.

    Its features may lie in `features_left` already; else they are copied.

    Raises:
      UserError: it does not fit; the row stays as it was.
    """
    check_fits(self.used + sample.size, self._spec.capacity, sample.name)
    self._count += 1
    if not sample.reuses_memory:
      self._memory = (self._count, self.used)
      self._place_memory(sample)
    self._place_text(sample)
    self.used = self.used + sample.size

  def finish(self) -> Batch:
    """Pads what is left and returns the row."""
    for name, array in self._arrays._asdict().items():
      array[getattr(self.used, _LENGTH[name]) :] = _PADDING.get(name, 0)
    return self._arrays

  def _part(self, name: str, size: Size) -> np.ndarray:
    """Returns the part of an array that the next sample fills."""
    field = _LENGTH[name]
    start = getattr(self.used, field)
    return getattr(self._arrays, name)[start : start + getattr(size, field)]

  def _place_memory(self, sample: Sample) -> None:
    """Writes the sample's visual input and memory, indices shifted.

    A sample whose tokens 0, 1 are features behind 8 other feature tokens has
    memory_source [0 -1 1 -1]; in the row that is [8 -1 9 -1].
    """
    size, repository = sample.size, sample.layout.repository
    offset = _visual_offset(sample, self.used, self._spec)
    # Blended tokens are numbered from `visual` on in the sample.
    blend = self._spec.blend_base + self.used.blends - repository.visual

    def to_row(source: np.ndarray) -> np.ndarray:
      shift = np.where(source >= repository.visual, blend, offset)
      return np.where(source < 0, -1, source + shift)

    if sample.visual is not None:
      part = self._part(sample.kind, size)
      visual = sample.visual.reshape(part.shape)
      if not np.may_share_memory(part, visual):
        part[:] = visual
    self._part("frame_trains", size)[:] = size.frames <= TOWER_FRAMES
    self._part("blend_source", size)[:] = to_row(repository.blend_source)
    self._part("blend_weight", size)[:] = repository.blend_weight
    self._part("memory_source", size)[:] = to_row(repository.source)
    self._part("memory_position", size)[:] = repository.position
    attended = repository.attended
    segment = 1 if attended is None else attended
    self._part("memory_segment", size)[:] = self._count * segment

  def _place_text(self, sample: Sample) -> None:
    """Writes the sample's queries and decoder positions, indices shifted."""
    layout, size = sample.layout, sample.size
    reads, place = self._memory
    targets, weights = layout.targets, sample.weights
    if weights is None:
      weights = label_weights(targets, self._spec.loss)
    if not sample.reuses_queries:
      self._first_query = self.used.queries
    values = {
      "query_token": layout.query_token,
      "query_source": _shift(layout.query_source, place.memory),
      "query_position": layout.query_position,
      "query_segment": self._count,
      "query_reads": reads,
      "decoder_token": layout.decoder_token,
      "decoder_source": _shift(layout.decoder_source, self._first_query),
      "decoder_position": np.arange(size.decoder),
      "decoder_segment": self._count,
      "target": targets,
      "target_weight": weights,
    }
    for name, value in values.items():
      if not (sample.reuses_queries and name.startswith("query_")):
        self._part(name, size)[:] = value


# Which capacity is the length of an array.
_LENGTH = {
  **{name: name for name in ("features", "frames", "tiles")},
  "frame_trains": "frames",
  **dict.fromkeys(("blend_source", "blend_weight"), "blends"),
  **{n: "memory" for n in Batch._fields if n.startswith("memory_")},
  **{n: "queries" for n in Batch._fields if n.startswith("query_")},
  **{n: "decoder" for n in Batch._fields if n.startswith("decoder_")},
  **dict.fromkeys(("target", "target_weight"), "decoder"),
}
# What pads an array; 0 where it is not named.
_PADDING = {
  **dict.fromkeys(
    ("memory_source", "query_token", "query_source", "decoder_source"), -1
  ),
  "target": IGNORE,
}


def stack_rows(rows: Sequence[Batch]) -> Batch:
  """Stacks rows to a batch with a leading B axis."""
  return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


def _aligned(
  shape: tuple[int, ...], dtype: npt.DTypeLike, to: int = 128
) -> np.ndarray:
  """Allocates an array whose first byte's address is a multiple of `to`."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + to, np.uint8)
  start = -raw.ctypes.data % to
  return raw[start : start + size].view(dtype).reshape(shape)


def _pixel_dtype(samples: Sequence[Sample]) -> npt.DTypeLike:
  """Returns the dtype that holds the pixels of all samples."""
  floats = [
    sample.visual.dtype
    for sample in samples
    if sample.visual is not None and sample.kind != "features"
  ]
  return np.result_type(*floats) if floats else np.uint8


def _visual_offset(sample: Sample, used: Size, spec: RowSpec) -> int:
  """Returns the index in a row of a sample's first visual token."""
  tokens = {
    "features": 1,
    "frames": spec.frame_tokens,
    "tiles": spec.tile_tokens,
  }[sample.kind]
  before = getattr(used, sample.kind) * tokens
  return spec.visual_base(sample.kind) + before


def _shift(source: np.ndarray, by: int) -> np.ndarray:
  """Returns source + by; -1 stays -1."""
  return np.where(source < 0, -1, source + by)
