"""Video-MME: 2,700 questions about 900 videos, with and without subtitles.

Files: `videomme/test-00000-of-00001.parquet`, `data/<videoID>.mp4` and
`subtitle/<videoID>.srt` (lmms-lab/Video-MME on Hugging Face, where videos and
subtitles are zips to unpack), or the authors' JSON, one entry for each video
with its three `questions` (github.com/BradyFU/Video-MME, README). Not every
video has subtitles; questions about the others are asked without.

Prompt: the authors' README, word for word; options are published with their
letters ("A. Apples."). lmms-eval's prompt is much the same, but mentions
subtitles where there are none.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator

from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields, subtitles
from hourjax.evaluation.benchmarks.benchmark import Benchmark, Row, Source
from hourjax.evaluation.benchmarks.folder import youtube_key
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut

QUESTION = (
  "Select the best answer to the following multiple-choice question based on"
  " the video. Respond with only the letter (A, B, C, or D) of the correct"
  " option.\n{question}\n{options}\nThe best answer is:"
)
SUBTITLES = "This video's subtitles are listed below:\n{subtitles}\n"


def read(source: Source) -> list[Question | LeftOut]:
  """Makes one question of each row, or three of each authors' entry.

  Args:
    source: an annotation file.
  """
  # A video has three questions; its subtitles are read once.
  read_srt = functools.cache(subtitles.read_srt)
  return source.make_each(
    lambda row: _question(row, source, read_srt), _rows(source)
  )


def _rows(source: Source) -> Iterator[Row | UserError]:
  """Yields a row for each question, whichever layout the file has."""
  for row in source.rows:
    if isinstance(row, UserError) or "questions" not in row:
      yield row
      continue
    url = str(row.get("url") or "")
    at = f"{source.file.name}: video {row.get('video_id') or url}"
    about = {
      "duration": row.get("duration") or row.get("duration_category"),
      "domain": row.get("domain") or row.get("video_category"),
      "sub_category": row.get("sub_category") or row.get("video_sub_category"),
      "videoID": row.get("videoID") or youtube_key(url) or url.split("/")[-1],
    }
    yield from fields.rows(row, "questions", at, about)


def _question(
  row: Row,
  source: Source,
  read_srt: Callable[[pathlib.Path], str | None],
) -> Question:
  """Makes the question of a row."""
  name = fields.text(row, "question_id", source.file.name)
  at = f"{source.file.name}: question {name}"
  video = fields.text(row, "videoID", at)
  published = fields.options(row, at)
  options = fields.without_letters(published)
  prompt = QUESTION.format(
    question=fields.published(row, "question", at),
    options="\n".join(published)
    if options != published
    else fields.lettered(options, "{}. {}"),
  )
  extra = fields.known(row, "domain", "sub_category")
  if source.subtitles:
    lines = read_srt(source.root / "subtitle" / f"{video}.srt")
    extra["subtitles"] = "missing" if lines is None else "given"
    if lines is not None:
      prompt = SUBTITLES.format(subtitles=lines) + prompt
  expected = fields.letter(fields.text(row, "answer", at), options, at)
  return Question(
    id=name,
    video=source.videos.name(video),
    prompt=prompt,
    expected=expected,
    kind="choice",
    options=options,
    tasks=(fields.text(row, "task_type", at),),
    duration=fields.text(row, "duration", at),
    chance=fields.chance(options, expected),
    extra=extra,
  )


BENCHMARK = Benchmark(
  name="videomme",
  title="Video-MME",
  revision=2,
  annotations=(
    "videomme/test-*.parquet",
    "test-*.parquet",
    "data/test-*.parquet",
    "*.parquet",
    "*.json",
  ),
  columns=(
    frozenset({"question_id", "videoID", "task_type", "options", "answer"}),
    frozenset({"questions", "duration_category", "video_category"}),
    frozenset({"questions", "duration", "domain", "sub_category"}),
  ),
  read=read,
  prompts={"choice": QUESTION, "subtitles": SUBTITLES},
  videos=("data", "videos", "video"),
  subtitles=f"subtitle/<videoID>.srt before the question: {subtitles.RULE};"
  " a video without the file is asked without",
)
