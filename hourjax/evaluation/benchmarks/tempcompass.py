"""TempCompass: short videos; multiple choice, yes or no, caption matching.

Files: the authors' `questions/<format>.json`, an object of videos, each an
object of temporal aspects, each a list of questions
(github.com/llyx97/TempCompass); or a folder for each format with
`test-*.parquet`, one row for each question (lmms-lab/TempCompass on Hugging
Face); `videos/<id>.mp4`. Captioning is left out, because its score needs
another model. In a table that is not named after a format, the rows show
theirs.

Prompt: the authors' `answer_prompt`, which lmms-eval repeats.
"""

import re
from collections.abc import Iterator
from typing import Any

from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields
from hourjax.evaluation.benchmarks.benchmark import Benchmark, Row, Source
from hourjax.evaluation.parsing import LETTERS
from hourjax.evaluation.questions import Kind, Question
from hourjax.evaluation.scoring import LeftOut

FORMATS = ("multi-choice", "yes_no", "caption_matching")
BEST = "{question}\nPlease directly give the best option:"
PROMPTS = {
  "multi-choice": BEST,
  "yes_no": "{question}\nPlease answer yes or no:",
  "caption_matching": BEST,
}


def read(source: Source) -> list[Question | LeftOut]:
  """Makes one question of each row, or all of the authors' file.

  Args:
    source: an annotation file.
  """
  named = _format_of_file(source)
  counts: dict[tuple[str, str, str], int] = {}

  def question(row: Row) -> Question:
    form = named or _format_of_row(row, source)
    video = fields.text(row, "video_id", source.file.name)
    aspect = fields.text(row, "dim", source.file.name)
    # Rows have no id: questions of a format, video and aspect are counted.
    place = form, video, aspect
    counts[place] = counts.get(place, -1) + 1
    return _question(row, source, form, "/".join((*place, str(counts[place]))))

  return source.make_each(question, _rows(source))


def _format_of_file(source: Source) -> str | None:
  """Returns the format that the file or its folder is named after.

  Returns:
    The format; None if the name has none and rows must show it.

  Raises:
    UserError: the name has none, and the rows have no column for a video.
  """
  for name in (source.file.stem, source.file.parent.name):
    for form in FORMATS:
      if name == form or name.startswith(f"{form}-"):
        return form
  if any(isinstance(row, dict) and "video_id" in row for row in source.rows):
    return None
  raise UserError(
    f"{source.file}: neither the file nor its folder is named after a format,"
    f" {', '.join(FORMATS)}; name it as it was published"
  )


def _format_of_row(row: Row, source: Source) -> str:
  """Returns the format of a row of a table that is not named after one."""
  text = str(row.get("question") or "")
  if _captions(text)[0]:
    return "caption_matching"
  if fields.split_options(text)[1] or fields.has_options(row):
    return "multi-choice"
  if str(row.get("answer")).strip().lower() in ("yes", "no"):
    return "yes_no"
  raise UserError(
    f"{source.file.name}: the question {text!r:.80} is of no format,"
    f" {', '.join(FORMATS)}; repair or drop it"
  )


def _rows(source: Source) -> Iterator[Row | UserError]:
  """Yields a row for each question, whichever layout the file has."""
  for row in source.rows:
    if isinstance(row, UserError) or "video_id" in row:
      yield row
      continue
    for video, aspects in row.items():
      yield from _rows_of_video(
        video, aspects, f"{source.file.name}: video {video}"
      )


def _rows_of_video(
  video: str, aspects: Any, at: str
) -> Iterator[Row | UserError]:
  """Yields a row for each question in the authors' object of a video."""
  if not isinstance(aspects, dict):
    yield UserError(
      f"{at} is {aspects!r:.80}, expected its aspects; fetch the file again"
    )
    return
  for aspect in aspects:
    about = {"video_id": video, "dim": aspect}
    yield from fields.rows(aspects, aspect, at, about)


def _question(row: Row, source: Source, form: str, name: str) -> Question:
  """Makes the question of a row."""
  at = f"{source.file.name}: question {name}"
  text = fields.published(row, "question", at)
  answer = fields.text(row, "answer", at)
  extra: dict[str, Any] = {"format": form.replace("-", "_")}
  options: tuple[str, ...] = ()
  chance = 0.5
  kind: Kind
  if form == "yes_no":
    kind, expected = "yes_no", _yes_or_no(answer, at)
  elif form == "multi-choice":
    kind = "choice"
    text, options = fields.with_options(row, text, "{}. {}", at)
    expected = fields.letter(answer, _require(options, text, at), at)
    chance = fields.chance(options, expected)
  else:
    kind = "match"
    labels, options = _captions(text)
    expected = _number(answer, labels, _require(options, text, at), at)
    # The letter or digit that ends a label: "Option 2" -> "2".
    extra["symbols"] = tuple(label[-1] for label in labels)
    chance = fields.chance(options, LETTERS[int(expected) - 1])
  return Question(
    id=name,
    video=source.videos.name(fields.text(row, "video_id", at)),
    prompt=PROMPTS[form].format(question=text),
    expected=expected,
    kind=kind,
    options=options,
    tasks=(fields.text(row, "dim", at),),
    chance=chance,
    extra=extra,
  )


def _yes_or_no(answer: str, at: str) -> str:
  """Returns the right answer to a yes-or-no question, in lower case."""
  if answer.lower() not in ("yes", "no"):
    raise UserError(
      f"{at}: the right answer is {answer!r}, expected yes or no; repair or"
      " drop it"
    )
  return answer.lower()


def _require(options: tuple[str, ...], text: str, at: str) -> tuple[str, ...]:
  """Returns the options; raises a UserError if there are none."""
  if not options:
    raise UserError(
      f"{at}: found no options below the question {text!r}; fetch the file"
      " again"
    )
  return options


_CAPTION = re.compile(
  r"^((?:Option|Sentence|Caption|Description) (?:\d|[A-Z])): *(.+)$", re.M
)


def _captions(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
  r"""Returns the labels and the captions in a question.

  "Which?\nOption 1: A dog.\nOption 2: A cat."
      -> ("Option 1", "Option 2"), ("A dog.", "A cat.")
  """
  pairs = _CAPTION.findall(text)
  if len(pairs) < 2:
    return (), ()
  labels, captions = zip(*pairs)
  return labels, tuple(caption.strip() for caption in captions)


def _number(
  answer: str, labels: tuple[str, ...], options: tuple[str, ...], at: str
) -> str:
  """Returns the right caption's number; its label, or both, are published."""
  label = answer.split(":")[0].strip()
  if label in labels:
    return str(labels.index(label) + 1)
  raise UserError(
    f"{at}: the right answer is {answer!r}, but the {len(options)} options are"
    f" {', '.join(labels)}; repair or drop it"
  )


def _is_authors(row: Row) -> bool:
  """Returns whether a row is the authors' object of all videos."""
  first = next(iter(row.values()), None)
  items = next(iter(first.values()), None) if isinstance(first, dict) else None
  return (
    isinstance(items, list)
    and bool(items)
    and isinstance(items[0], dict)
    and items[0].keys() >= {"question", "answer"}
  )


BENCHMARK = Benchmark(
  name="tempcompass",
  title="TempCompass",
  revision=2,
  annotations=(
    " ".join(f"questions/{form}.json" for form in FORMATS),
    " ".join(f"{form}.json" for form in FORMATS),
    " ".join(f"{form}/test-*.parquet" for form in FORMATS),
    " ".join(f"data/{form}/test-*.parquet" for form in FORMATS),
    " ".join(f"data/{form}-*.parquet" for form in FORMATS),
    "data/test-*.parquet",
    "test-*.parquet",
  ),
  columns=(frozenset({"video_id", "question", "answer", "dim"}),),
  shape=_is_authors,
  read=read,
  prompts=PROMPTS,
  videos=("videos", "tempcompass_videos", "video"),
)
