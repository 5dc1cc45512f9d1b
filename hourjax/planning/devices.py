"""The accelerators of this machine, found before jax touches them.

A configuration that asks for `chip=auto` is read before the processes of a run
have found each other, which jax allows only as long as it has not used a
device.
"""

import os
import re
import subprocess
from collections.abc import Mapping

from hourjax.errors import UserError
from hourjax.parallel.chips import CHIPS, Chip
from hourjax.parallel.gpus import GPUS

_NAME = re.compile(r"([a-z0-9]+?)(?:-(\d+))?")


def named_devices(
  name: str, environ: Mapping[str, str] = os.environ
) -> tuple[Chip, int]:
  """Returns the chip that a name stands for, and how many devices there are.

  Args:
    name: "auto" for those of this machine, or a chip and how many of it, such
      as "v5e-8" or "h100"; one without a number.
    environ: may say JAX_PLATFORMS=cpu, with which nothing is looked for.

  Raises:
    UserError: the name is unknown, or this machine has no accelerator.
  """
  if name == "auto":
    found = None
    if environ.get("JAX_PLATFORMS", "") != "cpu":
      found = _tpus() or _gpus()
    if found is None:
      raise UserError(
        "chip=auto found no TPU and no NVIDIA GPU on this machine"
        + " (JAX_PLATFORMS is cpu)" * (environ.get("JAX_PLATFORMS") == "cpu")
        + f"; name what it is to run on, such as chip=v5e-1: {_known()}"
      )
    return found
  match = _NAME.fullmatch(name)
  chip = match and (CHIPS | GPUS).get(match[1])
  count = int(match[2] or 1) if match else 0
  if not chip or not count:
    raise UserError(
      f"chip={name} is unknown; write auto, or a chip and how many of it, such"
      f" as v5e-8: {_known()}"
    )
  return chip, count * chip.devices


def _known() -> str:
  return f"known are {', '.join([*CHIPS, *GPUS])}"


def _tpus() -> tuple[Chip, int] | None:
  """Returns the TPU chips of this machine; None without any."""
  try:
    # No part of jax's interface, but the one way that leaves the chips alone.
    from jax._src import hardware_utils

    count, version = hardware_utils.num_available_tpu_chips_and_device_id()
  except (ImportError, AttributeError, OSError):
    return None
  chip = CHIPS.get(getattr(version, "name", ""))
  return (chip, count * chip.devices) if chip and count else None


def _gpus() -> tuple[Chip, int] | None:
  """Returns the NVIDIA GPUs of this machine; None without any.

  Raises:
    UserError: its GPUs are not in the table.
  """
  query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
  try:
    answer = subprocess.run(
      query, capture_output=True, text=True, timeout=30, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return None
  names = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
  if not names:
    return None
  for chip in GPUS.values():
    if names[0] in chip.kinds:
      return chip, len(names)
  raise UserError(
    f"chip=auto found {names[0]}, which hourjax/parallel/gpus.py does not know;"
    f" name one with as much memory: {', '.join(GPUS)}"
  )
