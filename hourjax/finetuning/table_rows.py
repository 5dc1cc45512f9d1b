"""Rows of a file of questions, in whatever form people keep them, and columns.

    text      UTF-8 with or without a mark, UTF-16, Windows-1252; packed by gzip
    table     commas, semicolons, tabs or bars; any line ends; quotes
    JSON      a list of rows, one row a line, {"data": [rows]}, rows by video
              ({"a.mp4": [rows]}), columns by name as pandas writes them; rows
              with a list of questions inside
    parquet

What a file is is read from its content and not from its name.
"""

import codecs
import csv
import gzip
import io
import json
import pathlib
import re
import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hourjax import schema
from hourjax.data.prepare import question_tables
from hourjax.data.prepare.question_tables import Columns
from hourjax.data.records import json_stream
from hourjax.data.records.record import TURNS
from hourjax.errors import UserError
from hourjax.finetuning.cells import plain_name

_MOST_BYTES = 2 * 2**30  # of a file, which is read as a whole
_SHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
# Keys that hold the questions about one video.
_LISTS = ("questions", "qa", "qas", "qa_pairs", "qa_list", "question_answers")
_TOP = ("data", "rows", "records", "annotations", "items", "test", *_LISTS)
# Bytes of other alphabets come in rows; é or a typographic quote stands alone.
_FOREIGN = re.compile(rb"[\x80-\xff]{4}")


# Usual names of columns, by role, beside those of `question_tables.NAMES`; the
# first that is there counts.
_NAMES = {
  "video": "videos file file_name filename video_filename clip clip_name"
  " clip_id videoid video_url youtube_id path url media id name",
  "question": "questions question_text query_text text input problem",
  "answer": "answers ans correct correct_option correct_choice right_answer"
  " answer_text gold gold_answer correct_answers target label output"
  " answer_letter answer_idx answer_index correct_idx correct_index"
  " correct_answer_index answer_key key",
  "options": "multiple_choice answer_options answer_choices possible_answers",
  "start": "start start_time start_sec start_seconds start_s t_start begin from"
  " time_start start_timestamp",
  "end": "end end_time end_sec end_seconds end_s t_end stop to time_end"
  " end_timestamp",
  "time": "timestamp time time_stamp timestamps segment interval time_range",
  "split": "split subset partition fold set",
}


class Rows(NamedTuple):
  """Holds the rows of a file.

  Attributes:
    path: of the file.
    rows: the place of each row, for messages, and the row: a dict, or the
      reason why it is none.
    notes: sentences on how the file was read.
  """

  path: pathlib.Path
  rows: list[tuple[str, dict[str, Any] | UserError]]
  notes: list[str]


def read(path: str | pathlib.Path) -> Rows:
  """Reads all rows of a file of questions.

  Args:
    path: of the file.

  Raises:
    UserError: the file cannot be read, is of another kind, or has no rows.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() in _SHEETS:
    raise UserError(
      f"{path} is a spreadsheet; save it as CSV (UTF-8) and give that file"
    )
  notes: list[str] = []
  if path.suffix.lower() == ".parquet":
    found = enumerate(question_tables.read_rows(path), start=1)
    rows = [(f"{path.name}, row {number}", row) for number, row in found]
  else:
    text = _decoded(path, notes)
    if not text.strip():
      raise UserError(f"{path} is empty; give a file of questions")
    if text.lstrip()[0] == "<":
      raise UserError(f"{path} is a web page or XML; fetch the table itself")
    is_json = text.lstrip()[0] in "[{"
    rows = list((_json_rows if is_json else _csv_rows)(text, path))
  rows = [(where, row) for where, row in rows if not _is_blank(row)]
  if not rows:
    raise UserError(f"{path} has no rows below its first line; add questions")
  return Rows(path, rows, notes)


def find_columns(
  rows: Sequence[Mapping[str, Any]], given: Columns, of: pathlib.Path
) -> Columns:
  """Finds the columns of each role.

  Args:
    rows: of a table, whose columns may differ.
    given: columns that the user has named, by role.
    of: the file, for messages.

  Returns:
    Names of columns by role; "options" may have several, in their order.

  Raises:
    UserError: a named column is missing, or video, question or answer has none.
  """
  columns = list(dict.fromkeys(name for row in rows for name in row))
  plain = {plain_name(name): name for name in reversed(columns)}
  listing = f"its columns are {', '.join(map(repr, columns))}"
  found: dict[str, tuple[str, ...]] = {}
  for role, names in given.items():
    found[role] = tuple(plain.get(plain_name(name), "") for name in names)
    if "" in found[role]:
      raise UserError(
        f"{of}: no column {names[found[role].index('')]!r}, which"
        f" --columns names; {listing}"
      )
  several = _option_columns(plain)
  taken = {name for names in found.values() for name in names} | {*several}
  for role in {**question_tables.NAMES, **_NAMES}:
    names = f"{question_tables.NAMES.get(role, '')} {_NAMES.get(role, '')}"
    for name in names.split():
      if role not in found and plain.get(name) not in (None, *taken):
        found[role] = (plain[name],)
        taken.add(plain[name])
  if "options" not in given and several:
    found["options"] = several
  for role in question_tables.REQUIRED:
    if role not in found:
      raise UserError(
        f"{of}: no column for the {role}; {listing}. The first line must"
        f" name the columns; if it does, say which it is, as in"
        f" --columns={role}={columns[0] if columns else 'NAME'}"
      )
  return found


def _option_columns(plain: Mapping[str, str]) -> tuple[str, ...]:
  """Returns the columns that hold an option each: a to d, option1, choice_b."""
  marks = (string.digits, string.digits[1:], string.ascii_lowercase[:10])
  for start in (
    "option",
    "option_",
    "choice",
    "choice_",
    "opt",
    "opt_",
    "answer_",
    "",
  ):
    for names in marks if start else marks[2:]:
      found = [plain[f"{start}{m}"] for m in names if f"{start}{m}" in plain]
      whole = f"{start}{names[0]}" in plain and f"{start}{names[1]}" in plain
      if whole and found:
        return tuple(found)
  return ()


def _is_blank(row: Any) -> bool:
  """Returns whether a row has nothing in any cell, as spreadsheets leave it."""
  return isinstance(row, Mapping) and not any(
    value is not None and str(value).strip() for value in row.values()
  )


def _decoded(path: pathlib.Path, notes: list[str]) -> str:
  """Returns the text of a file; notes how it was encoded, if not in UTF-8."""
  if not path.exists():
    raise UserError(f"{path} does not exist; correct --questions")
  if path.is_dir():
    raise UserError(f"{path} is a folder; give the file of the questions")
  content = schema.read_bytes(
    path, remedy="correct --questions", most=_MOST_BYTES
  )
  if content.startswith(b"\x1f\x8b"):
    try:
      content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
      raise UserError(
        f"{path} cannot be unpacked ({error}); fetch it again"
      ) from None
  if content.startswith(b"PK\x03\x04"):
    raise UserError(
      f"{path} is a zip archive or a spreadsheet; save it as CSV (UTF-8) and"
      " give that file"
    )
  encoding = _encoding(content)
  try:
    text = content.decode(encoding)
  except UnicodeDecodeError as error:
    if encoding == "utf-8-sig" and not _FOREIGN.search(content):
      # What spreadsheets write as plain CSV in Western countries.
      notes.append("it is not UTF-8 and was read as Windows-1252")
      return content.decode("cp1252", errors="replace")
    raise UserError(
      f"{path} is not {encoding.removesuffix('-sig').upper()} text (byte"
      f" {error.start}); save it as UTF-8"
    ) from None
  if encoding != "utf-8-sig":
    notes.append("it is UTF-16 text")
  return text


def _encoding(content: bytes) -> str:
  """Returns UTF-16 where a mark or zero bytes say so, else UTF-8."""
  if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    return "utf-16"
  head = content[:200]
  if head.count(0) * 3 > len(head) > 3:
    return (
      "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else ("utf-16-be")
    )
  return "utf-8-sig"


def _csv_rows(
  text: str, path: pathlib.Path
) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
  """Yields the rows of a table, each with its line."""
  reader = question_tables.csv_reader(io.StringIO(text, newline=""))
  try:
    for row in reader:
      beyond = row.pop(None, None)  # cells beyond the last column
      where = f"{path.name}, line {reader.line_num}"
      if beyond and any(cell.strip() for cell in beyond):
        yield (
          where,
          UserError(
            f"{where}: {len(row) + len(beyond)} cells in {len(row)} columns;"
            " put cells that hold the delimiter into double quotes",
            kind="more cells than columns",
          ),
        )
      else:
        yield where, row
  except csv.Error as error:
    raise UserError(
      f"{path} is broken after line {reader.line_num} ({error}); a double quote"
      " may lack its partner"
    ) from None


def _json_rows(
  text: str, path: pathlib.Path
) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
  """Yields the rows of a JSON text in any of the forms of this file's head."""
  try:
    items = [
      (f"{path.name}[{number}]", item)
      for number, item in enumerate(_items(json_stream.parse(text), path))
    ]
  except json.JSONDecodeError as error:
    items = list(_lines(text, path, error))
  for where, item in items:
    if isinstance(item, Mapping):
      for row in _unnested(item):
        yield where, row
    else:
      reason = (
        str(item)
        if isinstance(item, UserError)
        else (f"{where}: expected an object, found {schema.shorten(item)}")
      )
      yield where, UserError(reason, kind="not a row")


def _lines(
  text: str, path: pathlib.Path, error: json.JSONDecodeError
) -> Iterator[tuple[str, Any]]:
  """Yields the rows of JSON lines.

  Raises:
    UserError: the first line is no object, so the file is broken JSON.
  """
  first = True
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    where = f"{path.name}, line {number}"
    try:
      item = json_stream.parse(line)
      if first and not isinstance(item, Mapping):
        raise ValueError
      yield where, item
    except ValueError as wrong:
      if first:
        raise UserError(
          f"{path} is not valid JSON ({error.msg} at line {error.lineno},"
          f" column {error.colno}); repair it there"
        ) from None
      yield where, UserError(f"{where}: not JSON ({wrong})")
    first = False


def _items(value: Any, path: pathlib.Path) -> list[Any]:
  """Returns the rows that a JSON value holds."""
  if isinstance(value, list):
    return value
  if not isinstance(value, Mapping):
    raise UserError(
      f"{path} holds {schema.shorten(value)}; expected a list of questions"
    )
  if any(isinstance(value.get(key), list) for key in TURNS) or any(
    isinstance(value.get(key), str) for key in ("question", "Question")
  ):
    return [value]
  parts = list(value.values())
  if parts and all(isinstance(part, Mapping) for part in parts):
    keys = [list(part) for part in parts]
    if (
      keys[0]
      and all(k == keys[0] for k in keys)
      and all(key.isdecimal() for key in keys[0])
    ):  # pandas: {"question": {"0": ..., "1": ...}}
      return [
        {name: part[key] for name, part in value.items()} for key in keys[0]
      ]
    return [{"video": name, **part} for name, part in value.items()]
  lists = [name for name in value if isinstance(value[name], list)]
  if len(lists) == 1 and (len(value) > 1 or lists[0].lower() in _TOP):
    return value[lists[0]]
  if lists and len(lists) == len(value):
    return [
      {"video": name, **item} if isinstance(item, Mapping) else item
      for name in lists
      for item in value[name]
    ]
  raise UserError(
    f"{path} holds an object with the keys {schema.shorten(list(value))};"
    " expected a list of questions"
  )


def _unnested(item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  """Yields a row, or one for each question of a list inside of it."""
  name = next(
    (
      key
      for key in _LISTS
      if isinstance(item.get(key), list)
      and item[key]
      and all(isinstance(one, Mapping) for one in item[key])
    ),
    None,
  )
  if name is None or any(key in item for key in TURNS):
    yield dict(item)
    return
  shared = {key: value for key, value in item.items() if key != name}
  for one in item[name]:
    yield {**shared, **one}
