"""Validation of files that come from outside, once, when they are read.

A file is read with a bound on its size, parsed, and validated by a pydantic
schema, so that all later code may trust its types. Whatever does not fit ends
in one UserError that names the file, the field, what was found and what was
expected.
"""

import dataclasses
import json
import math
import os
import pathlib
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict
from pydantic_core import ErrorDetails

from hourjax.errors import UserError

MOST_BYTES = 64 * 2**20  # of one JSON file, unless the caller knows better
_SHOWN = 5  # problems of one file that a message lists
_LFS = b"version https://git-lfs"
Model = TypeVar("Model", bound=BaseModel)


def _check_text(value: Any) -> str:
  """Returns text that is not empty.

  Raises:
    ValueError: the value is anything else.
  """
  if isinstance(value, str) and value:
    return value
  raise ValueError("input should be text that is not empty")


# The name of a file. Python represents bytes that are not UTF-8 as lone
# surrogates, which pydantic's `str` refuses.
FileName = Annotated[Any, pydantic.AfterValidator(_check_text)]


class Schema(BaseModel):
  """Describes a JSON object of a file from outside.

  Values keep their JSON types (text is not converted to a number, nor `true`
  to 1), unknown keys are ignored, and NaN and infinity are refused. A subclass
  sets `extra="forbid"` where an unknown key must be refused.
  """

  model_config = ConfigDict(
    frozen=True, strict=True, extra="ignore", allow_inf_nan=False
  )


def read_bytes(
  path: str | os.PathLike, *, remedy: str, most: int = MOST_BYTES
) -> bytes:
  """Reads a whole regular file of at most `most` bytes.

  Args:
    path: of the file.
    remedy: what the user can do, as the last words of the message.
    most: largest size in bytes that is accepted.

  Returns:
    The content of the file.

  Raises:
    UserError: the file is missing, a folder or device, unreadable, too large,
      or a Git-LFS pointer in place of the real file.
  """
  content = _start(path, most + 1, remedy)
  _check_size(path, len(content), most, remedy)
  return content


def check_file(
  path: str | os.PathLike, *, remedy: str, most: int | None = None
) -> None:
  """Checks that a path is a regular file before a library opens it.

  Args:
    path: of the file.
    remedy: what the user can do, as the last words of the message.
    most: largest size in bytes that is accepted; any size if None.

  Raises:
    UserError: as `read_bytes`.
  """
  _start(path, len(_LFS), remedy)
  if most is not None:
    _check_size(path, os.path.getsize(path), most, remedy)


def _check_size(
  path: str | os.PathLike, size: int, most: int, remedy: str
) -> None:
  """Refuses a file of more than `most` bytes."""
  if size > most:
    raise UserError(
      f"{path} has more than {most} bytes, which no such file has; {remedy}"
    )


def _start(path: str | os.PathLike, count: int, remedy: str) -> bytes:
  """Reads at most `count` bytes from the start of a regular file."""
  path = pathlib.Path(path)
  try:
    # A pipe or device may have no end, and opening one may wait for ever.
    if path.exists() and not path.is_file():
      kind = "a folder" if path.is_dir() else "no regular file"
      raise UserError(f"{path} is {kind}; {remedy}")
    with open(path, "rb") as file:
      content = file.read(count)
  except FileNotFoundError:
    raise UserError(
      f"{path} does not exist; {remedy}", kind="missing"
    ) from None
  except UserError:
    raise
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"cannot read {path}: {reason}; {remedy}") from None
  check_pointer(path, content)
  return content


def check_pointer(path: str | os.PathLike, content: bytes) -> None:
  """Refuses the pointer that Git-LFS leaves in place of a file.

  Args:
    path: of the file, for the message.
    content: the first bytes of the file.

  Raises:
    UserError: the content is such a pointer.
  """
  if content.startswith(_LFS):
    raise UserError(
      f"{path} is a Git-LFS pointer, not the file itself; fetch it with"
      " `git lfs pull`, or download it again"
    )


def read_json(
  path: str | os.PathLike, *, remedy: str, most: int = MOST_BYTES
) -> Any:
  """Reads a JSON file of any content, with or without a byte order mark.

  Raises:
    UserError: as `read_bytes`; or the text is not JSON, or nested too deep.
  """
  content = read_bytes(path, remedy=remedy, most=most)
  return parse_json(content, str(path), remedy=remedy)


def parse_json(content: bytes | str, where: str, *, remedy: str) -> Any:
  """Parses JSON text.

  Args:
    content: text, or UTF-8 bytes with or without a byte order mark.
    where: names the text in the message.
    remedy: what the user can do, as the last words of the message.

  Raises:
    UserError: the text is not UTF-8, not JSON, or nested too deep.
  """
  try:
    if isinstance(content, bytes):
      content = content.decode("utf-8-sig")
    return json.loads(content)
  except UnicodeDecodeError as error:
    raise UserError(
      f"{where} is not UTF-8 text (byte {error.start}); {remedy}"
    ) from None
  except RecursionError:
    raise UserError(f"{where} is nested too deep; {remedy}") from None
  except ValueError as error:  # JSONDecodeError, and integers of 4,300 digits
    raise UserError(f"{where} is not JSON ({error}); {remedy}") from None


def validate(
  schema: type[Model], raw: Any, where: str, *, remedy: str
) -> Model:
  """Validates a parsed JSON value.

  Args:
    schema: class that the value must fit.
    raw: the value, as `json.loads` returns it.
    where: names the file and the place in it in the message.
    remedy: what the user can do, as the last words of the message.

  Raises:
    UserError: some fields do not fit; the message lists them with what they
      hold and what they should hold.
  """
  try:
    return schema.model_validate(raw)
  except pydantic.ValidationError as error:
    problems = [_problem(item) for item in error.errors(include_url=False)]
    listed = problems[:_SHOWN]
    if len(problems) > _SHOWN:
      listed.append(f"and {len(problems) - _SHOWN} more")
    raise UserError(f"{where}: {'; '.join(listed)}; {remedy}") from None
  except RecursionError:
    raise UserError(f"{where} is nested too deep; {remedy}") from None


def read_schema(
  schema: type[Model],
  path: str | os.PathLike,
  *,
  remedy: str,
  most: int = MOST_BYTES,
) -> Model:
  """Reads a JSON file and validates it; see `read_json` and `validate`."""
  raw = read_json(path, remedy=remedy, most=most)
  return validate(schema, raw, str(path), remedy=remedy)


def _problem(item: ErrorDetails) -> str:
  """Words one error of pydantic."""
  field = ".".join(map(str, item["loc"])) or "the whole"
  message = item["msg"][:1].lower() + item["msg"][1:]
  if item["type"] == "missing":
    return f"{field} is missing"
  message = message.removeprefix("value error, ")
  if item["type"] in ("model_type", "dict_type"):
    message = "input should be a JSON object"  # pydantic names our class
  return f"{field} is {shorten(item['input'])}: {message}"


def shorten(value: Any, most: int = 60) -> str:
  """Returns the value's `repr` for a message, cut to `most` characters."""
  try:
    text = repr(value)
  except (RecursionError, ValueError):  # ValueError: a very long integer
    text = f"a {type(value).__name__} too large to show"
  return text if len(text) <= most else f"{text[: most - 3]}..."


# --- Frozen dataclasses built of a mapping, such as a ConfigDict --------------


def _typed(value: Any, kind: Any, where: str) -> Any:
  """Returns a value of a field's type; only int is converted, to float."""
  options = typing.get_args(kind)  # of a Literal
  if options and value not in options:
    raise UserError(f"{where} is {value!r}; choose {either(options)}")
  kind = str if options else kind
  if kind is float and type(value) is int:
    value = float(value) if abs(value) < 2**1000 else math.inf
  if type(value) is not kind or value != value:
    names: dict[Any, str] = {
      int: "an integer",
      float: "a number",
      bool: "True or False",
    }
    raise UserError(
      f"{where} is {shorten(value)}; it must be {names.get(kind, 'text')}"
    )
  return value


def either(options: tuple[str, ...]) -> str:
  """Returns "a, b or c"."""
  return f"{', '.join(options[:-1])} or {options[-1]}"


def _build_each(kind: Any, values: Any, where: str) -> dict[str, Any]:
  """Builds a dict of dataclasses from a mapping of mappings."""
  if not isinstance(values, Mapping):
    raise UserError(
      f"{where} is {shorten(values)}; it must be a group of names"
    )
  _, cls = typing.get_args(kind)
  return {
    str(name): build(cls, value, f"{where}.{name}")
    for name, value in values.items()
  }


def build(
  cls: type, values: Any, where: str, renamed: Mapping[str, str] = {}
) -> Any:
  """Builds a dataclass, and those nested in it, from a mapping.

  Args:
    cls: the dataclass.
    values: of its fields.
    where: name of the mapping, for messages.
    renamed: today's names of fields that had others.

  Raises:
    UserError: a key is unknown or missing, or a value has another type.
  """
  if not isinstance(values, Mapping):
    raise UserError(f"{where} is {shorten(values)}; it must be a group of keys")
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(map(str, set(values) - set(fields)))
  for key in unknown:
    if key in renamed:
      raise UserError(f"{where}.{key} is now called {where}.{renamed[key]}")
  if unknown:
    raise UserError(
      f"{where} has no key {', '.join(unknown)}; known are"
      f" {', '.join(sorted(fields))}"
    )
  types = typing.get_type_hints(cls)
  arguments = {}
  for name, value in values.items():
    nested = types[name]
    if dataclasses.is_dataclass(nested):
      arguments[name] = build(nested, value, f"{where}.{name}")
    elif typing.get_origin(nested) is dict:
      arguments[name] = _build_each(nested, value, f"{where}.{name}")
    else:
      arguments[name] = _typed(value, nested, f"{where}.{name}")
  missing = sorted(
    name
    for name, field in fields.items()
    if name not in arguments
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  )
  if missing:
    raise UserError(f"{where} lacks {', '.join(missing)}")
  return cls(**arguments)
