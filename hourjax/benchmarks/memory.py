"""The most memory that this process has held."""

import pathlib
import re
import resource

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
