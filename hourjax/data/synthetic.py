"""Generated data with VideoMarathon's durations and sizes.

See hourjax/README.md, VideoMarathon.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from hourjax.batch import Batch
from hourjax.data.columns import MODALITIES, Columns, measure_record
from hourjax.data.conversations import IGNORE, IMAGE, Conversation
from hourjax.data.dataset import SampleOptions
from hourjax.data.demo.tokenizer import train_tokenizer
from hourjax.data.layout import build_layout
from hourjax.data.media.frame_rules import MIN_FRAMES
from hourjax.data.media.images import anyres_geometry
from hourjax.data.prepared import PreparedWriter
from hourjax.data.records.record import Record, Turn
from hourjax.data.repository import (
  Repository,
  empty_repository,
  images_repository,
  tiled_repository,
  video_repository,
)
from hourjax.data.rows import Row, RowSpec, Sample, Visual, empty_rows, row_of
from hourjax.data.sample_sizes import VideoInput
from hourjax.data.store.array_file import header_bytes
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer

# Thousands of videos in each 5 minutes of duration, from 0 to 60.
HISTOGRAM = (4.0, 4.9, 3.4, 3.1, 3.1, 2.75, 2.05, 1.05, 0.85, 1.3, 1.0, 0.4)
SHORTEST = 180.0  # seconds; the paper's videos last 3 to 60 minutes
# Tokens of a conversation's markup and instruction; then the ranges from which
# tokens of a question, tokens of an answer and numbers of questions are drawn.
_MARKUP, _QUESTION, _ANSWER, _QUESTIONS = 75, (15, 110), (5, 80), (4, 6)


class DrawnRows(NamedTuple):
  """Holds samples of which only numbers exist, and the rows that they make.

  Attributes:
    columns: of the samples.
    visual: how their videos come, and how many frames are used of each.
    rows: of each row the numbers of its samples.
  """

  columns: Columns
  visual: VideoInput
  rows: Sequence[np.ndarray]


def video_durations(count: int, seed: int) -> Float64[np.ndarray, "count"]:
  """Draws durations of videos from the histogram.

  Args:
    count: how many to draw.
    seed: the same seed gives the same durations.

  Returns:
    Seconds `[count]`.
  """
  rng = np.random.default_rng(seed)
  share = np.array(HISTOGRAM) / sum(HISTOGRAM)
  start = rng.choice(len(share), count, p=share) * 300.0
  drawn = start + rng.uniform(0, 300, count)
  return np.round(np.clip(drawn, SHORTEST, 3600.0), 2)


def conversation_columns(
  durations: np.ndarray, conversations: int, seed: int
) -> Columns:
  """Draws columns of conversations, each about a random one of the videos.

  Args:
    durations: seconds of each video.
    conversations: how many to draw.
    seed: the same seed gives the same columns.
  """
  rng = np.random.default_rng([seed, 1])
  questions = rng.integers(*_QUESTIONS, conversations)
  prompt = _MARKUP + questions * rng.integers(*_QUESTION, conversations)
  answers = questions * rng.integers(*_ANSWER, conversations)
  none = np.zeros(conversations, np.int32)
  return Columns(
    modality=np.ones(conversations, np.uint8),
    tokens=(prompt + answers).astype(np.int32),
    prompt=prompt.astype(np.int32),
    answer=(_MARKUP + (prompt - _MARKUP) // questions).astype(np.int32),
    images=none,
    width=none,
    height=none,
    video=rng.integers(0, len(durations), conversations).astype(np.int32),
    source=none.astype(np.int32),
    stream=none.astype(np.int32),
    videos=tuple(video_name(i) for i in range(len(durations))),
    sources=("synthetic",),
    streams=("default",),
    duration=durations,
    num_frames=np.zeros(len(durations), np.int32),
    fps=np.full(len(durations), np.nan),
  )


def video_name(number: int) -> str:
  """Returns the name of the video of a number."""
  return f"{number:06d}.mp4"


def tokenizer() -> Tokenizer:
  """Returns a small tokenizer, since nothing here depends on words."""
  return Tokenizer(train_tokenizer([]), "synthetic")


def write_index(root: pathlib.Path, durations: np.ndarray) -> None:
  """Writes the index of a feature store, but not the features.

  Args:
    root: the folder of the store.
    durations: seconds of each video.
  """
  root.mkdir(parents=True, exist_ok=True)
  with open(root / "index-00000.jsonl", "w") as file:
    for number, duration in enumerate(durations.tolist()):
      frames = max(int(duration), MIN_FRAMES)
      line = {
        "video": video_name(number),
        "frames": frames,
        "duration": duration,
      }
      file.write(json.dumps(line) + "\n")


def write_features(
  root: pathlib.Path, spec: RowSpec, gigabytes: float, seed: int
) -> tuple[FeatureStore, np.ndarray]:
  """Writes a feature store with real bytes.

  Args:
    root: the folder of the store.
    spec: the tokens of a frame and their width.
    gigabytes: about how many GB to write.
    seed: the same seed gives the same bytes.

  Returns:
    The store, and the seconds of each of its videos.
  """
  frame = spec.frame_tokens * spec.width * 2
  durations, size = [], 0.0
  for duration in video_durations(100_000, seed):
    durations.append(float(duration))
    size += max(int(duration), MIN_FRAMES) * frame / 1e9
    if size >= gigabytes:
      break
  rng = np.random.default_rng([seed, 2])
  noise = rng.normal(size=(512, spec.frame_tokens, spec.width))
  noise = noise.astype("bfloat16").view(np.uint16)
  write_index(root, np.array(durations))
  for number, duration in enumerate(durations):
    left = max(int(duration), MIN_FRAMES)
    shape = (left, *noise.shape[1:])
    with open(root / f"{video_name(number)}.npy", "wb") as file:
      file.write(header_bytes(shape))
      while left > 0:
        file.write(noise[:left].tobytes())
        left -= len(noise)
  return FeatureStore(root), np.array(durations)


def write_conversations(folder: pathlib.Path, videos: int, each: int) -> None:
  """Writes a prepared dataset with conversations about the first videos.

  Args:
    folder: where it is written.
    videos: how many videos there are.
    each: conversations about each of them.
  """
  words, tokens = "what is to be seen here before the end of it", tokenizer()
  rng = np.random.default_rng(0)
  with PreparedWriter(folder, tokenizer_id=tokens.fingerprint) as writer:
    for number in range(videos * each):
      name = video_name(number % videos)
      turns = _turns(words.split(), rng)
      record = Record(f"{number}", "video", (name,), turns, "synthetic", {})
      writer.add(record, measure_record(record, tokens, None))


def _turns(words: Sequence[str], rng: np.random.Generator) -> tuple[Turn, ...]:
  """Draws five questions and answers of random words."""
  turns = []
  for number in range(5):
    mark = "" if number else "<image>\n"
    question, answer = (" ".join(rng.choice(words, n)) for n in (12, 8))
    turns += [Turn("human", mark + question), Turn("gpt", answer)]
  return tuple(turns)


def build_rows(
  drawn: DrawnRows,
  numbers: Sequence[int],
  spec: RowSpec,
  options: SampleOptions,
  vocab: int,
) -> Batch:
  """Builds rows of drawn samples: real layouts of random words and pixels.

  What the time of a step depends on is as in training: lengths, segments,
  positions and labels. Which tokens are kept is chosen uniformly, and all
  frames of a video are one random frame.

  Args:
    drawn: the samples.
    numbers: of the rows.
    spec: of the rows.
    options: how samples are laid out.
    vocab: words have ids below this.

  Returns:
    Arrays [rows, ...].
  """
  rng = np.random.default_rng(options.seed)
  batch = empty_rows(spec, len(numbers))
  for place, number in enumerate(numbers):
    row = Row(spec, row_of(batch, place))
    for sample in drawn.rows[number].tolist():
      row.add(_sample(drawn, sample, spec, options, vocab, rng))
    row.finish()
  return batch


def _sample(
  drawn: DrawnRows,
  number: int,
  spec: RowSpec,
  options: SampleOptions,
  vocab: int,
  rng: np.random.Generator,
) -> Sample:
  """Lays out one drawn sample."""
  repository, kind, images = _visual(drawn, number, spec, options)
  forgetting = dataclasses.replace(options.forgetting, temporal="uniform")
  layout = build_layout(
    _conversation(drawn.columns, number, len(repository.slots), vocab, rng),
    repository,
    forgetting.kept_tokens(repository, rng),
    memory=options.memory,
    max_length=options.max_length,
  )
  if not images:
    return Sample(str(number), layout)
  if kind == "features":
    one = rng.normal(size=(1, spec.frame_tokens, spec.width))
    one = one.astype("bfloat16")
  else:
    side = spec.image_size
    one = rng.integers(0, 256, (1, side, side, 3), np.uint8)
  visual = np.broadcast_to(one, (images, *one.shape[1:]))
  return Sample(str(number), layout, kind, visual)


def _visual(
  drawn: DrawnRows, number: int, spec: RowSpec, options: SampleOptions
) -> tuple[Repository, Visual, int]:
  """Returns a sample's memory, and how many frames or tiles come as what."""
  columns = drawn.columns
  modality = MODALITIES[columns.modality[number]]
  if modality == "text":
    return empty_repository(), "features", 0
  if modality == "video":
    video = columns.video[number]
    frames = int(drawn.visual.num_frames[video])
    kind = "features" if drawn.visual.stored[video] else "frames"
    repository = video_repository(frames, round(spec.frame_tokens**0.5))
    return repository, kind, frames
  side, count = round(spec.tile_tokens**0.5), int(columns.images[number])
  if count > 1 or options.single_image == "plain":
    return images_repository(count, side), "tiles", count
  geometry = anyres_geometry(
    int(columns.width[number]),
    int(columns.height[number]),
    tile=spec.image_size,
    side=side,
  )
  return tiled_repository(geometry, side), "tiles", geometry.tiles


def _conversation(
  columns: Columns,
  number: int,
  slots: int,
  vocab: int,
  rng: np.random.Generator,
) -> Conversation:
  """Returns visual slots, then a prompt, then an answer, of random words.

  A text has no prompt that MemAug reads; half of it is labelled.
  """
  total, prompt = int(columns.tokens[number]), int(columns.prompt[number])
  ids = np.concatenate([np.full(slots, IMAGE), rng.integers(0, vocab, total)])
  start = slots + (prompt if slots else total // 2)
  labels = np.where(np.arange(len(ids)) < start, IGNORE, ids)
  return Conversation(ids.astype(np.int32), labels.astype(np.int32), start)
