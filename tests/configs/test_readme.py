"""configs/README.md lists every key of the configuration, and its default."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from configs import hourllava
from hourjax.training.config import build_experiment

README = pathlib.Path(__file__).parents[2] / "configs" / "README.md"
VARIANTS = [f"size={s},stage={n}" for s in ("3b", "7b") for n in (1, 2, 3)]
# What stands in the place of a default that differs from variant to variant.
VARYING = ("size", "stage")


def _flat(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted key, value) of all fields of nested dataclasses."""
  for field in dataclasses.fields(part):
    value, key = getattr(part, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      yield from _flat(value, f"{key}.")
    elif isinstance(value, dict):
      for name, one in value.items():
        yield from _flat(one, f"{key}.{name}.")
    else:
      yield key, value


def _rows(heading: str) -> Iterator[list[str]]:
  """Yields the cells of all tables of keys below a heading."""
  section = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
  for line in section.split("\n## ")[0].splitlines():
    if line.startswith("| `"):
      yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def values() -> dict[str, list[Any]]:
  """Returns the values of each key, variant by variant."""
  made = [
    dict(_flat(build_experiment(hourllava.get_config(variant).to_dict())))
    for variant in VARIANTS
  ]
  # Rows of streams are keys of stage 3 only.
  return {key: [one.get(key, "") for one in made] for key in made[-1]}


def _same(cell: str, value: Any) -> bool:
  """Tells whether a cell says this value."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return cell.strip('"') == str(value)
  return float(cell.replace(",", "")) == value


def test_every_key_is_listed_once_and_no_other(values):
  listed = [row[0].strip("`") for row in _rows("Every key")]
  assert sorted(listed) == sorted(values)


def test_defaults(values):
  for name, cell, *_ in _rows("Every key"):
    several = values[name.strip("`")]
    if cell in VARYING:
      assert len(set(several)) > 1, name
    else:
      assert all(_same(cell, value) for value in several), name


@pytest.mark.parametrize("heading", ["The stages", "The sizes"])
def test_what_differs(values, heading):
  seen = set()
  for name, *cells in _rows(heading):
    key, only = re.fullmatch(r"`([\w.]+)`(?:, (3B|7B))?", name).groups()
    several = dict(zip(VARIANTS, values[key], strict=True))
    seen.add(key)
    for variant, value in several.items():
      size, stage = re.findall(r"=(\w+)", variant)
      if only and size != only.lower():
        continue
      by_size = heading == "The sizes"
      column = ("3b", "7b").index(size) if by_size else int(stage) - 1
      assert _same(cells[column].strip("`"), value), (name, variant)
  word = VARYING[heading == "The stages"]
  rows = _rows("Every key")
  assert seen >= {row[0].strip("`") for row in rows if row[1] == word}
