"""Files of records, read as a stream: memory does not grow with the file."""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from hourjax.data.records import Record, Skipped, parse_record
from hourjax.errors import UserError

_JSON = ijson.get_backend("yajl2_c")
_BLOCK = 1 << 16  # bytes parsed at a time
_LINE = 1 << 26  # bytes of the longest line that counts as one record
_SPACE = b" \t\r\n"
_KINDS = {b"{": "dict", b'"': "str", b"t": "bool", b"f": "bool", b"n": "null"}


def stream_records(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Reads a `.jsonl` file, or any other name as one JSON list.

  Yields:
    (place, record as read), in file order. A broken line of a `.jsonl` file
    gives its json.JSONDecodeError instead; the lines after it are good.

  Raises:
    UserError: the file cannot be read, is not UTF-8, or is no list of records
      at all; a list that breaks in the middle raises there, with the byte,
      after all that comes before has been yielded.
  """
  path = Path(path)
  try:
    with open(path, "rb") as file:
      if not _first_byte(file):
        raise UserError(f"{path} is empty; expected a JSON list or JSONL")
      if path.suffix == ".jsonl":
        yield from _lines(path, file)
      else:
        yield from _list(path, file)
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_records(
  path: str | os.PathLike, *, require_answer: bool = True
) -> tuple[list[Record], list[Skipped]]:
  """Reads and checks a whole file of records, as `stream_records` does.

  Returns:
    The good records in file order, and the bad ones with the reason.

  Raises:
    UserError: the file cannot be read, or is no list of records at all.
  """
  records, skipped = [], []
  for where, raw in stream_records(path):
    try:
      if isinstance(raw, json.JSONDecodeError):
        raise UserError(f"{where}: not JSON ({raw})")
      records.append(parse_record(raw, where, require_answer=require_answer))
    except UserError as error:
      name = raw.get("id") if isinstance(raw, dict) else None
      skipped.append(Skipped(where if name is None else str(name), str(error)))
  return records, skipped


class _Reader:
  """Hands bytes to the parser: checks them as UTF-8 and counts them."""

  def __init__(
    self, path: Path, file: BinaryIO, single_from: int | None = None
  ):
    self.offset = _skip_mark(file)
    self._path, self._file, self._single_from = path, file, single_from
    self._decoder = codecs.getincrementaldecoder("utf-8")()

  def read(self, size: int) -> bytes:
    if self._single_from is not None and self.offset >= self._single_from:
      size = min(size, 1)
    block = self._file.read(size)
    try:
      # The decoder holds back the start of a character that a block cuts.
      pending = len(self._decoder.getstate()[0])
      self._decoder.decode(block, final=size > 0 and not block)
    except UnicodeDecodeError as error:
      byte = self.offset - pending + error.start
      raise _not_utf8(self._path, byte, error) from error
    self.offset += len(block)
    return block


def _list(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
  first = _first_byte(file)
  if first in _KINDS or first.isdigit():
    raise UserError(
      f"{path} holds {_KINDS.get(first, 'a number')}, not a list of records; "
      "wrap the records in [...], or write one a line and name the file .jsonl"
    )
  reader, count = _Reader(path, file), 0
  try:
    items = _JSON.items(reader, "item", use_float=True, buf_size=_BLOCK)
    for raw in items:
      yield f"{path}[{count}]", raw
      count += 1
  except ijson.JSONError as error:
    byte = _failing_byte(path, file, max(0, reader.offset - _BLOCK))
    reason = str(error).split("\n", 1)[0]
    raise UserError(
      f"{path} is not valid JSON ({reason}, at byte {byte} after {count} whole "
      "records); fetch it again or repair it there; if it holds one record a "
      "line, name it .jsonl"
    ) from error


def _failing_byte(path: Path, file: BinaryIO, single_from: int) -> int:
  """Parses again, the last block byte by byte: the parser names no place."""
  reader = _Reader(path, file, single_from)
  try:
    for _ in _JSON.basic_parse(reader, buf_size=_BLOCK):
      pass
  except ijson.JSONError:
    pass
  return reader.offset


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
  offset, number, filled, objects = _skip_mark(file), 0, 0, 0
  # Not str.splitlines(): JSON strings may hold U+2028 and its like.
  while line := file.readline(_LINE):
    number += 1
    if len(line) == _LINE:
      raise UserError(
        f"{path}:{number} is longer than {_LINE >> 20} MiB; if the file holds "
        "one JSON list, name it .json"
      )
    try:
      text = line.decode()
    except UnicodeDecodeError as error:
      raise _not_utf8(path, offset + error.start, error) from error
    offset += len(line)
    if not text.strip():
      continue
    filled += 1
    try:
      raw = json.loads(text)
    except json.JSONDecodeError as error:
      raw = error
    objects += isinstance(raw, dict)
    yield f"{path}:{number}", raw
  if not objects:
    raise UserError(
      f"{path}: none of its {filled} lines is a JSON record; if it holds "
      "one JSON list, name it .json"
    )


def _skip_mark(file: BinaryIO) -> int:
  """Goes to the start of the text, behind a byte order mark; its offset."""
  file.seek(0)
  marked = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
  return file.seek(len(codecs.BOM_UTF8) if marked else 0)


def _first_byte(file: BinaryIO) -> bytes:
  """The first byte that is no space, or b""."""
  _skip_mark(file)
  while block := file.read(_BLOCK):
    if text := block.lstrip(_SPACE):
      return text[:1]
  return b""


def _not_utf8(path: Path, byte: int, error: UnicodeDecodeError) -> UserError:
  return UserError(
    f"{path} is not UTF-8 text (byte {byte}: {error.reason}); expected a JSON "
    "list or JSONL"
  )
