"""JSON lists of any length, one item at a time, and JSON values as records have
them.

A list is cut at its items' brackets by a regular expression, and each item is
parsed alone: memory holds one item, and a list is read like a file of lines.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

DEPTH = 64  # of nested lists and objects; no record has more
MOST = 1 << 26  # bytes of the longest item

_BLOCK = 1 << 16  # bytes read at a time
_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# Everything up to the next bracket outside of strings, and the bracket.
_BRACKET = re.compile(
  rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+([{}\[\]])", re.DOTALL
)
_SCALAR = re.compile(_STRING + rb'|[^"{}\[\],: \t\r\n]++', re.DOTALL)


class BrokenJson(ValueError):
  """JSON that ends early or cannot be read.

  Attributes:
    reason: in words.
    byte: of the file, where it shows.
  """

  def __init__(self, reason: str, byte: int):
    super().__init__(f"{reason} at byte {byte}")
    self.reason, self.byte = reason, byte


def parse(text: str) -> Any:
  """Parses one JSON value.

  NaN, Infinity and numbers beyond them are what programs write for a value
  that is missing, and become None.

  Raises:
    json.JSONDecodeError: no JSON, or nested deeper than DEPTH.
  """
  try:
    value = _DECODER.decode(text)
  except RecursionError:
    raise json.JSONDecodeError("nested too deep", "", 0) from None
  if text.count("[") + text.count("{") > DEPTH and _depth(value) > DEPTH:
    raise json.JSONDecodeError("nested too deep", "", 0)
  return value


def stream_list(file: BinaryIO, start: int) -> Iterator[tuple[str, Any]]:
  """Reads a JSON list, or an object of which one key holds the list.

  Args:
    file: bytes, at `start`.
    start: of the JSON in the file.

  Yields:
    (key of the list or "", item), in order.

  Raises:
    BrokenJson: where the reading stops.
    UnicodeDecodeError: its `start` counts from the beginning of the file.
    KeyError: an object with no list or several; the argument is
      {key: whether it holds a list}.
  """
  scan = _Scanner(file, start)
  try:
    if scan.peek() == b"{":
      yield from _in_object(scan)
    else:
      yield from (("", item) for item in _items(scan))
  except BrokenJson:
    scan.check_utf8()  # what is no text at all is told first
    raise
  if scan.peek():
    raise BrokenJson("something follows the end of the JSON", scan.byte)


def _in_object(scan: "_Scanner") -> Iterator[tuple[str, Any]]:
  keys: dict[str, bool] = {}
  scan.take(b"{")
  while scan.peek() != b"}":
    if keys:
      scan.take(b",")
    if scan.peek() != b'"':
      raise BrokenJson("expected a key in quotes", scan.byte)
    key = scan.value()
    scan.take(b":")
    keys[key] = scan.peek() == b"["
    if sum(keys.values()) > 1:
      raise KeyError(keys)
    if keys[key]:
      yield from ((key, item) for item in _items(scan))
    else:
      scan.value()
  scan.take(b"}")
  if not any(keys.values()):
    raise KeyError(keys)


def _items(scan: "_Scanner") -> Iterator[Any]:
  scan.take(b"[")
  first = True
  while scan.peek() != b"]":
    if not first:
      scan.take(b",")
      if scan.peek() == b"]":
        raise BrokenJson("a comma before the closing bracket", scan.byte)
    yield scan.value()
    first = False
  scan.take(b"]")


class _Scanner:
  """A place in a file of JSON."""

  def __init__(self, file: BinaryIO, start: int):
    self._file, self._base = file, start
    self._buffer, self._at = b"", 0

  @property
  def byte(self) -> int:
    """Of the file, where the scanner is."""
    return self._base + self._at

  def peek(self) -> bytes:
    """The next byte that is no space, b"" at the end."""
    while True:
      self._at = _SPACE.match(self._buffer, self._at).end()
      if self._at < len(self._buffer) or not self._fill():
        return self._buffer[self._at : self._at + 1]

  def take(self, wanted: bytes) -> None:
    """Goes past the next byte, which must be this one."""
    found = self.peek()
    if found != wanted:
      found = repr(found.decode("latin-1")) if found else "the end of the file"
      raise BrokenJson(f"expected {wanted.decode()!r}, not {found}", self.byte)
    self._at += 1

  def value(self) -> Any:
    """Parses the next value."""
    first = self.peek()
    size = self._nested() if first in (b"{", b"[") else self._scalar()
    text, begin = self._buffer[self._at : self._at + size], self.byte
    self._at += size
    try:
      return parse(text.decode())
    except UnicodeDecodeError as error:
      error.start += begin
      raise
    except json.JSONDecodeError as error:
      reason = f"{error.msg} at character {error.pos} of what ends"
      raise BrokenJson(reason, self.byte) from error

  def check_utf8(self) -> None:
    """Raises UnicodeDecodeError if what is in memory is no UTF-8."""
    try:
      self._buffer[self._at :].decode()
    except UnicodeDecodeError as error:
      if error.end == len(self._buffer) - self._at and self._fill():
        return self.check_utf8()  # a block cuts the character
      error.start += self.byte
      raise

  def _nested(self) -> int:
    """Bytes up to the bracket that closes the one here."""
    depth, at = 0, self._at
    while True:
      match = _BRACKET.match(self._buffer, at)
      if match is None:
        before = self._at
        if not self._fill():
          end = self._base + len(self._buffer)
          raise BrokenJson("the file ends within a value", end)
        at += self._at - before
        continue
      depth += 1 if match[1] in b"{[" else -1
      at = match.end()
      if not depth:
        return at - self._at

  def _scalar(self) -> int:
    """Bytes of a string, a number or a word."""
    while True:
      match = _SCALAR.match(self._buffer, self._at)
      # A number or word may go on in the next block.
      if match and match.end() < len(self._buffer):
        return match.end() - self._at
      if not self._fill():
        if match:
          return match.end() - self._at
        raise BrokenJson("expected a value", self.byte)
      if len(self._buffer) - self._at > 1 and not (
        self._buffer[self._at : self._at + 1] == b'"'
        or _SCALAR.match(self._buffer, self._at)
      ):
        raise BrokenJson("expected a value", self.byte)

  def _fill(self) -> bool:
    """Reads on; what lies behind is forgotten. False at the end."""
    pending = len(self._buffer) - self._at
    if pending > MOST:
      raise BrokenJson(f"a value of more than {MOST >> 20} MiB", self.byte)
    # As much again as is there: a long value is looked at only twice.
    block = self._file.read(max(_BLOCK, pending))
    self._buffer = self._buffer[self._at :] + block
    self._base, self._at = self._base + self._at, 0
    return bool(block)


def _finite(text: str) -> float | None:
  value = float(text)
  return value if math.isfinite(value) else None


def _integer(text: str) -> int | None:
  # Python parses no more digits; and an integer nobody can print is no value.
  return int(text) if len(text) < 4300 else None


_DECODER = json.JSONDecoder(
  parse_constant=lambda name: None, parse_float=_finite, parse_int=_integer
)


def _depth(value: Any) -> int:
  depth, level = 0, [value]
  while level := [part for part in level if isinstance(part, dict | list)]:
    depth += 1
    level = [
      inner
      for part in level
      for inner in (part.values() if isinstance(part, dict) else part)
    ]
  return depth
