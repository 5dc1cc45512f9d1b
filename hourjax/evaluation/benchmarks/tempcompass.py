"""TempCompass: short videos; multiple choice, yes or no, caption matching.

Files: the authors' `questions/<format>.json`, an object of videos, of temporal
aspects, of questions (github.com/llyx97/TempCompass), or a folder a format with
`test-*.parquet`, a row a question (lmms-lab/TempCompass on Hugging Face);
`videos/<id>.mp4`. Captioning is left out: its score needs another model. A
table of no format's name tells it by its rows.

Prompt: the authors' `answer_prompt`, which lmms-eval repeats.
"""

import re
from collections.abc import Iterator
from typing import Any

from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields
from hourjax.evaluation.benchmarks.benchmark import Benchmark, Row, Source
from hourjax.evaluation.parsing import LETTERS
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut

FORMATS = ("multi-choice", "yes_no", "caption_matching")
BEST = "{question}\nPlease directly give the best option:"
PROMPTS = {
  "multi-choice": BEST,
  "yes_no": "{question}\nPlease answer yes or no:",
  "caption_matching": BEST,
}


def read(source: Source) -> list[Question | LeftOut]:
  """One question a row, or all of the authors' file of a format."""
  named = _named(source)
  counts: dict[tuple[str, str, str], int] = {}

  def question(row: Row) -> Question:
    form = named or _form(row, source)
    video = fields.text(row, "video_id", source.file.name)
    aspect = fields.text(row, "dim", source.file.name)
    place = form, video, aspect
    counts[place] = counts.get(place, -1) + 1
    return _question(row, source, form, "/".join((*place, str(counts[place]))))

  return source.each(question, _rows(source))


def _named(source: Source) -> str | None:
  """The format that the file, or its folder, is named after."""
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


def _form(row: Row, source: Source) -> str:
  """The format of a row of a table that is not named after one."""
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
  for row in source.rows:
    if isinstance(row, UserError) or "video_id" in row:
      yield row
      continue
    for video, aspects in row.items():
      yield from _of_video(video, aspects, f"{source.file.name}: video {video}")


def _of_video(video: str, aspects: Any, at: str) -> Iterator[Row | UserError]:
  if not isinstance(aspects, dict):
    yield UserError(
      f"{at} is {aspects!r:.80}, expected its aspects; fetch the file again"
    )
    return
  for aspect in aspects:
    about = {"video_id": video, "dim": aspect}
    yield from fields.rows(aspects, aspect, at, about)


def _question(row, source: Source, form: str, name: str) -> Question:
  at = f"{source.file.name}: question {name}"
  text = fields.published(row, "question", at)
  answer = fields.text(row, "answer", at)
  extra: dict[str, Any] = {"format": form.replace("-", "_")}
  options: tuple[str, ...] = ()
  chance = 0.5
  if form == "yes_no":
    kind, expected = "yes_no", _yes_or_no(answer, at)
  elif form == "multi-choice":
    kind = "choice"
    text, options = fields.with_options(row, text, "{}. {}", at)
    expected = fields.letter(answer, _needed(options, text, at), at)
    chance = fields.chance(options, expected)
  else:
    kind = "match"
    labels, options = _captions(text)
    expected = _number(answer, labels, _needed(options, text, at), at)
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
  if answer.lower() not in ("yes", "no"):
    raise UserError(
      f"{at}: the right answer is {answer!r}, expected yes or no; repair or"
      " drop it"
    )
  return answer.lower()


def _needed(options: tuple[str, ...], text: str, at: str) -> tuple[str, ...]:
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
  """Labels and captions: "Option 1: A dog.\\nOption 2: ..." of a question."""
  found = _CAPTION.findall(text)
  if len(found) < 2:
    return (), ()
  labels, captions = zip(*found)
  return labels, tuple(caption.strip() for caption in captions)


def _number(answer: str, labels, options, at: str) -> str:
  """The right caption's number: its label, or label and caption, is given."""
  label = answer.split(":")[0].strip()
  if label in labels:
    return str(labels.index(label) + 1)
  raise UserError(
    f"{at}: the right answer is {answer!r}, but the {len(options)} options are"
    f" {', '.join(labels)}; repair or drop it"
  )


def _is_authors(row: dict[str, Any]) -> bool:
  """Whether a row is the authors' object of videos, aspects and questions."""
  first = next(iter(row.values()), None)
  items = next(iter(first.values()), None) if isinstance(first, dict) else None
  return (
    isinstance(items, list)
    and bool(items)
    and isinstance(items[0], dict)
    and items[0].keys() >= {"question", "answer"}
  )


SUITE = Benchmark(
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
