"""The dataset: records to samples, the one place that opens files for training.

A sample is planned before anything is read (`_Planned`), then its pixels or
features are read, and then it is laid out, which is where forgetting looks at
what was read. All of it is a function of (seed, epoch, index of the record).
"""

import dataclasses
import math
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from hourjax.data.columns import Columns, ColumnsBuilder, measure_record
from hourjax.data.conversations import (
  Conversation,
  encode_conversation,
  question_ids,
)
from hourjax.data.forgetting import Embedder, Forgetting
from hourjax.data.layout import build_layout
from hourjax.data.media import frame_rules, video, video_probe
from hourjax.data.memory_options import MemoryOptions
from hourjax.data.records.record import Record, Skipped, Turn
from hourjax.data.repository import (
  Repository,
  empty_repository,
  video_repository,
)
from hourjax.data.rows import RowSpec, Sample, Size, Visual
from hourjax.data.sample_sizes import (
  VideoInput,
  pixel_frames,
  sample_sizes,
  sparse_videos,
  stored_frames,
  video_input,
)
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.data.visual_input import image_input, read_images
from hourjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SampleOptions:
  """Describes how records become samples.

  Attributes:
    seed: of everything random, together with epoch and sample.
    forgetting: what the decoder gets to see.
    memory: what MemAug gets to see.
    max_length: the decoder's sequence is cut here.
    single_image: "tiled" cuts one image into tiles by its aspect, "plain"
      resizes it to one tile.
  """

  seed: int = 0
  forgetting: Forgetting = dataclasses.field(default_factory=Forgetting)
  memory: MemoryOptions = dataclasses.field(default_factory=MemoryOptions)
  max_length: int = 32_768
  single_image: Literal["tiled", "plain"] = "tiled"


@dataclasses.dataclass(frozen=True)
class _Planned:
  """Holds what is known of a record before its pixels or features are read.

  Attributes:
    record: the record.
    conversation: its token ids and labels.
    repository: its memory.
    kind: of its visual input.
    images: feature tokens, frames or tiles of it, as `kind` says.
    frames: indices into the stored features, or into the video.
  """

  record: Record
  conversation: Conversation
  repository: Repository
  kind: Visual
  images: int
  frames: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Unread:
  """Describes a sample that could not be read and was left out of its row.

  Attributes:
    id: of the record, or "" where not even that could be read.
    kind: the sort of failure, one word.
    reason: the whole message.
  """

  id: str
  kind: str
  reason: str


class Dataset:
  """Gives samples by the index of their record.

  Attributes:
    columns: of all records.
    sizes: what each sample takes, in the order of `Size`.
    usable: indices of the records that can be trained on, ascending.
    held_out: indices of the records that can be used and are held out: never
      trained on, but evaluated. Ascending.
    skipped: the other records with the reason; never replaced.
    sparse: videos whose features are too few for the rule of short videos.
    visual: how each video of the columns comes, and what is used of it.
    embedder: compares frames with words, for question-guided forgetting; set
      before the first sample is read if `forgetting.needs_question`.
  """

  columns: Columns
  sizes: Int64[np.ndarray, "N 7"]
  usable: Int64[np.ndarray, "n"]
  held_out: Int64[np.ndarray, "h"]
  skipped: list[Skipped]
  sparse: list[str]
  visual: VideoInput
  embedder: Embedder | None

  def __init__(
    self,
    records: Sequence[Record],
    columns: Columns,
    *,
    tokenizer: Tokenizer,
    spec: RowSpec,
    options: SampleOptions,
    media_root: str | pathlib.Path,
    features: FeatureStore | None = None,
    stream_rows: Mapping[str, Size] = types.MappingProxyType({}),
  ):
    """Sizes every sample from its columns; opens no file.

    Args:
      records: by index; they may be read only when asked for.
      columns: of these records, measured with this tokenizer.
      tokenizer: of the model.
      spec: of the rows.
      options: how records become samples.
      media_root: folder of videos and images.
      features: store of videos; one that it does not have is read as pixels
        from its file, and without a store all are.
      stream_rows: capacities of the rows of streams that have others than
        `spec`.
    """
    self._records, self.columns = records, columns
    self._tokenizer, self._spec, self._options = tokenizer, spec, options
    self._media, self._features = pathlib.Path(media_root), features
    self.embedder = None
    self.visual = video_input(columns, features)
    self.sizes, problems = sample_sizes(
      columns,
      self.visual,
      tokenizer=tokenizer,
      spec=spec,
      forgetting=options.forgetting,
      max_length=options.max_length,
      single_image=options.single_image,
      stream_rows=stream_rows,
    )
    self.sparse = sparse_videos(features, columns.videos) if features else []
    good = np.ones(len(columns), bool)
    good[list(problems)] = False
    self.usable = np.flatnonzero(good & (columns.held_out == 0))
    self.held_out = np.flatnonzero(good & (columns.held_out > 0))
    self.skipped = []
    for i in sorted(problems):
      name = records[i].id
      self.skipped.append(Skipped(name, f"record {name}: {problems[i]}"))

  @classmethod
  def from_records(
    cls,
    records: Sequence[Record],
    *,
    tokenizer: Tokenizer,
    spec: RowSpec,
    options: SampleOptions,
    media_root: str | pathlib.Path,
    features: FeatureStore | None = None,
  ) -> "Dataset":
    """Measures a few records on the spot instead of preparing them."""
    columns, kept, skipped = ColumnsBuilder(), [], []
    for record in records:
      try:
        measures = measure_record(record, tokenizer, media_root)
        name, known = None, None
        if record.modality == "video":
          name = record.media[0]
          path = pathlib.Path(media_root) / name
          # What is neither stored nor there is reported with the sizes.
          if features is None or (name not in features and path.exists()):
            known = video_probe.probe(path)
      except UserError as error:
        skipped.append(Skipped(record.id, str(error)))
        continue
      columns.add(
        measures,
        record.source,
        "default",
        name,
        known.duration if known else None,
        known.frames if known else 0,
        float(known.fps) if known else None,
      )
      kept.append(record)
    made = cls(
      kept,
      columns.build(),
      tokenizer=tokenizer,
      spec=spec,
      options=options,
      media_root=media_root,
      features=features,
    )
    made.skipped = skipped + made.skipped
    return made

  def __len__(self) -> int:
    """Returns the number of samples to train on."""
    return len(self.usable)

  @property
  def notes(self) -> list[str]:
    """Returns what a user should know of the videos, a sentence each."""
    found = []
    pixels = len(self.pixel_videos())
    if pixels and (stored := int(self.visual.stored.sum())):
      found.append(
        f"{stored:,} videos come as stored features, {pixels:,} that the"
        " feature store does not have come as pixels"
      )
    if note := frame_rules.sparse_note(len(self.sparse)):
      found.append(note)
    return found

  @property
  def vocab_size(self) -> int:
    """Returns the number of ids that the tokenizer may give."""
    return self._tokenizer.vocab_size

  def pixel_videos(self) -> list[str]:
    """Returns the names of the videos whose samples are read as pixels."""
    video = self.columns.video[self.usable]
    used = np.unique(video[video >= 0])
    return [self.columns.videos[i] for i in used[~self.visual.stored[used]]]

  @property
  def tokenizer(self) -> Tokenizer:
    """Returns the tokenizer that samples are encoded with."""
    return self._tokenizer

  def record(self, index: int) -> Record:
    """Returns a record, usable or not."""
    return self._records[index]

  def sample(self, index: int, epoch: int = 0) -> Sample:
    """Reads and lays out a sample: a function of (seed, epoch, index).

    Raises:
      UserError: its files cannot be read.
    """
    plan = self._plan(self._records[index], index)
    visual = self._read(plan, None)
    return self._lay_out(
      plan, visual, self._summary(plan, visual), index, epoch
    )

  def samples(
    self, indices: Sequence[int], epoch: int, room: np.ndarray | None = None
  ) -> tuple[list[Sample], list[Unread]]:
    """Reads samples that share one memory, which is read once.

    Args:
      indices: records about the same video (or only one record).
      epoch: decides with seed and index what is forgotten.
      room: memory [n, V] for stored features, which saves copying them.

    Returns:
      Samples, of which all but the first have `reuses_memory` set, and what
      could not be read.
    """
    done: list[Sample] = []
    failed: list[Unread] = []
    visual, summary = None, None
    for index in indices:
      name = ""
      try:
        record = self._records[index]
        name = record.id
        plan = self._plan(record, index)
        if not done:
          visual = self._read(plan, room)
          summary = self._summary(plan, visual)
        sample = self._lay_out(plan, visual, summary, index, epoch)
        done.append(dataclasses.replace(sample, reuses_memory=bool(done)))
      except UserError as error:
        failed.append(Unread(name, error.kind, str(error)))
      except OSError as error:
        failed.append(Unread(name, "unreachable", f"record {name}: {error}"))
    return done, failed

  def _summary(self, plan: _Planned, visual: np.ndarray | None) -> Any:
    """Computes what forgetting needs to know of a video's stored features."""
    features = visual if plan.kind == "features" else None
    return self._options.forgetting.summarise_frames(features, self.embedder)

  def _lay_out(
    self,
    plan: _Planned,
    visual: np.ndarray | None,
    summary: Any,
    index: int,
    epoch: int,
  ) -> Sample:
    name, rule = f"record {plan.record.id}", self._options.forgetting
    memory, number = self._options.memory, index
    if not memory.scale and plan.record.modality == "video":
      # Kept tokens are the memory then. Conversations that share a memory have
      # to keep the same, so all about one video do.
      number = int(self.columns.video[index])
    rng = np.random.default_rng([self._options.seed, epoch, number])
    question = None
    if rule.needs_question:
      question = question_ids(plan.record.turns, self._tokenizer)
    try:
      kept = rule.kept_tokens(
        plan.repository, rng, summary=summary, question=question
      )
    except UserError as error:
      raise UserError(f"{name}: {error}") from None
    layout = build_layout(
      plan.conversation,
      plan.repository,
      kept,
      memory=memory,
      max_length=self._options.max_length,
      name=name,
    )
    return Sample(plan.record.id, layout, plan.kind, visual)

  def _plan(self, record: Record, index: int) -> _Planned:
    """Plans a record; of media files it reads only their sizes."""
    if record.modality == "video":
      return self._plan_video(record, int(self.columns.video[index]))
    conversation = self._encode(record)
    if record.modality == "text":
      return _Planned(record, conversation, empty_repository(), "features", 0)
    paths = [self._media / name for name in record.media]
    repository, count = image_input(
      paths, self._spec, self._options.single_image
    )
    return _Planned(record, conversation, repository, "tiles", count)

  def _plan_video(self, record: Record, video: int) -> _Planned:
    """Plans a record about the video of this number in the columns."""
    name = record.media[0]
    if self._features is not None and self.visual.stored[video]:
      duration, frames = stored_frames(self._features, name)
      kind, images_ = "features", len(frames) * self._spec.frame_tokens
    else:
      info = video_probe.probe(self._media / name)
      # The rate is used only where the sizes were planned with it: older
      # datasets do not have it.
      planned = self.columns.fps[video] > 0
      fps = float(info.fps) if planned else math.nan
      duration, frames = pixel_frames(name, info.frames, info.duration, fps)
      kind, images_ = "frames", len(frames)
    conversation = self._encode(record, (duration, len(frames)))
    side = round(self._spec.frame_tokens**0.5)
    repository = video_repository(len(frames), side)
    return _Planned(record, conversation, repository, kind, images_, frames)

  def _encode(
    self, record: Record, video_numbers: tuple[float, int] | None = None
  ) -> Conversation:
    """Encodes the turns; a video's numbers are its duration and frames."""
    turns: Sequence[Turn] = record.turns
    return encode_conversation(
      turns,
      self._tokenizer,
      video=video_numbers,
      slots=record.modality != "text",
    )

  def _read(self, plan: _Planned, room: np.ndarray | None) -> np.ndarray | None:
    """Reads the visual input, stored features into `room` if they fit."""
    media, spec = plan.record.media, self._spec
    if not media:
      return None
    if plan.frames is not None:
      if plan.kind == "features" and self._features is not None:
        shape = (spec.frame_tokens, spec.width)
        if room is None or len(room) < plan.images:
          return self._features.read(media[0], plan.frames, shape)
        out = room[: plan.images].reshape(len(plan.frames), *shape)
        self._features.read_into(media[0], plan.frames, out)
        return out
      path = self._media / media[0]
      frames = video.decode_frames(path, plan.frames, spec.image_size)
      return np.concatenate(list(frames))
    paths = [self._media / name for name in media]
    return read_images(paths, spec, self._options.single_image)
