"""Memory of the accelerators."""

from collections.abc import Iterable
from typing import Any

import jax

_GIB = 2**30


def hbm(devices: Iterable[Any]) -> dict[str, float]:
  """Memory in use and its peak since the process began.

  Args:
    devices: of this host, e.g. jax.local_devices().

  Returns:
    hbm_gib and hbm_peak_gib of the fullest device; a value that no device
    knows (CPUs know none) is left out.
  """
  stats = [_stats(device) for device in devices]
  names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
  found = {
    name: [s[key] / _GIB for s in stats if key in s]
    for name, key in names.items()
  }
  return {name: max(values) for name, values in found.items() if values}


def _stats(device) -> dict[str, int]:
  try:
    return device.memory_stats() or {}
  except (NotImplementedError, jax.errors.JaxRuntimeError):
    return {}  # a backend that keeps no account
