"""Cells of a table of questions: texts, options, answers, times."""

import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from hourjax.evaluation.benchmarks import fields
from hourjax.evaluation.parsing import LETTERS, parse
from hourjax.evaluation.questions import Question

_HELD_OUT = ("val", "valid", "validation", "dev", "test", "testing", "eval",
             "evaluation", "held_out", "heldout", "holdout")  # fmt: skip
_LABEL = re.compile(r"(?:^|(?<=[\s|;,/]))\(?([A-Za-z]|\d{1,2})\)?[.):]\s+")
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,3}):(\d{1,2}(?:[.,]\d+)?)")
_UNITS = re.compile(
  r"(?:(\d+) *h[a-z]*)? *(?:(\d+) *m[a-z]*)? *(?:(\d+(?:[.,]\d+)?) *s[a-z]*)?"
)


def split_cell(value: Any, where: str) -> list[str]:
  """Returns the options in one cell, without their labels.

  A cell may hold a list, an object by letter, either of them as text; or lines,
  labels ("A. x B. y", "1) x"), or parts between "|", ";" or commas.

  Args:
    value: the cell, which is not empty.
    where: its place, for messages.

  Raises:
    UserError: there are no two options, or more than letters.
  """
  text = value.strip() if isinstance(value, str) else ""
  if not text or (text[0] in "[{(" and text[-1] in "]})"):
    return unlabelled(fields.options({"options": value}, where))
  lines = [line for line in text.splitlines() if line.strip()]
  if len(lines) > 1:
    return unlabelled(fields.options({"options": lines}, where))
  labels = list(_LABEL.finditer(text))
  marks = [label[1].upper() for label in labels]
  if len(labels) > 1 and labels[0].start() == 0 and _follow(marks):
    ends = [label.start() for label in labels[1:]] + [len(text)]
    parts = [text[a.end() : end] for a, end in zip(labels, ends)]
  else:
    parts = next(
      (text.split(mark) for mark in ("|", ";", "\t", ",") if mark in text), []
    )
  texts = [part.strip(" \t|;,") for part in parts]
  numbered = {"options": [text for text in texts if text]}
  return unlabelled(fields.options(numbered, where))


def _follow(marks: Sequence[str]) -> bool:
  """Returns whether labels are A, B, C, ... or 1, 2, 3, ..., or from 0 on."""
  return any(
    list(marks) == list(names[: len(marks)])
    for names in (string.ascii_uppercase, [*map(str, range(1, 30))],
                  [*map(str, range(30))])
  )  # fmt: skip


def unlabelled(options: Sequence[str]) -> list[str]:
  """Returns options without labels, if all of them have the right one."""
  texts = [option.strip() for option in options]
  found = [_LABEL.match(text) for text in texts]
  if all(found) and _follow([match[1].upper() for match in found if match]):
    return [_LABEL.sub("", text, count=1).strip() for text in texts]
  return texts


def meant_option(answer: str, options: Sequence[str]) -> int | None:
  """Returns the option that an answer names by letter or text; None if none."""
  letter = LETTERS.find(answer.upper()) if len(answer) == 1 else -1
  alone = all(len(option) > 1 for option in options)
  if alone and 0 <= letter < len(options):
    return letter  # what most answers are
  same = [
    index
    for index, option in enumerate(options)
    if option and _same_form(option) == _same_form(answer)
  ]
  if len(same) == 1:
    return same[0]
  name = parse(answer, Question("", "", "", "", "choice", tuple(options)))
  return None if name is None else LETTERS.index(name)


def answers_of(value: Any) -> list[str]:
  """Returns the answers of a cell: of a list all of them, else one."""
  if isinstance(value, bool):
    return ["yes" if value else "no"]
  if isinstance(value, str) and value.strip()[:1] == "[":
    try:
      parsed = json.loads(value)
      value = parsed if isinstance(parsed, list) else value
    except ValueError:
      pass
  values = value if isinstance(value, list | tuple) else [value]
  return [text for text in map(text_of, values) if text]


def text_of(value: Any) -> str:
  """Returns a cell as text without spaces around it, 7 for 7.0."""
  if value is None or value != value:  # NaN, an empty cell of pandas
    return ""
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if isinstance(value, Mapping | list):
    return json.dumps(value, ensure_ascii=False)
  text = str(value).replace("\u00a0", " ").replace("\ufeff", "").strip()
  return "" if text.lower() in ("nan", "null", "n/a", "#n/a") else text


def plain_name(name: Any) -> str:
  """Returns the name of a column in lower case, words joined by "_"."""
  return re.sub(r"[^a-z0-9]+", "_", str(name).lower()).strip("_")


def _same_form(text: str) -> str:
  """Returns a text in lower case, without a full stop and double spaces."""
  return " ".join(text.casefold().split()).rstrip(".")


def says_held_out(value: Any) -> bool:
  """Returns whether a cell of a column of splits says so."""
  return plain_name(text_of(value)) in _HELD_OUT


def seconds(text: str) -> float | None:
  """Reads a time: "75", "75 s", "1:15", "00:01:15.5", "1m15s"; None if none."""
  text = text.strip().lower()
  if re.fullmatch(r"\d+(?:[.,]\d+)?", text):
    return float(text.replace(",", "."))
  match = _CLOCK.fullmatch(text) or (_UNITS.fullmatch(text) if text else None)
  if not match or not any(match.groups()):
    return None
  hours, minutes, rest = (float((g or "0").replace(",", ".")) for g in
                          match.groups())  # fmt: skip
  return 3600 * hours + 60 * minutes + rest


def clock(value: float) -> str:
  """Returns a time as 01:15, from an hour on as 1:00:15."""
  minutes, rest = divmod(int(value), 60)
  hours, minutes = divmod(minutes, 60)
  start = f"{hours}:" if hours else ""
  return f"{start}{minutes:02}:{rest:02}"
