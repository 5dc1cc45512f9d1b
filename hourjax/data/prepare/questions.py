"""One row of a question table: its columns, and the turns it becomes."""

import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from hourjax.data import json_stream
from hourjax.data.records import MARKER
from hourjax.errors import UserError

INSTRUCTION = "Answer with the letter."
FORMATS = ("open", "multiple_choice")

# What a column may be called where the user does not say; case is ignored.
NAMES = {
  "video": "video video_id vid video_name video_path video_file video_uid",
  "question": "question query q prompt instruction",
  "answer": "answer a response ground_truth gt correct_answer",
  "options": "options choices candidates option",
  "topic": "topic category aspect",
  "task": "task task_type question_type qtype",
  "format": "format question_format qa_type answer_type",
  "source": "data_source source dataset",
  "duration": "duration video_duration",
}
REQUIRED = ("video", "question", "answer")

_LETTER = re.compile(r"\(?([A-Za-z])\)?[.):]?")
_LABEL = re.compile(r"\(?([A-Za-z])\)?[.):]\s*")

Columns = Mapping[str, tuple[str, ...]]


def parse_mapping(text: str) -> dict[str, tuple[str, ...]]:
  """Reads --columns: "video=vid,options=A+B+C+D".

  Raises:
    UserError: not of this form, or an unknown role.
  """
  mapping = {}
  for part in filter(None, (part.strip() for part in text.split(","))):
    role, equals, names = part.partition("=")
    columns = tuple(name for name in names.split("+") if name)
    if not equals or not columns or role not in NAMES:
      raise UserError(
        f"--columns: {part!r}; write ROLE=COLUMN,... with a role of"
        f" {', '.join(NAMES)}; options may be A+B+C+D"
      )
    if len(columns) > 1 and role != "options":
      raise UserError(
        f"--columns: {len(columns)} columns for {role}, 1 expected; only"
        " options may have several"
      )
    mapping[role] = columns
  return mapping


def find_columns(found: Sequence[str], mapping: Columns, path: Any) -> Columns:
  """Which columns of a table play which role.

  Args:
    found: names of the table's columns.
    mapping: roles that the user has mapped.
    path: of the table, for messages.

  Raises:
    UserError: a mapped column is not there, or none is found for a required
      role; it lists the columns and shows how to map them.
  """
  listing = f"its columns are {', '.join(map(repr, found)) or 'none'}"
  missing = [n for names in mapping.values() for n in names if n not in found]
  if missing:
    raise UserError(
      f"{path}: no column {missing[0]!r}, which --columns names; {listing}"
    )
  columns = dict(mapping)
  lower = {name.lower(): name for name in reversed(found)}
  for role, names in NAMES.items():
    known = [lower[name] for name in names.split() if name in lower]
    if role not in columns and known:
      columns[role] = (known[0],)
  if "options" not in columns and all(c in lower for c in "abcd"):
    letters = tuple(lower[c] for c in "abcd")
    columns["options"] = letters
    # A column "a" beside b, c, d is an option, not the answer.
    if columns.get("answer") == letters[:1] and "answer" not in mapping:
      del columns["answer"]
  for role in REQUIRED:
    if role not in columns:
      raise UserError(
        f"{path}: no column for the {role}; {listing}; say which, for example"
        f" --columns={role}={found[0] if found else 'NAME'}"
      )
  return columns


def read_row(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
  """The question of one row.

  Returns:
    {"video", "source", "duration", "human", "gpt", "facts"}: what both sides
    say, and what is known about the question (as in the demo's records).

  Raises:
    UserError: no video, question or answer; an answer that is none of the
      options. Its `kind` tells which.
  """

  def cell(role: str) -> str:
    return _text(row.get(columns[role][0])) if role in columns else ""

  for role in REQUIRED:
    if not cell(role):
      raise UserError(
        f"no {role} in column {columns[role][0]!r}", kind=f"no {role}"
      )
  human = cell("question").replace(MARKER, "").strip()
  gpt = cell("answer")
  options = _options([row.get(name) for name in columns.get("options", ())])
  facts = {"topic": cell("topic"), "task": cell("task"), "answer": gpt}
  if options:
    letter = _letter(gpt, options)
    facts |= {"answer": options[letter], "options": list(options.values())}
    facts |= {"letter": letter, "format": FORMATS[1]}
    lines = [f"{name}. {text}" for name, text in options.items()]
    human, gpt = "\n".join([human, *lines, INSTRUCTION]), letter
  else:
    facts |= {"format": cell("format") or FORMATS[0]}
  return {
    "video": cell("video"),
    "source": cell("source"),
    "duration": _number(cell("duration")),
    "human": human,
    "gpt": gpt,
    "facts": {key: value for key, value in facts.items() if value},
  }


def _text(value: Any) -> str:
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return ""
  return str(value).strip()


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if 0 < value < math.inf else None


def _options(cells: list[Any]) -> dict[str, str]:
  """Letter -> text; of several columns, a list, a dict or JSON text of one."""
  value = cells[0] if len(cells) == 1 else [c for c in cells if _text(c)]
  if isinstance(value, str):
    try:
      value = json_stream.parse(value)
    except json.JSONDecodeError:
      value = value.splitlines()
  if isinstance(value, Mapping):
    # Parquet gives every key of the column's type, absent ones as None.
    value = [value[key] for key in sorted(value)]
  if not isinstance(value, list):
    return {}
  texts = [_text(option) for option in value if _text(option)]
  letters = string.ascii_uppercase[: len(texts)]
  labels = [_LABEL.match(text) for text in texts]
  if texts and all(
    m and m[1].upper() == letter for m, letter in zip(labels, letters)
  ):
    texts = [text[m.end() :] for text, m in zip(texts, labels)]
  return dict(zip(letters, texts))


def _letter(answer: str, options: Mapping[str, str]) -> str:
  """The letter of the right option: "B", "(b)", "B. a cat" or "a cat"."""
  same = [
    letter
    for letter, text in options.items()
    if text.casefold() == answer.casefold()
  ]
  if len(same) == 1:
    return same[0]
  for pattern in (_LETTER.fullmatch, _LABEL.match):
    match = pattern(answer)
    if match and match[1].upper() in options:
      rest = answer[match.end() :].strip()
      letter = match[1].upper()
      if not rest or rest.casefold() == options[letter].casefold():
        return letter
  raise UserError(
    f"answer {answer!r:.80} is none of the options {list(options.values())}",
    kind="answer is no option",
  )
