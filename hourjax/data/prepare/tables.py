"""A table of questions: up to five about one video become a conversation.

Rows of one video are not adjacent, and the table does not fit in memory. So
rows are dealt into files by a hash of their video, and then one such file at
a time is grouped. Conversations come file by file; within one in the order in
which the table first names their video; questions keep the table's order:

    rows      a1 b1 a2 c1 a3 a4 a5 a6      and a, c in one file, b in another
    result    (a1 a2 a3 a4 a5) (a6) (c1)   (b1)

The result depends on the rows alone, not on how they are read.
"""

import collections
import contextlib
import csv
import hashlib
import io
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from hourjax.data.prepare import questions
from hourjax.data.record_files import opened_text, stream_records
from hourjax.data.records import MARKER
from hourjax.errors import UserError

TURNS = 5  # questions a conversation
FILES = 128
_ROWS = 4096  # of a parquet file, read at a time
_CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_DELIMITERS = ",;\t|"  # of equals the first counts

Skip = Callable[[str, UserError], None]


class QuestionTable:
  """The conversations of one question table in one or more files."""

  def __init__(
    self,
    paths: Sequence[pathlib.Path],
    mapping: questions.Columns,
    scratch: pathlib.Path,
    *,
    skip: Skip,
    step: Callable[[int], Any],
  ):
    """Deals all rows into files.

    Args:
      paths: .parquet, .csv or .tsv, .jsonl, or a JSON list by any other name;
        text may be packed with gzip.
      mapping: columns that the user has mapped.
      scratch: folder that does not exist, for as many bytes as the questions
        have; `close` removes it.
      skip: called with the place of a row that is left out and the reason.
      step: called with a number of rows that have been read.

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
          self._deal(path, mapping, files, skip, step)
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
      # Unparsed, a file takes a tenth of the memory.
      groups: dict[bytes, list[bytes]] = {}
      with open(self._file(number), "rb") as file:
        for line in file:
          video, _, row = line.partition(b"\t")
          groups.setdefault(video, []).append(row)
      for rows in groups.values():
        yield from _conversations([json.loads(row) for row in rows])

  def close(self) -> None:
    """Removes the files."""
    for number in range(FILES):
      self._file(number).unlink(missing_ok=True)
    self._scratch.rmdir()

  def _file(self, number: int) -> pathlib.Path:
    return self._scratch / f"{number:03}.jsonl"

  def _deal(self, path, mapping, files, skip, step) -> None:
    columns = None
    for number, row in enumerate(read_rows(path), start=1):
      where = f"{path}, row {number}"
      step(1)
      if not isinstance(row, dict):
        reason = row if isinstance(row, Exception) else type(row).__name__
        skip(where, UserError(f"not a row ({reason})", kind="not a row"))
        continue
      if columns is None:
        columns = questions.find_columns(list(row), mapping, path)
      try:
        question = questions.read_row(row, columns)
      except UserError as error:
        skip(where, error)
        continue
      self._counts[_video(question)] += 1
      # Escaped, so that no odd character of a text can break a line.
      video = json.dumps(_video(question))
      line = json.dumps(question | {"where": where})
      files[_bucket(question)].write(f"{video}\t{line}\n")


def read_rows(path: pathlib.Path) -> Iterator[Any]:
  """Yields the rows of a table, each a dict of its columns.

  A broken line of JSONL gives its error.

  Raises:
    UserError: the file cannot be read.
  """
  name = path.name.lower()
  try:
    if name.endswith(".parquet"):
      # With pre_buffer, all that has been read stays in memory.
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
  csv.field_size_limit(sys.maxsize)
  with opened_text(path) as packed:
    file = io.TextIOWrapper(packed, encoding="utf-8-sig", newline="")
    number = 0
    try:
      head = file.readline()
      named = re.fullmatch(r"(?i)sep=.[\r\n]*", head)
      delimiter = head[4] if named else _delimiter(head)
      if not named:
        file.seek(0)
      reader = csv.DictReader(file, strict=True, delimiter=delimiter)
      for row in reader:
        row.pop(None, None)  # cells beyond the last column
        yield row
        number = reader.line_num
    except csv.Error as error:
      raise UserError(
        f"{path} is broken after line {reader.line_num} ({error}); repair it"
      ) from error
    except UnicodeDecodeError as error:
      byte = error.object[error.start]
      raise UserError(
        f"{path} is not UTF-8 text (byte 0x{byte:02x}, after line {number});"
        " it may be Latin-1 or Windows-1252, as Excel's plain CSV is: save it"
        " as UTF-8, for example `iconv -f WINDOWS-1252 -t UTF-8`"
      ) from error


def _delimiter(head: str) -> str:
  """What parts a table's columns: the one that gives the most of them.

  Excel writes semicolons where the comma is for decimals.
  """

  def columns(delimiter: str) -> int:
    try:
      return len(next(csv.reader([head], strict=True, delimiter=delimiter), []))
    except csv.Error:
      return 0

  return max(_DELIMITERS, key=columns)


def _video(question: dict[str, Any]) -> tuple[str, str]:
  """What tells videos apart: two sources may use the same file name."""
  return question["source"], question["video"]


def _bucket(question: dict[str, Any]) -> int:
  name = "/".join(_video(question)).encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(name).digest()[:4]) % FILES


def _conversations(rows) -> Iterator[tuple[str, dict[str, Any]]]:
  source, video = _video(rows[0])
  name = f"{source}/{video}" if source else video
  duration = next((row["duration"] for row in rows if row["duration"]), None)
  for number in range(-(-len(rows) // TURNS)):
    part = rows[number * TURNS : (number + 1) * TURNS]
    talk = []
    for i, row in enumerate(part):
      mark = f"{MARKER}\n" if i == 0 else ""
      talk.append({"from": "human", "value": mark + row["human"]})
      talk.append({"from": "gpt", "value": row["gpt"]})
    raw = {"id": f"{name}#{number}", "video": video, "data_source": source}
    raw["conversations"] = talk
    raw["questions"] = [row["facts"] for row in part]
    if duration is not None:
      raw["duration"] = duration
    yield part[0]["where"], raw
