"""LongVideoBench, validation: 1,337 questions, two to five options each.

Files (longvideobench/LongVideoBench on Hugging Face): `lvb_val.json` with
`candidates`, or `validation-*.parquet` with `option0` to `option4` ("N/A" where
there are fewer); `videos/`, `subtitles/`. The test split has no answers.

Prompt: lmms-eval's `longvideobench_val_v`, less the newline that ends its
yaml's text; the authors' loader words it alike. Both interleave subtitles with
frames where they use them; here the video comes first, so they are listed
before the question, in the words of Video-MME's authors.
"""

import string

from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields, subtitles
from hourjax.evaluation.benchmarks.benchmark import Benchmark, Row, Source
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut

QUESTION = (
  "{question}\n{options}\nAnswer with the option's letter from the given"
  " choices directly."
)
SUBTITLES = "This video's subtitles are listed below:\n{subtitles}\n"
# `duration_group` is the upper edge, in seconds (section 3 of the paper).
DURATIONS: dict[float, str] = {
  15: "8-15 s",
  60: "15-60 s",
  600: "180-600 s",
  3600: "900-3600 s",
}


def read(source: Source) -> list[Question | LeftOut]:
  """Makes one question of each row.

  Args:
    source: an annotation file.
  """
  return source.make_each(lambda row: _question(row, source))


def _question(row: Row, source: Source) -> Question:
  """Makes the question of a row."""
  name = fields.text(row, "id", source.file.name)
  at = f"{source.file.name}: question {name}"
  options = fields.options(_without_fillers(row), at)
  prompt = QUESTION.format(
    question=fields.published(row, "question", at),
    options=fields.lettered(options, "{}. {}"),
  )
  extra = fields.known(row, "topic_category", "level")
  if source.subtitles:
    lines = _subtitles(row, source, at)
    extra["subtitles"] = "missing" if lines is None else "given"
    if lines is not None:
      prompt = SUBTITLES.format(subtitles=lines) + prompt
  group = fields.number(row, "duration_group", at)
  expected = _expected(row, options, at)
  return Question(
    id=name,
    video=source.videos.name(
      fields.text(row, "video_path", at), fields.text(row, "video_id", at)
    ),
    prompt=prompt,
    expected=expected,
    kind="choice",
    options=options,
    tasks=(fields.text(row, "question_category", at),),
    duration=DURATIONS.get(group, f"{group:g} s"),
    chance=fields.chance(options, expected),
    extra=extra,
  )


def _without_fillers(row: Row) -> Row:
  """Returns a row without the "N/A" that stands for options that are none."""
  return {k: None if v == "N/A" else v for k, v in row.items()}


def _expected(row: Row, options: tuple[str, ...], at: str) -> str:
  """Returns the right letter, from the index of the option."""
  choice = row.get("correct_choice")
  if not isinstance(choice, int) or not 0 <= choice < 26:
    raise UserError(
      f"{at}: correct_choice is {choice!r}, expected an option's index from 0;"
      " the test split's answers are not published, use the validation split"
      " (lvb_val.json)"
    )
  return fields.letter(string.ascii_uppercase[choice], options, at)


def _subtitles(row: Row, source: Source, at: str) -> str | None:
  """Returns the subtitles within the clip; None if there are none."""
  name = row.get("subtitle_path")
  if not name:
    return None
  # Times in the file are those of the whole video that the clip is cut from.
  start = fields.number(row, "starting_timestamp_for_subtitles", at)
  length = fields.number(row, "duration", at)
  return subtitles.read_json(
    source.root / "subtitles" / name, start, start + length
  )


BENCHMARK = Benchmark(
  name="longvideobench",
  title="LongVideoBench",
  revision=2,
  annotations=(
    "lvb_val.json",
    "validation-*.parquet",
    "data/validation-*.parquet",
    "lvb_test_wo_gt.json",
    "test-*.parquet",
    "data/test-*.parquet",
  ),
  columns=(
    frozenset({"video_path", "question", "candidates", "duration_group"}),
    frozenset({"video_path", "question", "option0", "duration_group"}),
  ),
  read=read,
  prompts={"choice": QUESTION, "subtitles": SUBTITLES},
  videos=("videos", "video"),
  subtitles="what is said within the clip, subtitles/<subtitle_path>, before"
  f" the question: {subtitles.RULE}; a video without the file is asked without",
)
