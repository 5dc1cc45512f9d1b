"""Records to samples: the one place that touches files for training."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from hourjax.data import images, video
from hourjax.data.conversations import Conversation, encode_conversation
from hourjax.data.features import FeatureStore
from hourjax.data.forgetting import Forgetting, kept_tokens
from hourjax.data.layout import Layout, build_layout
from hourjax.data.records import Record, Skipped, Turn
from hourjax.data.repository import (
  MIN_FRAMES,
  Repository,
  empty_repository,
  images_repository,
  repeated_frames,
  tiled_repository,
  video_repository,
)
from hourjax.data.rows import (
  RowSpec,
  Sample,
  Size,
  Visual,
  check_fits,
  layout_size,
)
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SampleOptions:
  """How records become samples.

  Attributes:
    seed: of everything random, together with epoch and sample.
    forgetting: what the decoder gets to see.
    max_length: the decoder's sequence is cut here.
    single_image: "tiled" cuts one image into tiles by its aspect, "plain"
      resizes it to one tile.
    prompt_only: for inference: no answer, every prompt token is a query.
    answer_room: decoder positions left free after each sample's prompt.
  """

  seed: int = 0
  forgetting: Forgetting = dataclasses.field(default_factory=Forgetting)
  max_length: int = 32_768
  single_image: Literal["tiled", "plain"] = "tiled"
  prompt_only: bool = False
  answer_room: int = 0


@dataclasses.dataclass(frozen=True)
class _Planned:
  """What is known of a record before its pixels or features are read."""

  record: Record
  conversation: Conversation
  repository: Repository
  kind: Visual
  images: int
  frames: np.ndarray | None = None  # of the stored features, or of the video


class Dataset:
  """Samples by index. Bad records are listed in `skipped`, never replaced."""

  def __init__(
    self,
    records: Sequence[Record],
    *,
    tokenizer: Tokenizer,
    spec: RowSpec,
    options: SampleOptions,
    media_root: str | pathlib.Path,
    features: FeatureStore | None = None,
  ):
    """Plans every record; reads headers, no pixels and no features."""
    self._tokenizer, self._spec, self._options = tokenizer, spec, options
    self._media, self._features = pathlib.Path(media_root), features
    self._plans: list[_Planned] = []
    self.sizes: list[Size] = []
    self.skipped: list[Skipped] = []
    for record in records:
      try:
        self._add(record)
      except UserError as error:
        self.skipped.append(Skipped(record.id, str(error)))

  def __len__(self) -> int:
    return len(self._plans)

  @property
  def vocab_size(self) -> int:
    """Ids that the tokenizer may give."""
    return self._tokenizer.vocab_size

  def record(self, index: int) -> Record:
    return self._plans[index].record

  def prompt_length(self, index: int) -> int:
    """Decoder positions of a sample before its answer room."""
    return self.sizes[index].decoder - self._options.answer_room

  def sample(self, index: int, epoch: int = 0) -> Sample:
    """Reads and lays out a sample: a function of (seed, epoch, index)."""
    plan = self._plans[index]
    rng = np.random.default_rng([self._options.seed, epoch, index])
    visual = self._read(plan)
    layout = self._layout(plan, rng, visual)
    return Sample(plan.record.id, layout, plan.kind, visual)

  def _add(self, record: Record) -> None:
    plan = self._plan(record)
    # Lengths do not depend on which tokens are kept.
    plain = dataclasses.replace(self._options.forgetting, temporal="uniform")
    layout = self._layout(plan, np.random.default_rng(0), None, plain)
    labelled = layout.targets[layout.targets >= 0]
    if not self._options.prompt_only and not len(labelled):
      raise UserError(
        f"record {record.id}: none of its {len(layout.labels)} decoder"
        f" positions is labelled within max_length="
        f"{self._options.max_length}; raise it or drop the record"
      )
    size = layout_size(layout, plan.kind, plan.images)
    check_fits(size, self._spec.capacity, f"record {record.id}")
    self._plans.append(plan)
    self.sizes.append(size)

  def _layout(self, plan: _Planned, rng, visual, rule=None) -> Layout:
    rule = rule or self._options.forgetting
    means = None
    if rule.temporal == "keyframe" and plan.kind == "features":
      shown = repeated_frames(plan.images // self._spec.frame_tokens)
      means = visual.astype(np.float32).mean(axis=1)[shown]
    kept = kept_tokens(plan.repository, rule, rng, frame_features=means)
    layout = build_layout(
      plan.conversation,
      plan.repository,
      kept,
      max_length=self._options.max_length,
      name=f"record {plan.record.id}",
    )
    return _with_room(layout, self._options.answer_room, self._tokenizer.pad)

  def _plan(self, record: Record) -> _Planned:
    if record.modality == "video":
      return self._plan_video(record)
    side = round(self._spec.tile_tokens**0.5)
    conversation = self._encode(record)
    if record.modality == "text":
      return _Planned(record, conversation, empty_repository(), "features", 0)
    if len(record.media) > 1 or self._options.single_image == "plain":
      count = len(record.media)
      repository = images_repository(count, side)
      return _Planned(record, conversation, repository, "tiles", count)
    height, width = images.load_image(self._media / record.media[0]).shape[:2]
    geometry = images.anyres_geometry(
      width, height, tile=self._spec.image_size, side=side
    )
    repository = tiled_repository(geometry, side)
    return _Planned(record, conversation, repository, "tiles", geometry.tiles)

  def _plan_video(self, record: Record) -> _Planned:
    name = record.media[0]
    if self._features is not None:
      if name not in self._features:
        raise UserError(
          f"record {record.id}: {name} is not in {self._features.root};"
          " extract it first"
        )
      stored, duration = self._features.stored(name)
      frames = video.stored_feature_frames(stored, duration)
      kind, images_ = "features", len(frames) * self._spec.frame_tokens
    else:
      info = video.probe(self._media / name)
      frames = video.raw_video_frames(info.frames, float(info.fps))
      duration, kind, images_ = info.duration, "frames", len(frames)
      if len(frames) > MIN_FRAMES:
        raise UserError(
          f"record {record.id}: {name} has {len(frames)} frames at 1 FPS, the"
          f" encoder in the step takes at most {MIN_FRAMES}; extract features"
        )
    if not len(frames):
      raise UserError(
        f"record {record.id}: {name} lasts {duration:.2f} s, which leaves 0"
        " frames at 1 FPS; drop the record"
      )
    conversation = self._encode(record, (duration, len(frames)))
    side = round(self._spec.frame_tokens**0.5)
    repository = video_repository(len(frames), side)
    return _Planned(record, conversation, repository, kind, images_, frames)

  def _encode(self, record: Record, shown=None) -> Conversation:
    turns: Sequence[Turn] = record.turns
    return encode_conversation(
      turns,
      self._tokenizer,
      video=shown,
      prompt_only=self._options.prompt_only,
    )

  def _read(self, plan: _Planned) -> np.ndarray | None:
    media, spec = plan.record.media, self._spec
    if not media:
      return None
    if plan.kind == "features":
      shape = (spec.frame_tokens, spec.width)
      return self._features.read(media[0], plan.frames, shape)
    if plan.kind == "frames":
      path = self._media / media[0]
      frames = video.decode_frames(path, plan.frames, spec.image_size)
      return np.concatenate(list(frames))
    pictures = [images.load_image(self._media / name) for name in media]
    if len(pictures) > 1:
      square = [images.pad_to_square(picture) for picture in pictures]
      return np.stack([images.resize(p, spec.image_size) for p in square])
    if self._options.single_image == "plain":
      return images.resize(pictures[0], spec.image_size)[None]
    return images.tile_image(pictures[0], spec.image_size)


def _with_room(layout: Layout, room: int, pad: int) -> Layout:
  """Free decoder positions at the end, for the answer to come."""
  if not room:
    return layout

  def longer(column, fill):
    return np.append(column, np.full(room, fill, np.int32))

  return dataclasses.replace(
    layout,
    decoder_token=longer(layout.decoder_token, pad),
    decoder_source=longer(layout.decoder_source, -1),
    labels=longer(layout.labels, -100),
  )
