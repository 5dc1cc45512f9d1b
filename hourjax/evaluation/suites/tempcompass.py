"""TempCompass: short videos; multiple choice, yes or no, caption matching.

Files: the authors' `questions/<format>.json`, an object of videos, of temporal
aspects, of questions (github.com/llyx97/TempCompass), or a folder a format with
`test-*.parquet`, a row a question (lmms-lab/TempCompass on Hugging Face);
`videos/<id>.mp4`. Captioning is left out: its score needs another model.

Prompt: the authors' `answer_prompt`, which lmms-eval repeats.
"""

import re
from collections.abc import Iterator
from typing import Any

from hourjax.errors import UserError
from hourjax.evaluation.questions import Question
from hourjax.evaluation.suites import fields
from hourjax.evaluation.suites.suite import Source, Suite

FORMATS = ("multi-choice", "yes_no", "caption_matching")
BEST = "{question}\nPlease directly give the best option:"
PROMPTS = {
  "multi-choice": BEST,
  "yes_no": "{question}\nPlease answer yes or no:",
  "caption_matching": BEST,
}


def read(source: Source) -> list[Question]:
  """One question a row, or all of the authors' file of a format."""
  form = _form(source)
  counts: dict[tuple[str, str], int] = {}
  questions = []
  for row in _rows(source):
    video = fields.text(row, "video_id", source.file.name)
    aspect = fields.text(row, "dim", source.file.name)
    number = counts[video, aspect] = counts.get((video, aspect), -1) + 1
    name = f"{form}/{video}/{aspect}/{number}"
    questions.append(_question(row, source, form, name))
  return questions


def _form(source: Source) -> str:
  """The format, told by the file's name or its folder's."""
  for name in (source.file.stem, source.file.parent.name):
    if name in FORMATS:
      return name
  raise UserError(
    f"{source.file}: neither the file nor its folder is named after a format,"
    f" {', '.join(FORMATS)}; name it as it was published"
  )


def _rows(source: Source) -> Iterator[dict[str, Any]]:
  for row in source.rows:
    if "video_id" in row:
      yield row
      continue
    for video, aspects in row.items():
      at = f"{source.file.name}: video {video}"
      if not isinstance(aspects, dict):
        raise UserError(
          f"{at} is {aspects!r:.80}, expected its aspects; fetch the file again"
        )
      for aspect in aspects:
        for item in fields.rows(aspects, aspect, at):
          yield {**item, "video_id": video, "dim": aspect}


def _question(row, source: Source, form: str, name: str) -> Question:
  at = f"{source.file.name}: question {name}"
  text = fields.text(row, "question", at)
  answer = fields.text(row, "answer", at)
  extra: dict[str, Any] = {"format": form.replace("-", "_")}
  options: tuple[str, ...] = ()
  if form == "yes_no":
    kind, expected = "yes_no", _yes_or_no(answer, at)
  elif form == "multi-choice":
    kind, (_, options) = "choice", fields.split_options(text)
    expected = fields.letter(answer, _needed(options, text, at), at)
  else:
    kind = "match"
    labels, options = _captions(text)
    expected = _number(answer, labels, _needed(options, text, at), at)
    extra["symbols"] = tuple(label[-1] for label in labels)
  return Question(
    id=name,
    video=source.videos.name(fields.text(row, "video_id", at)),
    prompt=PROMPTS[form].format(question=text),
    expected=expected,
    kind=kind,
    options=options,
    tasks=(fields.text(row, "dim", at),),
    chance=1 / (len(options) or 2),
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


SUITE = Suite(
  name="tempcompass",
  title="TempCompass",
  revision=1,
  annotations=(
    " ".join(f"questions/{form}.json" for form in FORMATS),
    " ".join(f"{form}.json" for form in FORMATS),
    " ".join(f"{form}/test-*.parquet" for form in FORMATS),
  ),
  columns=(frozenset({"video_id", "question", "answer", "dim"}),),
  shape=_is_authors,
  read=read,
  prompts=PROMPTS,
  videos=("videos", "tempcompass_videos", "video"),
)
