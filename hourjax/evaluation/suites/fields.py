"""Fields of annotation rows, checked: texts, options, the right one."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hourjax.errors import UserError
from hourjax.evaluation.parsing import LETTERS

_EDGES = (5, 10, 20, 30, 60, 120)  # of ranges of lengths, in minutes


def text(row: Mapping[str, Any], key: str, at: str) -> str:
  """A field that must hold text; numbers become text.

  Args:
    row: of an annotation file.
    key: of the field.
    at: file and question, for messages.

  Raises:
    UserError: there is no such field, or nothing in it.
  """
  value = row.get(key)
  if value is None or isinstance(value, (dict, list)):
    raise UserError(
      f"{at}: {key} is {value!r}, expected text; fetch the file again"
    )
  if not str(value).strip():
    raise UserError(
      f"{at}: {key} is empty, so there is nothing to ask; repair or drop it"
    )
  return str(value).strip()


def texts(row: Mapping[str, Any], key: str, at: str) -> tuple[str, ...]:
  """A field that must hold two options or more.

  Raises:
    UserError: it does not, or one is empty, or there are more than letters.
  """
  values = row.get(key)
  if not isinstance(values, list) or not 2 <= len(values) <= len(LETTERS):
    raise UserError(
      f"{at}: {key} is {values!r}, expected 2 to {len(LETTERS)} options; fetch"
      " the file again"
    )
  numbered = {f"{key}[{i}]": value for i, value in enumerate(values)}
  return tuple(text(numbered, name, at) for name in numbered)


def number(row: Mapping[str, Any], key: str, at: str) -> float:
  """A field that must hold a number.

  Raises:
    UserError: it does not.
  """
  value = row.get(key)
  if isinstance(value, (int, float)) and math.isfinite(value):
    return float(value)
  raise UserError(
    f"{at}: {key} is {value!r}, expected a number; fetch the file again"
  )


def rows(row: Mapping[str, Any], key: str, at: str) -> list[dict[str, Any]]:
  """A field that must hold a list of objects.

  Raises:
    UserError: it does not.
  """
  value = row.get(key)
  if isinstance(value, list) and all(isinstance(v, dict) for v in value):
    return value
  raise UserError(
    f"{at}: {key} is {value!r:.80}, expected a list of objects; fetch the file"
    " again"
  )


def known(row: Mapping[str, Any], *keys: str) -> dict[str, str]:
  """The fields that are there, as texts; reports group by them."""
  return {key: str(row[key]) for key in keys if row.get(key)}


def letter(answer: str, options: Sequence[str], at: str) -> str:
  """The right letter of an answer that is one: "B", "(B)" or "B. red".

  Raises:
    UserError: it is no letter of the options.
  """
  match = re.match(r"\(?([A-Za-z])(?:[.):]|$)", answer)
  if match and match[1].upper() in LETTERS[: len(options)]:
    return match[1].upper()
  raise UserError(
    f"{at}: the right answer is {answer!r}, but there are {len(options)}"
    f" options, A to {LETTERS[len(options) - 1]}; repair or drop it"
  )


def letter_of_text(answer: str, options: Sequence[str], at: str) -> str:
  """The right letter of an answer that repeats its option.

  Raises:
    UserError: no option is like it.
  """
  if answer in options:
    return LETTERS[options.index(answer)]
  raise UserError(
    f"{at}: the right answer is {answer!r}, but the {len(options)} options are"
    f" {list(options)}; repair or drop it"
  )


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
  """Options as texts: "A. Apples." -> "Apples.", if all have their letter."""
  bare = []
  for name, option in zip(LETTERS, options):
    match = re.fullmatch(rf"\(?{name}[.):]\s*(.+)", option, re.DOTALL)
    if not match:
      return tuple(options)
    bare.append(match[1])
  return tuple(bare)


def lettered(options: Sequence[str], style: str) -> str:
  """Options a line each: style "{}. {}" gives "A. red", "({}) {}" "(A) red"."""
  return "\n".join(style.format(*pair) for pair in zip(LETTERS, options))


def split_options(question: str) -> tuple[str, tuple[str, ...]]:
  """A question and the options that stand below it, a line each.

    "Which?\\n(A) red\\n(B) blue" -> "Which?", ("red", "blue")

  Lines may open with "(A)", "A)", "A.", or "A:"; they follow each other from A.
  What comes after the last option is part of it up to the line's end only.

  Returns:
    The text before the options and their texts; the whole question and ()
    where there are no two.
  """
  lines = question.split("\n")
  for start in range(len(lines)):
    options = []
    for name, line in zip(LETTERS, lines[start:]):
      match = re.match(rf"\s*\(?{name}[.):]\s*(.+)", line)
      if not match:
        break
      options.append(match[1].strip())
    if len(options) > 1:
      return "\n".join(lines[:start]).strip(), tuple(options)
  return question.strip(), ()


def minutes_range(seconds: Any) -> str:
  """Range of a length for reports, e.g. "10-20 min"; "" if it is unknown."""
  if not isinstance(seconds, (int, float)) or not seconds > 0:
    return ""
  lower = 0
  for upper in _EDGES:
    if seconds <= upper * 60:
      return f"{lower}-{upper} min"
    lower = upper
  return f"over {lower} min"
