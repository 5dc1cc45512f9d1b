"""An evaluation task: the questions of a benchmark, and how they are asked."""

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

# Questions about a video that are answered in one batch. It is recorded, since
# answers depend on it, if only by float rounding.
BATCH = 8


@dataclasses.dataclass(frozen=True)
class EvalTask:
  """Describes the questions of a benchmark and how they are asked.

  Attributes:
    benchmark: name of the benchmark.
    version: version of its prompts and rules.
    questions: all questions in a fixed order; their ids are unique.
    videos: folder of the questions' videos.
    frames: which frames of a video the model gets, in words.
    max_tokens: most tokens of an answer.
    subtitles: whether the prompts hold subtitles.
    features: feature store that is read instead of `videos`.
    limit: number of questions that are asked, from the first; None asks all.
    notes: sentences that a report must contain on how they were asked.
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

  def __post_init__(self) -> None:
    if not self.chosen:
      raise UserError(
        f"{self.benchmark} has {len(self.questions)} questions and --limit is"
        f" {self.limit}: there is nothing to ask; correct --data or --limit"
      )

  @property
  def chosen(self) -> tuple[Question, ...]:
    """Returns the questions that are asked and scored."""
    return self.questions[: self.limit]

  @property
  def num_sparse(self) -> int:
    """Returns how many videos have too few stored features.

    They are short videos, whose frames the rule takes more densely than one a
    second (see `data.media.frame_rules`).
    """
    if self.features is None:
      return 0
    return len(sparse_videos(self.features, {q.video for q in self.chosen}))

  def fingerprint(self) -> str:
    """Returns a hash of the questions' ids and prompts.

    Videos and right answers are not part of it: a right answer may be corrected
    later, and a missing video may arrive under another folder or extension.
    """
    asked = [(item.id, item.prompt) for item in self.questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

  def batches(self) -> dict[str, list[list[Question]]]:
    """Returns video -> batches, those that hold chosen questions.

    Batches are cut from all questions in their order, so that `limit` changes
    no batch.
    """
    videos: dict[str, list[Question]] = {}
    for item in self.questions:
      videos.setdefault(item.video, []).append(item)
    chosen = {item.id for item in self.chosen}
    batches: dict[str, list[list[Question]]] = {}
    for video, items in videos.items():
      for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
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
    data: folder of the benchmark as published, or one annotation file of it.
    subtitles: whether prompts hold subtitles.
    features: feature store to read instead of videos.
    videos: folder of the videos, if it is not in `data`.
    limit: number of questions to ask, from the first.

  Raises:
    UserError: there is no such benchmark, folder or feature store; the folder
      holds the files of another benchmark; or there is nothing to ask.
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
    # A run of the first questions does not report on the whole benchmark.
    left_out=loaded.left_out if limit is None else (),
  )
