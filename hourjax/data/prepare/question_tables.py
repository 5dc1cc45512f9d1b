"""Question tables: up to five rows about one video become a conversation.

Rows of one video are not adjacent, and the table does not fit in memory. So the
rows are first distributed over temporary files by a hash of their video, and
then grouped, one such file at a time. Conversations come file by file, within
one in the order in which the table first names their video, and questions keep
the order of the table:

    rows      a1 b1 a2 c1 a3 a4 a5 a6      with a, c in one file, b in another
    result    (a1 a2 a3 a4 a5) (a6) (c1)   (b1)

The result depends on the rows alone, not on how they are read.
"""

import collections
import contextlib
import csv
import hashlib
import io
import json
import math
import pathlib
import re
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from hourjax.data.records import json_stream
from hourjax.data.records.files import opened_text, stream_records
from hourjax.data.records.record import MARKER
from hourjax.errors import UserError

INSTRUCTION = "Answer with the letter."
FORMATS = ("open", "multiple_choice")

# Usual names of columns, by role; upper and lower case are the same.
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
  """Parses --columns, e.g. "video=vid,options=A+B+C+D".

  Raises:
    UserError: it has another form, or an unknown role.
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
  """Finds the columns of a table that have each role.

  Args:
    found: names of the table's columns.
    mapping: columns that the user has given, by role.
    path: path of the table, for messages.

  Returns:
    Names of columns by role.

  Raises:
    UserError: a given column is missing, or a required role has none; the
      message lists the columns and shows how to map them.
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
    # A column "a" beside b, c and d is an option, not the answer.
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
  """Reads the question of one row.

  Returns:
    {"video", "source", "duration", "human", "gpt", "facts"}: the texts of both
    turns, and facts about the question (as in the demo's records).

  Raises:
    UserError: the row lacks a video, question or answer, or its answer is none
      of its options; `kind` says which.
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
  """Returns a cell as text, "" if it is empty."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return ""
  return str(value).strip()


def _number(text: str) -> float | None:
  """Returns a positive number, None for anything else."""
  try:
    value = float(text)
  except ValueError:
    return None
  return value if 0 < value < math.inf else None


def _options(cells: list[Any]) -> dict[str, str]:
  """Returns options by letter, from several columns or from one.

  One column may hold a list, a dict, JSON text of either, or lines.
  """
  value = cells[0] if len(cells) == 1 else [c for c in cells if _text(c)]
  if isinstance(value, str):
    try:
      value = json_stream.parse(value)
    except json.JSONDecodeError:
      value = value.splitlines()
  if isinstance(value, Mapping):
    # Parquet returns all keys of the column's type, absent ones as None.
    value = [value[key] for key in sorted(value)]
  if not isinstance(value, list):
    return {}
  texts = [_text(option) for option in value if _text(option)]
  letters = string.ascii_uppercase[: len(texts)]
  labels = [_LABEL.match(text) for text in texts]
  if texts and all(
    m and m[1].upper() == letter for m, letter in zip(labels, letters)
  ):
    texts = [_LABEL.sub("", text, count=1) for text in texts]
  return dict(zip(letters, texts))


def _letter(answer: str, options: Mapping[str, str]) -> str:
  """Returns the letter that "B", "(b)", "B. a cat" or "a cat" means."""
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


TURNS = 5  # most questions of a conversation
FILES = 128  # temporary files that the rows are distributed over
_ROWS = 4096  # rows of a parquet file that are read at a time
_CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_DELIMITERS = ",;\t|"  # the first one wins a tie

Skip = Callable[[str, UserError], None]


class QuestionTable:
  """Makes conversations of one question table in one or more files."""

  def __init__(
    self,
    paths: Sequence[pathlib.Path],
    mapping: Columns,
    scratch: pathlib.Path,
    *,
    skip: Skip,
    step: Callable[[int], Any],
  ):
    """Distributes all rows over temporary files.

    Args:
      paths: .parquet, .csv or .tsv, .jsonl, or a JSON list by any other name;
        text may be packed with gzip.
      mapping: columns that the user has given, by role.
      scratch: folder to create, which takes as many bytes as the questions;
        `close` removes it.
      skip: called with the place of a row that is left out, and the reason.
      step: called with the number of rows read since the last call.

    Raises:
      UserError: a file cannot be read or lacks columns, or there is no space.
    """
    self._scratch = scratch
    self._counts: collections.Counter[tuple] = collections.Counter()
    try:
      scratch.mkdir(parents=True)
      with contextlib.ExitStack() as stack:
        files = [
          stack.enter_context(open(self._file(i), "w", encoding="utf-8"))
          for i in range(FILES)
        ]
        for path in paths:
          self._distribute(path, mapping, files, skip, step)
    except OSError as error:
      raise UserError(
        f"cannot write {scratch}: {error.strerror}; its disk needs as much"
        " space as all questions take"
      ) from error

  def __len__(self) -> int:
    return sum(-(-count // TURNS) for count in self._counts.values())

  def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, raw record)."""
    for number in range(FILES):
      # Rows stay text until they are used: parsed, they take ten times the
      # memory.
      groups: dict[bytes, list[bytes]] = {}
      with open(self._file(number), "rb") as file:
        for line in file:
          video, _, row = line.partition(b"\t")
          groups.setdefault(video, []).append(row)
      for rows in groups.values():
        yield from conversations([json.loads(row) for row in rows])

  def close(self) -> None:
    """Removes the temporary files."""
    for number in range(FILES):
      self._file(number).unlink(missing_ok=True)
    self._scratch.rmdir()

  def _file(self, number: int) -> pathlib.Path:
    return self._scratch / f"{number:03}.jsonl"

  def _distribute(
    self,
    path: pathlib.Path,
    mapping: Columns,
    files: Sequence[TextIO],
    skip: Skip,
    step: Callable[[int], Any],
  ) -> None:
    """Writes the questions of one file into the temporary files."""
    columns = None
    for number, row in enumerate(read_rows(path), start=1):
      where = f"{path}, row {number}"
      step(1)
      if not isinstance(row, dict):
        reason = row if isinstance(row, Exception) else type(row).__name__
        skip(where, UserError(f"not a row ({reason})", kind="not a row"))
        continue
      if columns is None:
        columns = find_columns(list(row), mapping, path)
      try:
        question = read_row(row, columns)
      except UserError as error:
        skip(where, error)
        continue
      self._counts[_video(question)] += 1
      # JSON escapes line breaks, so that one row stays one line.
      video = json.dumps(_video(question))
      line = json.dumps(question | {"where": where})
      files[_bucket(question)].write(f"{video}\t{line}\n")


def read_rows(path: pathlib.Path) -> Iterator[Any]:
  """Yields the rows of a table, each a dict of its columns.

  A broken line of JSONL yields its error.

  Raises:
    UserError: the file cannot be read.
  """
  name = path.name.lower()
  try:
    if name.endswith(".parquet"):
      # With pre_buffer, everything that was read stays in memory.
      with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as table:
        for batch in table.iter_batches(_ROWS):
          yield from batch.to_pylist()
    elif name.endswith(_CSV):
      yield from _csv_rows(path)
    else:
      yield from (raw for _, raw in stream_records(path))
  except pyarrow.ArrowException as error:
    raise UserError(
      f"{path} cannot be read as a table ({error}); fetch it again"
    ) from error
  except OSError as error:
    reason = error.strerror or str(error)
    raise UserError(f"cannot read {path}: {reason}") from error


def _csv_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the rows of a table in text, whatever its delimiter."""
  with opened_text(path) as packed:
    file = io.TextIOWrapper(packed, encoding="utf-8-sig", newline="")
    number, reader = 0, None  # number of the last line that could be read
    try:
      reader = csv_reader(file)
      for row in reader:
        row.pop(None, None)  # cells beyond the last column
        yield row
        number = reader.line_num
    except csv.Error as error:
      line = reader.line_num if reader else 0
      raise UserError(
        f"{path} is broken after line {line} ({error}); repair it"
      ) from error
    except UnicodeDecodeError as error:
      byte = error.object[error.start]
      raise UserError(
        f"{path} is not UTF-8 text (byte 0x{byte:02x}, after line {number});"
        " it may be Latin-1 or Windows-1252, as Excel's plain CSV is: save it"
        " as UTF-8, for example `iconv -f WINDOWS-1252 -t UTF-8`"
      ) from error


def csv_reader(file: io.TextIOBase) -> csv.DictReader:
  """Returns a reader of the rows of a table, from the start of its text.

  Args:
    file: opened without translation of line ends. A first line such as "sep=;"
      names the delimiter; else it is the one that splits the head most often.
  """
  csv.field_size_limit(sys.maxsize)
  head = file.readline()
  named = re.fullmatch(r"(?i)sep=.[\r\n]*", head)
  delimiter = head[4] if named else _delimiter(head)
  if not named:
    file.seek(0)
  return csv.DictReader(file, strict=True, delimiter=delimiter)


def _delimiter(head: str) -> str:
  """Returns the delimiter that splits the head into the most columns.

  Excel writes semicolons in countries where the comma marks decimals.
  """

  def columns(delimiter: str) -> int:
    try:
      return len(next(csv.reader([head], strict=True, delimiter=delimiter), []))
    except csv.Error:
      return 0

  return max(_DELIMITERS, key=columns)


def _video(question: dict[str, Any]) -> tuple[str, str]:
  """Returns source and name, since two sources may use the same name."""
  return question["source"], question["video"]


def _bucket(question: dict[str, Any]) -> int:
  """Returns the number of the temporary file of a question's video."""
  name = "/".join(_video(question)).encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(name).digest()[:4]) % FILES


def conversations(
  rows: Sequence[dict[str, Any]],
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, raw record) of the conversations about one video.

  Args:
    rows: questions of `read_row`, each with its place as "where".
  """
  source, video = _video(rows[0])
  name = f"{source}/{video}" if source else video
  duration = next((row["duration"] for row in rows if row["duration"]), None)
  for number in range(-(-len(rows) // TURNS)):
    part = rows[number * TURNS : (number + 1) * TURNS]
    turns = []
    for i, row in enumerate(part):
      mark = f"{MARKER}\n" if i == 0 else ""
      turns.append({"from": "human", "value": mark + row["human"]})
      turns.append({"from": "gpt", "value": row["gpt"]})
    raw: dict[str, Any] = {
      "id": f"{name}#{number}",
      "video": video,
      "data_source": source,
      "conversations": turns,
      "questions": [row["facts"] for row in part],
    }
    if duration is not None:
      raw["duration"] = duration
    yield part[0]["where"], raw
