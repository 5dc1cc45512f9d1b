"""Flags of XLA with which the tests compile for the CPU.

To compile a tiny model takes far longer than to run it. So LLVM optimises
nothing, and loops are emitted without MLIR, which takes a third of the time.
XLA's own passes, which place collectives and fuse loops, run as always.

HOURJAX_TESTS_XLA=full leaves the flags out: programs are then compiled as those
of users are. launch/test.sh runs the golden tests so, and those that compare
the bits of two programs.
"""

import os

_QUICK = (
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_use_fusion_emitters=false",
)
_DEVICES = "--xla_force_host_platform_device_count"


def xla_flags(devices: int | None = None) -> str:
  """Returns XLA_FLAGS for a process of the tests.

  Args:
    devices: devices that the CPU plays; None for as many as there are now.
  """
  flags = os.environ.get("XLA_FLAGS", "").split()
  if os.environ.get("HOURJAX_TESTS_XLA") != "full":
    given = {flag.partition("=")[0] for flag in flags}
    flags += [x for x in _QUICK if x.partition("=")[0] not in given]
  if devices is not None:
    flags = [x for x in flags if not x.startswith(_DEVICES)]
    flags.append(f"{_DEVICES}={devices}")
  return " ".join(flags)
