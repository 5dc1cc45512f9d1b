"""Figures on a terminal."""

import json
from collections.abc import Mapping
from typing import Any


def show(figures: Mapping[str, Any], as_json: bool) -> None:
  """Prints one JSON object, or `a.b.c   value` a line."""
  print(json.dumps(figures) if as_json else "\n".join(lines(figures)))


def lines(figures: Any, path: tuple[str, ...] = ()) -> list[str]:
  """`a.b.c   value` for each value of nested mappings."""
  if not isinstance(figures, Mapping):
    return [f"{'.'.join(path):<44}{figures}"]
  return [x for k, v in figures.items() for x in lines(v, (*path, k))]
