"""Accelerator types that Cloud TPU rents, and what runs on them."""

from __future__ import annotations

import re
from typing import NamedTuple

from tpu.errors import LaunchError

_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)


class Family(NamedTuple):
  """Describes the accelerator types of one generation, PREFIX-N.

  Attributes:
    runtime: software version that Google recommends for it.
    sizes: all values of N that exist.
    cores: what one chip adds to N.
    one_host: largest number of chips on a single host; larger slices have
      hosts of four chips.
    says: the sizes in words, for messages.
  """

  runtime: str
  sizes: tuple[int, ...] | range
  cores: int
  one_host: int
  says: str


FAMILIES = {
  "v5litepod": Family(
    "v2-alpha-tpuv5-lite", _SIZES, 1, 8, "v5litepod-N (v5e), N chips: 1, 4, 8"
    ", 16, 32, 64, 128, 256",
  ),
  "v5p": Family(
    "v2-alpha-tpuv5", range(8, 12289, 8), 2, 4, "v5p-N, N cores, two a chip:"
    " a multiple of 8 up to 12288",
  ),
  "v6e": Family(
    "v2-alpha-tpuv6e", _SIZES, 1, 8, "v6e-N, N chips: 1, 4, 8, 16, 32, 64, 128"
    ", 256",
  ),
}  # fmt: skip


class Accelerator(NamedTuple):
  """Names an accelerator type, its software version and its number of hosts."""

  type: str
  runtime: str
  workers: int


def parse(text: str) -> Accelerator:
  """Parses an accelerator type, such as "v5litepod-16".

  Raises:
    LaunchError: the type is unknown; the message lists those that are known.
  """
  match = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]*)", text)
  family = match and FAMILIES.get(match[1])
  if not match or not family or int(match[2]) not in family.sizes:
    known = "; ".join(family.says for family in FAMILIES.values())
    hint = ""
    if text.startswith("v5e"):
      hint = f"; Cloud TPU calls {text} v5litepod{text[3:]}"
    raise LaunchError(f"--accelerator={text} is none of: {known}{hint}")
  chips = int(match[2]) // family.cores
  workers = 1 if chips <= family.one_host else chips // 4
  return Accelerator(text, family.runtime, workers)
