"""How fast a chip is taken to be: at products, and between chips."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hourjax.parallel.chips import Chip

HOP = 1e-6  # seconds that a collective takes for each device of its group
HOST_READS = 5e9  # bytes of features a second that a host reads (README)


class Efficiency(NamedTuple):
  """Share of a chip's bf16 peak that each kind of work reaches.

  Attributes:
    dense: products with weights. Large language models of MaxText report 55
      to 66 % MFU on v5e and 64 to 71 % on v5p, rematerialisation and traffic
      included; products alone are faster.
    reading: MemAug's attention, (forward, backward): the compiler's schedule
      (`bench attention`, share with overhead) times `STOPWATCH`.
    causal: splash attention in the decoder, likewise.
    tower: XLA's attention in the tower, head dim 72.
  """

  dense: float
  reading: tuple[float, float]
  causal: tuple[float, float]
  tower: float


# What a stopwatch leaves of a schedule, which knows no waiting.
STOPWATCH = 0.85
EFFICIENCY = {
  # No schedule was read for v4.
  "v4": Efficiency(0.75, (0.75, 0.75), (0.60, 0.55), 0.3),
  "v5e": Efficiency(
    0.75,
    (0.94 * STOPWATCH, 0.97 * STOPWATCH),
    (0.82 * STOPWATCH, 0.71 * STOPWATCH),
    0.3,
  ),
  "v5p": Efficiency(
    0.78,
    (0.93 * STOPWATCH, 0.96 * STOPWATCH),
    (0.81 * STOPWATCH, 0.71 * STOPWATCH),
    0.3,
  ),
  "v6e": Efficiency(
    0.65,
    (0.59 * STOPWATCH, 0.60 * STOPWATCH),
    (0.31 * STOPWATCH, 0.32 * STOPWATCH),
    0.15,
  ),
  "tpu7x": Efficiency(
    0.65,
    (0.63 * STOPWATCH, 0.67 * STOPWATCH),
    (0.30 * STOPWATCH, 0.31 * STOPWATCH),
    0.15,
  ),
}


def collective_seconds(
  line: Mapping[str, Any], links: Mapping[str, Any], chip: Chip
) -> float:
  """Time of one line of `traffic.by_axis`.

  A ring along a dimension of the torus uses both of a chip's links if the
  dimension is closed to a ring, else one of them at a time; dimensions add
  up. Where a group takes every k-th chip, k groups share the links. Between
  slices everything goes over the data-centre network.

  Args:
    line: with `sent` bytes, `count` and `devices`.
    links: of its axes, as `child.group_links` gives them.
    chip: the generation.
  """
  latency = line["count"] * line["devices"] * HOP
  if links["slices"] > 1:
    near = links["devices"] / links["slices"]
    return line["sent"] / near / chip.dcn * chip.devices + latency
  ways = 0.0
  for places, distance, whole in links["dims"]:
    ring = whole % chip.wraps == 0 and distance == whole
    ways += (2 if ring else 1) * places / distance
  if not ways:  # two devices of one chip
    return line["sent"] / (chip.hbm_bandwidth / chip.devices) + latency
  return line["sent"] * chip.devices / (chip.link * ways) + latency


def axis_seconds(
  program: Mapping[str, Any], links: Mapping[str, Any], chip: Chip
) -> dict[str, tuple[float, float]]:
  """Seconds of a program's traffic by axes: (waited for, beside others)."""
  found: dict[str, list[float]] = {}
  for line in program["traffic"]:
    entry = found.setdefault(line["axes"], [0.0, 0.0])
    took = collective_seconds(line, links[line["axes"]], chip)
    entry[line["asynchronous"]] += took
  return {axes: (waited, beside) for axes, (waited, beside) in found.items()}
