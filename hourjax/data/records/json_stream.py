"""JSON lists of any length, read item by item, and single JSON values.

Each item is parsed separately from the text in memory. Where a block of the
file ends within an item, more is read until a regular expression finds the
bracket that closes the item. Memory holds one block or one item at a time.

The usual library for this, ijson, stops at NaN and Infinity, which pandas and
`json.dump` write for missing values.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

DEPTH = 64  # of nested lists and objects; no record has more
MOST = 1 << 26  # bytes of the longest item

_BLOCK = 1 << 18  # bytes read at a time
_SPACE = re.compile(r"[ \t\r\n]*+")
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
# Everything up to the next bracket outside of strings, and the bracket.
_BRACKET = re.compile(
  r'(?:[^"{}\[\]]++|' + _STRING + r")*+([{}\[\]])", re.DOTALL
)
_SCALAR = re.compile(_STRING + r'|[^"{}\[\],: \t\r\n]++', re.DOTALL)


class BrokenJson(ValueError):
  """Reports JSON that ends early or cannot be parsed.

  Attributes:
    reason: in words.
    byte: offset in the file at which parsing fails.
  """

  def __init__(self, reason: str, byte: int):
    super().__init__(f"{reason} at byte {byte}")
    self.reason, self.byte = reason, byte


def parse(text: str) -> Any:
  """Parses one JSON value.

  Programs write NaN and Infinity for missing values. These, and numbers beyond
  the range of floats, become None.

  Raises:
    json.JSONDecodeError: it is not JSON, or nested deeper than DEPTH.
  """
  value, end = _parse(text, _after_space(text, 0))
  if _after_space(text, end) < len(text):
    raise json.JSONDecodeError("Extra data", text, end)
  return value


def _after_space(text: str, start: int) -> int:
  """Returns the position behind the white space at `start`."""
  match = _SPACE.match(text, start)
  assert match is not None  # the pattern matches nothing too
  return match.end()


def _parse(text: str, start: int) -> tuple[Any, int]:
  """Returns the value that begins at `start`, and where it ends."""
  try:
    value, end = _DECODER.raw_decode(text, start)
  except RecursionError:
    raise json.JSONDecodeError("nested too deep", text, start) from None
  brackets = text.count("[", start, end) + text.count("{", start, end)
  if brackets > DEPTH and _depth(value) > DEPTH:
    raise json.JSONDecodeError("nested too deep", text, start)
  return value, end


def stream_list(file: BufferedIOBase, start: int) -> Iterator[tuple[str, Any]]:
  """Reads a JSON list, or an object of which one key holds the list.

  Args:
    file: binary file, at position `start`.
    start: where the JSON begins in the file, in bytes.

  Yields:
    (key of the list or "", item), in order.

  Raises:
    BrokenJson: the JSON cannot be parsed; all items before are yielded first.
    UnicodeDecodeError: its `start` counts from the beginning of the file.
    KeyError: an object has no list or several; the argument is
      {key: whether it holds a list}.
  """
  scan = _Scanner(file, start)
  if scan.peek() == "{":
    yield from _in_object(scan)
  else:
    yield from (("", item) for item in _items(scan))
  if scan.peek():
    raise BrokenJson("something follows the end of the JSON", scan.byte)


def _in_object(scan: "_Scanner") -> Iterator[tuple[str, Any]]:
  """Yields the items of the only list in an object, with its key."""
  keys: dict[str, bool] = {}
  scan.take("{")
  while scan.peek() != "}":
    if keys:
      scan.take(",")
    if scan.peek() != '"':
      raise BrokenJson("expected a key in quotes", scan.byte)
    key = scan.value()
    scan.take(":")
    keys[key] = scan.peek() == "["
    if sum(keys.values()) > 1:
      raise KeyError(keys)
    if keys[key]:
      yield from ((key, item) for item in _items(scan))
    else:
      scan.value()
  scan.take("}")
  if not any(keys.values()):
    raise KeyError(keys)


def _items(scan: "_Scanner") -> Iterator[Any]:
  """Yields the items of a list."""
  scan.take("[")
  first = True
  while scan.peek() != "]":
    if not first:
      scan.take(",")
      if scan.peek() == "]":
        raise BrokenJson("a comma before the closing bracket", scan.byte)
    yield scan.value()
    first = False
  scan.take("]")


class _Scanner:
  """Reads a JSON file token by token, and holds its present position."""

  def __init__(self, file: BufferedIOBase, start: int):
    self._file, self._base = file, start
    self._text, self._at = "", 0
    self._decoder = codecs.getincrementaldecoder("utf-8")()
    self._bad: UnicodeDecodeError | None = None

  @property
  def byte(self) -> int:
    """Returns the present position in the file, in bytes."""
    return self._base + len(self._text[: self._at].encode())

  def peek(self) -> str:
    """Returns the next character that is no space, "" at the end."""
    while True:
      self._at = _after_space(self._text, self._at)
      if self._at < len(self._text) or not self._fill():
        return self._text[self._at : self._at + 1]

  def take(self, wanted: str) -> None:
    """Moves behind the next character, which must be `wanted`."""
    found = self.peek()
    if found != wanted:
      found = repr(found) if found else "the end of the file"
      raise BrokenJson(f"expected {wanted!r}, not {found}", self.byte)
    self._at += 1

  def value(self) -> Any:
    """Parses the next value and moves behind it."""
    first = self.peek()
    try:
      value, end = _parse(self._text, self._at)
      if end < len(self._text) or first in ("{", "[", '"'):
        self._at = end
        return value
    except json.JSONDecodeError:
      pass  # broken, or not all of it has been read
    size = self._nested() if first in ("{", "[") else self._scalar()
    text = self._text[self._at : self._at + size]
    self._at += size
    try:
      return parse(text)
    except json.JSONDecodeError as error:
      reason = f"{error.msg} at character {error.pos} of what ends"
      raise BrokenJson(reason, self.byte) from error

  def _nested(self) -> int:
    """Counts the characters up to the bracket that closes the present one."""
    depth, at = 0, self._at
    while True:
      match = _BRACKET.match(self._text, at)
      if match is None:
        before = self._at
        if not self._fill():
          self._at = len(self._text)
          raise BrokenJson("the file ends within a value", self.byte)
        at += self._at - before
        continue
      depth += 1 if match[1] in "{[" else -1
      at = match.end()
      if not depth:
        return at - self._at

  def _scalar(self) -> int:
    """Counts the characters of a string, a number or a word."""
    while True:
      match = _SCALAR.match(self._text, self._at)
      # A number or word may go on in the next block.
      if match and match.end() < len(self._text):
        return match.end() - self._at
      if match is None and self._text[self._at : self._at + 1] not in ("", '"'):
        raise BrokenJson("expected a value", self.byte)
      if not self._fill():
        if match:
          return match.end() - self._at
        raise BrokenJson("expected a value", self.byte)

  def _fill(self) -> bool:
    """Reads on, and drops the text before the position; False at the end."""
    pending = len(self._text) - self._at
    if pending > MOST:
      raise BrokenJson(f"a value of more than {MOST >> 20} MiB", self.byte)
    if self._bad:
      raise self._bad
    self._base = self.byte
    self._text, self._at = self._text[self._at :], 0
    # Doubled each time, so that a long value is scanned only twice.
    block = self._file.read(max(_BLOCK, pending))
    try:
      self._text += self._decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
      # The text before the bad byte is parsed first.
      self._text += error.object[: error.start].decode()
      error.start = self._base + len(self._text.encode())
      self._bad = error
    return bool(block) or self._bad is not None


def _finite(text: str) -> float | None:
  """Parses a float, None beyond the range of floats."""
  value = float(text)
  return value if math.isfinite(value) else None


def _integer(text: str) -> int | None:
  """Parses an integer, None if it has more digits than Python parses."""
  return int(text) if len(text) < 4300 else None


_DECODER = json.JSONDecoder(
  parse_constant=lambda name: None, parse_float=_finite, parse_int=_integer
)


def _depth(value: Any) -> int:
  """Returns how deep lists and objects are nested."""
  depth, level = 0, [value]
  while level := [part for part in level if isinstance(part, dict | list)]:
    depth += 1
    level = [
      inner
      for part in level
      for inner in (part.values() if isinstance(part, dict) else part)
    ]
  return depth
