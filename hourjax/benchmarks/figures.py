"""The most memory that this process has held."""
# MERGED hourjax.benchmarks.figures:
# Figures on a terminal.

import json
import pathlib
import re
import resource
from collections.abc import Mapping
from typing import Any

_STATUS = pathlib.Path("/proc/self/status")


def peak_mib() -> float:
  """Peak of resident memory in MiB.

  Where Linux tells it, of this program alone: `ru_maxrss` of a child that was
  started by a large process begins with that process's size.
  """
  if _STATUS.exists():
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    if found:
      return int(found[1]) / 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def show(figures: Mapping[str, Any], as_json: bool) -> None:
  """Prints one JSON object, or `a.b.c   value` a line."""
  print(json.dumps(figures) if as_json else "\n".join(lines(figures)))


def lines(figures: Any, path: tuple[str, ...] = ()) -> list[str]:
  """`a.b.c   value` for each value of nested mappings."""
  if not isinstance(figures, Mapping):
    return [f"{'.'.join(path):<44}{figures}"]
  return [x for k, v in figures.items() for x in lines(v, (*path, k))]
