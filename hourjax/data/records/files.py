"""Files of records, read as a stream so that memory does not grow with them."""

import codecs
import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any

from hourjax.data.records import json_stream
from hourjax.data.records.record import TURNS, Record, Skipped, parse_record
from hourjax.errors import UserError

_BLOCK = 1 << 16  # bytes read at a time to find the first that is no space
_LINE = json_stream.MOST  # bytes of the longest line that counts as one record
_SPACE = b" \t\r\n"
_KINDS = {b'"': "str", b"t": "bool", b"f": "bool", b"n": "null"}
_PACKED = {
  b"PK\x03\x04": "a zip archive",
  b"\xfd7zXZ": "packed with xz",
  b"BZh": "packed with bzip2",
  b"\x28\xb5\x2f\xfd": "packed with zstd",
  b"7z\xbc\xaf": "a 7z archive",
  b"PAR1": "a parquet file; name it .parquet",
}
_GZIP = b"\x1f\x8b"


def stream_records(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Reads a file of records: `.jsonl` line by line, others as one JSON list.

  A file whose first two lines hold an object each is read as `.jsonl`, whatever
  its name. The list may be the only one in an object, as in {"data": [...]}.
  Both kinds may be packed with gzip (`.json.gz`). NaN and Infinity are read as
  null.

  Yields:
    (place, record as read), in file order. A broken line of a `.jsonl` file
    gives its json.JSONDecodeError instead, and reading goes on behind it.

  Raises:
    UserError: the file cannot be read, is not UTF-8, or is not a list of
      records. If a list breaks in the middle, the records before that byte are
      yielded first.
  """
  path = Path(path)
  with opened_text(path) as file:
    if not _first_byte(file):
      raise UserError(f"{path} is empty; expected a JSON list or JSONL")
    lines = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    lines = lines or _has_records_on_lines(file)
    yield from _lines(path, file) if lines else _list(path, file)


@contextlib.contextmanager
def opened_text(path: Path) -> Iterator[BufferedReader | gzip.GzipFile]:
  """Opens a text file, and unpacks it if it is packed with gzip.

  Raises:
    UserError: it cannot be read, is packed otherwise, or its first bytes are
      those of another kind of file.
  """
  try:
    if path.exists() and not path.is_dir() and not path.is_file():
      raise UserError(f"{path} is no regular file; give a file")
    with contextlib.ExitStack() as stack:
      file = stack.enter_context(open(path, "rb"))
      head = file.read(64)
      file.seek(0)
      _check_head(path, head)
      if head.startswith(_GZIP):
        yield stack.enter_context(gzip.open(file))
      else:
        yield file
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise UserError(
      f"{path} cannot be unpacked ({error}); fetch it again"
    ) from error
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror or error}") from error
  except UnicodeDecodeError as error:
    raise not_utf8(path, error.start, error) from error


def read_records(
  path: str | os.PathLike, *, require_answer: bool = True
) -> tuple[list[Record], list[Skipped]]:
  """Reads and checks a whole file of records, as `stream_records` does.

  Args:
    path: of the file.
    require_answer: whether a record without an answer is refused.

  Returns:
    The good records in file order, and the bad ones with the reason.

  Raises:
    UserError: the file cannot be read, or is not a list of records.
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


def _list(path: Path, file: BufferedIOBase) -> Iterator[tuple[str, Any]]:
  """Reads a file as one JSON list, with messages for other contents."""
  first = _first_byte(file)
  if first in _KINDS or first.isdigit():
    raise UserError(
      f"{path} holds {_KINDS.get(first, 'a number')}, not a list of records; "
      "wrap the records in [...], or write one a line and name the file .jsonl"
    )
  if first == b"<":
    raise UserError(
      f"{path} is a web page or XML, not JSON; fetch the file itself"
    )
  start, count = _skip_mark(file), 0
  try:
    for key, raw in json_stream.stream_list(file, start):
      if key in TURNS:  # the whole file is one record
        raise KeyError({key: True})
      yield f"{path}[{count}]", raw
      count += 1
  except KeyError as error:
    raise UserError(_which_list(path, error.args[0])) from None
  except json_stream.BrokenJson as error:
    raise UserError(
      f"{path} is not valid JSON ({error.reason}, at byte {error.byte} after"
      f" {count} whole records); fetch it again or repair it there; if it holds"
      " one record a line, name it .jsonl"
    ) from error


def _has_records_on_lines(file: BufferedIOBase) -> bool:
  """Returns whether the first two lines are, or begin, an object each."""
  _skip_mark(file)
  first = file.readline(_LINE).strip(_SPACE)
  if not (first.startswith(b"{") and first.endswith(b"}")):
    return False
  with contextlib.suppress(ValueError):
    json_stream.parse(first.decode())
    return file.readline(_BLOCK).lstrip(_SPACE).startswith(b"{")
  return False


def _which_list(path: Path, keys: dict[str, bool]) -> str:
  """Returns the message about an object that holds no list, or several."""
  one = set(keys).intersection((*TURNS, "image", "video"))
  lists = [key for key, is_list in keys.items() if is_list and not one]
  named = ", ".join(map(repr, (lists or list(keys))[:8])) or "none"
  if lists:
    return (
      f"{path} holds several lists ({named}); save the records' list in a file"
      " of its own"
    )
  what = "one record" if one else f"an object without a list (keys {named})"
  return (
    f"{path} holds {what}, not a list of records; wrap the records in [...],"
    " or write one a line and name the file .jsonl"
  )


def _lines(path: Path, file: BufferedIOBase) -> Iterator[tuple[str, Any]]:
  """Reads a file with one record a line."""
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
      raise not_utf8(path, offset + error.start, error) from error
    offset += len(line)
    if not text.strip():
      continue
    filled += 1
    try:
      raw = json_stream.parse(text)
    except json.JSONDecodeError as error:
      raw = error
    objects += isinstance(raw, dict)
    yield f"{path}:{number}", raw
  if not objects:
    raise UserError(
      f"{path}: none of its {filled} lines is a JSON record; if it holds "
      "one JSON list, name it .json"
    )


def _skip_mark(file: BufferedIOBase) -> int:
  """Seeks to the text behind a byte order mark, and returns its offset."""
  file.seek(0)
  marked = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
  return file.seek(len(codecs.BOM_UTF8) if marked else 0)


def _first_byte(file: BufferedIOBase) -> bytes:
  """Returns the first byte that is no space, or b""."""
  _skip_mark(file)
  while block := file.read(_BLOCK):
    if text := block.lstrip(_SPACE):
      return text[:1]
  return b""


def _check_head(path: Path, head: bytes) -> None:
  """Refuses files of another kind by their first bytes."""
  if head.startswith(b"version https://git-lfs"):
    raise UserError(
      f"{path} is a Git-LFS pointer, not the file itself; fetch it with `git"
      " lfs pull`, or download it again"
    )
  for mark, kind in _PACKED.items():
    if head.startswith(mark):
      raise UserError(f"{path} is {kind}; unpack it")
  if len(head) == 64 and not any(head):
    raise UserError(
      f"{path} starts with zeros, as a download does that was broken off;"
      " fetch it again"
    )
  wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
  if wide or (len(head) > 3 and 0 in head[:2] and head.count(0) > 1):
    raise UserError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8")


def not_utf8(path: Path, byte: int, error: UnicodeDecodeError) -> UserError:
  """Returns the error of a file with a byte that is not UTF-8.

  Args:
    path: of the file.
    byte: its offset in the file.
    error: as the decoder raised it.
  """
  return UserError(
    f"{path} is not UTF-8 text (byte {byte}: {error.reason}); save it as UTF-8,"
    " or fetch it again if it should be"
  )
