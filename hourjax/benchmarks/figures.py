"""Figures of benchmarks: peak memory of a process, and how they are printed."""

import json
import pathlib
import re
import resource
from collections.abc import Mapping
from typing import Any


def peak_mib(pid: int | None = None) -> float:
  """Returns the peak of a process's resident memory in MiB.

  It is read from /proc where that exists: `ru_maxrss` of a process that a
  large process started begins with the size of the large one.

  Args:
    pid: number of the process, this one if None; another one needs /proc.
  """
  status = pathlib.Path(f"/proc/{pid or 'self'}/status")
  if status.exists():
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    if found:
      return int(found[1]) / 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def show(figures: Mapping[str, Any], as_json: bool) -> None:
  """Prints figures as one JSON object, or in lines of `a.b.c   value`."""
  print(json.dumps(figures) if as_json else "\n".join(lines(figures)))


def lines(figures: Any, path: tuple[str, ...] = ()) -> list[str]:
  """Returns a line `a.b.c   value` for each value of nested mappings."""
  if not isinstance(figures, Mapping):
    return [f"{'.'.join(path):<44}{figures}"]
  return [x for k, v in figures.items() for x in lines(v, (*path, k))]
