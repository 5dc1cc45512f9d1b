"""Fields of annotation rows, checked: texts, options, the right one."""

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hourjax.errors import UserError
from hourjax.evaluation.parsing import LETTERS, same_text
from hourjax.schema import shorten

_EDGES = (5, 10, 20, 30, 60, 120)  # of ranges of lengths, in minutes


def text(row: Mapping[str, Any], key: str, at: str) -> str:
  """A field that must hold text, without spaces around; numbers become text.

  Args:
    row: of an annotation file.
    key: of the field.
    at: file and question, for messages.

  Raises:
    UserError: there is no such field, or nothing in it.
  """
  return published(row, key, at).strip()


def published(row: Mapping[str, Any], key: str, at: str) -> str:
  """As `text`, but with the spaces and newlines that it is published with.

  What a prompt shows of a row is read with it.
  """
  value = row.get(key)
  if value is None or isinstance(value, (dict, list)):
    raise UserError(
      f"{at}: {key} is {shorten(value)}, expected text; fetch the file again"
    )
  if not str(value).strip():
    raise UserError(
      f"{at}: {key} is empty, so there is nothing to ask; repair or drop it"
    )
  return str(value)


# What a column of options is called. Some copies have a column each instead.
_COLUMNS = ("options", "candidates", "choices")
_COLUMN_EACH = (
  ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J"),
  *(
    tuple(f"{name}{mark}" for mark in marks)
    for name in ("option", "option_", "choice", "choice_")
    for marks in ("0123456789", "123456789", LETTERS, LETTERS.lower())
  ),
)
_MOST = 100_000  # characters of options written as text


def has_options(row: Mapping[str, Any]) -> bool:
  """Whether a row has options in a column of their own, or in one each."""
  return any(row.get(key) is not None for key in _COLUMNS) or bool(_each(row))


def options(
  row: Mapping[str, Any], at: str, *, empty: bool = False
) -> tuple[str, ...]:
  """A row's options, as published.

  They may be a list, an object by letter, either of them written as text, or a
  column each, such as A to D or option0 to option4.

  Args:
    row: of an annotation file.
    at: file and question, for messages.
    empty: whether options may be empty.

  Raises:
    UserError: there are none, or one is empty, or more than there are letters.
  """
  each = _each(row)
  key = next((k for k in _COLUMNS if row.get(k) is not None), "options")
  found = row.get(key)
  values = _listed(found) if found is not None or not each else each
  if not isinstance(values, list) or not 2 <= len(values) <= len(LETTERS):
    raise UserError(
      f"{at}: {key} is {shorten(found)}, expected 2 to {len(LETTERS)} options;"
      " fetch the file again"
    )
  if empty:
    return tuple("" if value is None else str(value) for value in values)
  numbered = {f"{key}[{i}]": value for i, value in enumerate(values)}
  return tuple(published(numbered, name, at) for name in numbered)


def _each(row: Mapping[str, Any]) -> list[Any]:
  """Options that have a column each; those at the end that are absent go."""
  for names in _COLUMN_EACH:
    if names[0] in row and names[1] in row:
      values = [row.get(name) for name in names if name in row]
      while values and _absent(values[-1]):
        values.pop()
      return values
  return []


def _absent(value: Any) -> bool:
  return value is None or value in ("", "N/A") or value != value  # NaN


def _listed(value: Any) -> Any:
  """A list of what may be one written as text, or an object by letter."""
  if isinstance(value, str):
    value = _parsed(value)
  if isinstance(value, Mapping):
    value = [value[key] for key in sorted(value)]
  if isinstance(value, tuple):
    return list(value)
  return value


def _parsed(value: str) -> Any:
  """The list that JSON, Python or numpy has written, or lines."""
  if len(value) > _MOST:
    return value
  written = value.strip()
  if found := re.fullmatch(r"array\((.*?)(?:, *dtype=\w+)?\)", written, re.S):
    written = found[1]
  try:
    return json.loads(written)
  except (ValueError, RecursionError):
    pass
  # numpy writes no commas: ['red' 'blue'], which Python would join.
  written = re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", written)
  try:
    return ast.literal_eval(written)
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    lines = [line for line in value.splitlines() if line.strip()]
    return lines if len(lines) > 1 else value


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


def rows(
  row: Mapping[str, Any], key: str, at: str, about: Mapping[str, Any]
) -> Iterator[dict[str, Any] | UserError]:
  """Rows that one field holds as a list.

  Args:
    row: of an annotation file.
    key: of the field.
    at: file and place, for messages.
    about: what all of them have; their own fields come first.

  Yields:
    Each row; the UserError that says so for one that is no object, or for the
    field if it holds none.
  """
  value = row.get(key)
  items = value if isinstance(value, list) else [value]
  if items and not any(isinstance(item, dict) for item in items):
    yield UserError(
      f"{at}: {key} is {shorten(value)}, expected a list of objects; fetch the"
      " file again"
    )
    return
  for number, item in enumerate(items):
    if isinstance(item, dict):
      yield {**about, **item}
    else:
      yield UserError(
        f"{at}: {key}[{number}] is {shorten(item)}, expected an object; repair"
        " or drop it"
      )


def known(row: Mapping[str, Any], *keys: str) -> dict[str, str]:
  """The fields that are there, as texts; reports group by them."""
  return {key: str(row[key]) for key in keys if row.get(key)}


def letter(answer: str, options: Sequence[str], at: str) -> str:
  """The right letter of an answer that is one: "B", "(B)" or "B. red".

  Raises:
    UserError: it is no letter of the options.
  """
  match = re.match(r"\(?([A-Za-z])(?:[.):]|$)", answer.strip())
  if match and match[1].upper() in LETTERS[: len(options)]:
    return match[1].upper()
  raise UserError(
    f"{at}: the right answer is {answer!r}, but there are {len(options)}"
    f" options, A to {LETTERS[len(options) - 1]}; repair or drop it"
  )


def letter_of_text(answer: str, options: Sequence[str], at: str) -> str:
  """The right letter of an answer that repeats its option; the last if several.

  Raises:
    UserError: no option is like it.
  """
  found = [i for i, o in enumerate(options) if o.strip() == answer.strip()]
  if found:
    return LETTERS[found[-1]]
  raise UserError(
    f"{at}: the right answer is {answer!r}, but the {len(options)} options are"
    f" {list(options)}; repair or drop it"
  )


def chance(options: Sequence[str], letter: str) -> float:
  """Probability that a guess is right: 0 where no option is.

  An answer that stands twice among the options is right by either letter.
  """
  if not letter:
    return 0.0
  return len(same_text(options, LETTERS.index(letter))) / len(options)


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


def with_options(
  row: Mapping[str, Any], question: str, style: str, at: str
) -> tuple[str, tuple[str, ...]]:
  """A question with its options below, and their texts.

  Some copies have them in the question, some in a column of their own.

  Raises:
    UserError: the options' column holds none.
  """
  found = split_options(question)[1]
  if found or not has_options(row):
    return question, found
  listed = options(row, at)
  found = without_letters(listed)
  shown = "\n".join(listed) if found != listed else lettered(listed, style)
  return f"{question}\n{shown}", found


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
