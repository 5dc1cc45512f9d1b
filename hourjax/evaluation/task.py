"""An exam: the questions of a benchmark, and how they are asked."""

import dataclasses
import hashlib
import json
import os
import pathlib

from hourjax.data.sample_sizes import sparse_videos
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.evaluation import benchmarks
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut

# Questions of a video that are answered side by side. Part of what answers
# depend on, if only in float rounding.
BATCH = 8


@dataclasses.dataclass(frozen=True)
class EvalTask:
  """Questions, and how they are to be asked.

  Attributes:
    benchmark: its name.
    version: of its questions' wording and rules.
    questions: all of them, in a fixed order; ids are unique.
    videos: folder that the questions' videos are in.
    frames: which frames of a video the model gets, in words.
    max_tokens: of an answer.
    subtitles: whether the prompts hold them.
    features: store that videos are read from instead of `videos`.
    limit: how many of the questions are asked, the first ones; None is all.
    notes: what a report must tell of how they were asked, a sentence each.
    left_out: rows of the benchmark's files that cannot be asked.
  """

  benchmark: str
  version: str
  questions: tuple[Question, ...]
  videos: pathlib.Path
  frames: str
  max_tokens: int
  subtitles: bool = False
  features: FeatureStore | None = None
  limit: int | None = None
  notes: tuple[str, ...] = ()
  left_out: tuple[LeftOut, ...] = ()

  def __post_init__(self):
    if not self.chosen:
      raise UserError(
        f"{self.benchmark} has {len(self.questions)} questions and --limit is"
        f" {self.limit}: there is nothing to ask; correct --data or --limit"
      )

  @property
  def chosen(self) -> tuple[Question, ...]:
    """The questions that are asked and scored."""
    return self.questions[: self.limit]

  @property
  def sparse(self) -> int:
    """How many videos have features too few for the rule of short ones."""
    if self.features is None:
      return 0
    return len(sparse_videos(self.features, {q.video for q in self.chosen}))

  def fingerprint(self) -> str:
    """Of what is asked.

    What is right may be corrected later, and a video that was missing may
    come with another folder or extension.
    """
    asked = [(item.id, item.prompt) for item in self.questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

  def batches(self) -> dict[str, list[list[Question]]]:
    """Batches by video, in the questions' order; those of chosen questions.

    They are cut from all questions, so that a limit changes none of them.
    """
    videos: dict[str, list[Question]] = {}
    for item in self.questions:
      videos.setdefault(item.video, []).append(item)
    chosen = {item.id for item in self.chosen}
    batches: dict[str, list[list[Question]]] = {}
    for video, items in videos.items():
      for at in range(0, len(items), BATCH):
        batch = items[at : at + BATCH]
        if any(item.id in chosen for item in batch):
          batches.setdefault(video, []).append(batch)
    return batches


def open_task(
  benchmark: str,
  data: str | os.PathLike,
  *,
  subtitles: bool = False,
  features: str | os.PathLike | None = None,
  videos: str | os.PathLike | None = None,
  limit: int | None = None,
) -> EvalTask:
  """Reads a benchmark from disk.

  Args:
    benchmark: name in `benchmarks.BENCHMARKS`.
    data: its folder, as published, or one annotation file of it.
    subtitles: whether prompts hold them.
    features: feature store to read instead of videos.
    videos: folder of the videos, if it is not in `data`.
    limit: asks the first questions only.

  Raises:
    UserError: unknown benchmark, no such folder or files of another benchmark
      in it, no feature store, or nothing to ask.
  """
  store = FeatureStore(features) if features is not None else None
  loaded = benchmarks.read(
    benchmark,
    data,
    subtitles=subtitles,
    videos=videos,
    stored=None if store is None else store.videos(),
  )
  return EvalTask(
    benchmark=benchmark,
    version=loaded.benchmark.version,
    questions=loaded.questions,
    videos=loaded.videos,
    frames=loaded.benchmark.frames,
    max_tokens=loaded.benchmark.max_tokens,
    subtitles=subtitles,
    features=store,
    limit=limit,
    notes=loaded.notes,
    # The first questions alone are no account of the whole benchmark.
    left_out=loaded.left_out if limit is None else (),
  )
