"""LVBench: 1,549 questions about 103 videos of half an hour to two hours.

Files: the authors' `video_info.meta.jsonl`, one line for each video with its
`qa` (THUDM/LVBench on Hugging Face), or `data/train-*.parquet`, one row for
each question (lmms-lab/LVBench). Videos are named by their YouTube id, or
numbered by the authors' download script, `scripts/videos/00000/00000007.mp4`,
with the address in the JSON beside them. Options stand in the question's text,
"(A) ..." on a line each; where a copy has them in a column, they are put there.

Prompt: lmms-eval's `lvbench`, which adds no full stop.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields
from hourjax.evaluation.benchmarks.benchmark import Benchmark, Row, Source
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut

QUESTION = "{question}\nAnswer the question with the option letter"


def read(source: Source) -> list[Question | LeftOut]:
  """Makes one question of each row, or all of each video's line.

  Args:
    source: an annotation file.
  """
  return source.make_each(lambda row: _question(row, source), _rows(source))


def _rows(source: Source) -> Iterator[Row | UserError]:
  """Yields a row for each question, whichever layout the file has."""
  for row in source.rows:
    if isinstance(row, UserError) or "qa" not in row:
      yield row
      continue
    about = {name: row.get(name) for name in ("key", "type", "video_info")}
    at = f"{source.file.name}: video {row.get('key')}"
    yield from fields.rows(row, "qa", at, about)


def _question(row: Row, source: Source) -> Question:
  """Makes the question of a row."""
  if row.get("key") is None and row.get("video_path"):
    row = {**row, "key": pathlib.PurePosixPath(str(row["video_path"])).stem}
  key = fields.text(row, "key", source.file.name)
  name = f"{key}/{fields.text(row, 'uid', source.file.name)}"
  at = f"{source.file.name}: question {name}"
  text = fields.published(row, "question", at)
  text, options = fields.with_options(row, text, "({}) {}", at)
  if not options:
    raise UserError(
      f"{at}: found no options '(A) ...' and '(B) ...' below the question"
      f" {text!r}; fetch the file again"
    )
  expected = fields.letter(fields.text(row, "answer", at), options, at)
  return Question(
    id=name,
    video=source.videos.name(key),
    prompt=QUESTION.format(question=text),
    expected=expected,
    kind="choice",
    options=options,
    tasks=_tasks(row.get("question_type")),
    duration=_duration(row),
    chance=fields.chance(options, expected),
    extra=fields.known(row, "type"),
  )


def _duration(row: Row) -> str:
  """Returns the range of the length, which only the authors' file has."""
  info = row.get("video_info")
  minutes = info.get("duration_minutes") if isinstance(info, dict) else None
  if not isinstance(minutes, int | float):
    return ""
  return fields.minutes_range(60 * minutes)


def _tasks(value: Any) -> tuple[str, ...]:
  """Returns the question types, which some copies hold as a list in text."""
  if isinstance(value, str):
    try:
      value = json.loads(value.replace("'", '"'))
    except ValueError:
      value = [value]
  return tuple(str(item) for item in value or ())


BENCHMARK = Benchmark(
  name="lvbench",
  title="LVBench",
  revision=2,
  annotations=(
    "video_info.meta.jsonl",
    "data/video_info.meta.jsonl",
    "data/train-*.parquet",
    "train-*.parquet",
    "data/test-*.parquet",
    "test-*.parquet",
    "*.parquet",
  ),
  columns=(
    frozenset({"key", "qa"}),
    frozenset({"key", "uid", "question", "answer", "time_reference"}),
    frozenset({"video_path", "uid", "question", "answer", "time_reference"}),
  ),
  read=read,
  prompts={"choice": QUESTION},
  videos=(
    "videos",
    "all_videos",
    "scripts/videos",
    "script/videos",
    "video",
    "data",
  ),
)
