"""Frozen dataclasses built of a nested mapping, such as a ConfigDict."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from hourjax import schema
from hourjax.errors import UserError


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
      f"{where} is {schema.shorten(value)}; it must be"
      f" {names.get(kind, 'text')}"
    )
  return value


def either(options: tuple[str, ...]) -> str:
  """Returns "a, b or c"."""
  return f"{', '.join(options[:-1])} or {options[-1]}"


def _build_each(kind: Any, values: Any, where: str) -> dict[str, Any]:
  """Builds a dict of dataclasses from a mapping of mappings."""
  if not isinstance(values, Mapping):
    raise UserError(
      f"{where} is {schema.shorten(values)}; it must be a group of names"
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
    raise UserError(
      f"{where} is {schema.shorten(values)}; it must be a group of keys"
    )
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
