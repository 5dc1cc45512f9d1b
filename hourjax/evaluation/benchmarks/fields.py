"""Fields of annotation rows, checked: texts, options, the right answer."""

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hourjax.errors import UserError
from hourjax.evaluation.parsing import LETTERS, same_text
from hourjax.schema import shorten

# Upper edges of ranges of length, in minutes.
_EDGES = (5, 10, 20, 30, 60, 120, 240, 480)


def text(row: Mapping[str, Any], key: str, at: str) -> str:
  """Returns a field that must hold text, without spaces around it.

  A number is returned as text.

  Args:
    row: row of an annotation file.
    key: name of the field.
    at: file and question, for messages.

  Raises:
    UserError: there is no such field, or it is empty.
  """
  return published(row, key, at).strip()


def published(row: Mapping[str, Any], key: str, at: str) -> str:
  """Returns a field as `text` does, but with spaces and newlines as published.

  Everything that a prompt contains of a row is read by it.

  Args:
    row: row of an annotation file.
    key: name of the field.
    at: file and question, for messages.

  Raises:
    UserError: there is no such field, or it is empty.
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


# Names of a column of options, and of the columns of copies that have a column
# for each option instead.
_COLUMNS = ("options", "candidates", "choices")
_OPTION_COLUMNS = (
  ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J"),
  *(
    tuple(f"{name}{mark}" for mark in marks)
    for name in ("option", "option_", "choice", "choice_")
    for marks in ("0123456789", "123456789", LETTERS, LETTERS.lower())
  ),
)
_MAX_CHARACTERS = 100_000  # of options written as text


def has_options(row: Mapping[str, Any]) -> bool:
  """Returns whether a row has options in one column, or in a column each.

  Args:
    row: row of an annotation file.
  """
  return any(row.get(key) is not None for key in _COLUMNS) or bool(
    _columns(row)
  )


def options(
  row: Mapping[str, Any], at: str, *, empty: bool = False
) -> tuple[str, ...]:
  """Returns a row's options as published.

  They may be a list, an object by letter, either of them written as text, or a
  column each, such as A to D or option0 to option4.

  Args:
    row: row of an annotation file.
    at: file and question, for messages.
    empty: whether an option may be empty.

  Raises:
    UserError: there are no options, more than letters, or an empty one.
  """
  columns = _columns(row)
  key = next((k for k in _COLUMNS if row.get(k) is not None), "options")
  field = row.get(key)
  values = _as_list(field) if field is not None or not columns else columns
  if not isinstance(values, list) or not 2 <= len(values) <= len(LETTERS):
    raise UserError(
      f"{at}: {key} is {shorten(field)}, expected 2 to {len(LETTERS)} options;"
      " fetch the file again"
    )
  if empty:
    return tuple("" if value is None else str(value) for value in values)
  numbered = {f"{key}[{i}]": value for i, value in enumerate(values)}
  return tuple(published(numbered, name, at) for name in numbered)


def _columns(row: Mapping[str, Any]) -> list[Any]:
  """Returns options that have a column each, without absent ones at the end."""
  for names in _OPTION_COLUMNS:
    if names[0] in row and names[1] in row:
      values = [row.get(name) for name in names if name in row]
      while values and _is_absent(values[-1]):
        values.pop()
      return values
  return []


def _is_absent(value: Any) -> bool:
  """Returns whether a column says that there is no such option."""
  # Only NaN, the tables' empty cell, is not equal to itself.
  return value is None or value in ("", "N/A") or value != value


def _as_list(value: Any) -> Any:
  """Returns the list that a value is: as a list, as text or by letter."""
  if isinstance(value, str):
    value = _parse(value)
  if isinstance(value, Mapping):
    value = [value[key] for key in sorted(value)]
  if isinstance(value, tuple):
    return list(value)
  return value


def _parse(value: str) -> Any:
  """Returns the list that JSON, Python or numpy wrote, or else the lines."""
  if len(value) > _MAX_CHARACTERS:
    return value
  text = value.strip()
  if match := re.fullmatch(r"array\((.*?)(?:, *dtype=\w+)?\)", text, re.S):
    text = match[1]
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    pass
  # numpy writes no commas: ['red' 'blue'], which Python would read as one
  # string.
  text = re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", text)
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    lines = [line for line in value.splitlines() if line.strip()]
    return lines if len(lines) > 1 else value


def number(row: Mapping[str, Any], key: str, at: str) -> float:
  """Returns a field that must hold a number.

  Args:
    row: row of an annotation file.
    key: name of the field.
    at: file and question, for messages.

  Raises:
    UserError: it does not hold a finite number.
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
  """Yields the rows that one field holds as a list.

  Args:
    row: row of an annotation file.
    key: name of the field.
    at: file and place, for messages.
    about: fields that all of them have, where they have none of that name.

  Yields:
    Each row; a UserError for one that is no object, or for the whole field if
    it holds no object.
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
  """Returns those fields that are there, as texts by which reports group.

  Args:
    row: row of an annotation file.
    *keys: names of the fields.
  """
  return {key: str(row[key]) for key in keys if row.get(key)}


def letter(answer: str, options: Sequence[str], at: str) -> str:
  """Returns the right letter where the answer is one: "B", "(B)", "B. red".

  Args:
    answer: the published answer.
    options: texts of the options.
    at: file and question, for messages.

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
  """Returns the right letter where the answer repeats its option's text.

  If several options have the text, it is the last one's.

  Args:
    answer: the published answer.
    options: texts of the options.
    at: file and question, for messages.

  Raises:
    UserError: no option has this text.
  """
  same = [i for i, o in enumerate(options) if o.strip() == answer.strip()]
  if same:
    return LETTERS[same[-1]]
  raise UserError(
    f"{at}: the right answer is {answer!r}, but the {len(options)} options are"
    f" {list(options)}; repair or drop it"
  )


def chance(options: Sequence[str], letter: str) -> float:
  """Returns the probability that a guess is right; 0 if no option is.

  If the right text stands twice among the options, either letter is right.

  Args:
    options: texts of the options.
    letter: the right letter, or "".
  """
  if not letter:
    return 0.0
  return len(same_text(options, LETTERS.index(letter))) / len(options)


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
  """Returns options without their letters, if all have them.

  ("A. Apples.", "B. Pears.") -> ("Apples.", "Pears.")

  Args:
    options: the options as published.
  """
  texts = []
  for name, option in zip(LETTERS, options):
    match = re.fullmatch(rf"\(?{name}[.):]\s*(.+)", option, re.DOTALL)
    if not match:
      return tuple(options)
    texts.append(match[1])
  return tuple(texts)


def lettered(options: Sequence[str], style: str) -> str:
  """Returns options with their letters, one a line.

  The style "{}. {}" gives "A. red", and "({}) {}" gives "(A) red".

  Args:
    options: texts of the options.
    style: format of a line, with two places.
  """
  return "\n".join(style.format(*pair) for pair in zip(LETTERS, options))


def with_options(
  row: Mapping[str, Any], question: str, style: str, at: str
) -> tuple[str, tuple[str, ...]]:
  """Returns a question with its options below it, and their texts.

  Some copies have the options in the question, some in a column of their own.

  Args:
    row: row of an annotation file.
    question: its question.
    style: format of options from a column, as in `lettered`.
    at: file and question, for messages.

  Raises:
    UserError: the options' column holds none.
  """
  texts = split_options(question)[1]
  if texts or not has_options(row):
    return question, texts
  published_options = options(row, at)
  texts = without_letters(published_options)
  # Options that were published with their letters are asked as they are.
  if texts != published_options:
    lines = "\n".join(published_options)
  else:
    lines = lettered(texts, style)
  return f"{question}\n{lines}", texts


def split_options(question: str) -> tuple[str, tuple[str, ...]]:
  r"""Splits a question from the options that stand below it, one a line.

  "Which?\n(A) red\n(B) blue" -> "Which?", ("red", "blue")

  Lines may begin with "(A)", "A)", "A." or "A:", and follow each other from A.
  An option ends with its line.

  Args:
    question: a question, with or without options.

  Returns:
    The text before the options, and their texts; the whole question and () if
    there are fewer than two options.
  """
  lines = question.split("\n")
  for start in range(len(lines)):
    # Each line is tried as that of option A.
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
  """Returns the range of a length for reports, such as "10-20 min".

  Args:
    seconds: the length; anything but a positive number gives "".
  """
  if not isinstance(seconds, (int, float)) or not seconds > 0:
    return ""
  lower = 0
  for upper in _EDGES:
    if seconds <= upper * 60:
      return f"{lower}-{upper} min"
    lower = upper
  return f"over {lower} min"
