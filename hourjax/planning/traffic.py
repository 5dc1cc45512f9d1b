"""What a compiled program sends between devices, by axis of the mesh."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from hourjax.planning import hlo
from hourjax.planning.hlo import Program, Run

_GROUPS = re.compile(
  r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\([^ ]*\))? \{[^}]*\}"
  r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{\{[\d,{}]*\}\}|\{\})"
)
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
  r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", re.DOTALL
)
_MESH_IDS = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a compiled program.

  Attributes:
    kind: "all-gather", ...
    dtype: of the largest array, as XLA writes it.
    axes: of the mesh along which the devices of a group differ.
    devices: in a group.
    payload: bytes of the whole that is gathered, reduced or sent on.
    sent: bytes that a device sends in one execution, by a ring.
    times: executions in one run of the program.
    guessed: whether a loop of unknown length is around it.
    asynchronous: whether the compiler runs it beside other work.
  """

  kind: str
  dtype: str
  axes: tuple[str, ...]
  devices: int
  payload: float
  sent: float
  times: float
  guessed: bool
  asynchronous: bool


class Layout(NamedTuple):
  """Axes of a mesh and their sizes; ids run through it in row-major order."""

  names: tuple[str, ...]
  sizes: tuple[int, ...]

  @classmethod
  def of(cls, mesh: Mesh) -> "Layout":
    return cls(tuple(mesh.axis_names), tuple(mesh.devices.shape))

  @property
  def devices(self) -> int:
    return math.prod(self.sizes)

  def axes_of(self, groups: np.ndarray) -> tuple[str, ...]:
    """Axes along which ids of a group differ, for groups [n, size]."""
    places = np.stack(np.unravel_index(groups, self.sizes), axis=-1)
    varies = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, yes in zip(self.names, varies) if yes)


def collectives(
  program: Program, layout: Layout, unknown_trips: float = 1.0
) -> list[Collective]:
  """All collectives between devices, one entry each.

  A collective that the compiler has cut into pieces and fused with other work
  stands in the text several times under one channel, and counts once. Of the
  branches of a conditional the one that sends the most counts.

  Args:
    program: as compiled for the mesh.
    layout: of the mesh.
    unknown_trips: what loops count whose length only the data tells.

  Raises:
    ValueError: groups of devices are written in a way not known here.
  """
  found, seen = [], set()
  for run in hlo.runs(program, unknown_trips):
    kind = _kind(run.instruction.opcode)
    if kind is None:
      continue
    pieces = _pieces(run)
    if pieces is not None:
      if pieces in seen:
        continue
      seen.add(pieces)
    for each in _collective(run, kind, layout, pieces is not None):
      found.append((run.branch, each))
  return _taken(found)


def by_axis(
  found: Iterable[Collective], times: float = 1.0
) -> list[dict[str, Any]]:
  """Totals of equal kinds, as plain data, those that send the most first.

  Each has axes ("fsdp+seq"), kind, dtype, devices (of a group), asynchronous,
  guessed, count and sent (bytes of a device), for `times` runs.
  """
  totals = collections.defaultdict(lambda: [0.0, 0.0])
  for each in found:
    key = (
      "+".join(each.axes),
      each.kind,
      each.dtype,
      each.devices,
      each.asynchronous,
      each.guessed,
    )
    totals[key][0] += each.times * times
    totals[key][1] += each.times * times * each.sent
  names = ("axes", "kind", "dtype", "devices", "asynchronous", "guessed")
  lines = [
    {**dict(zip(names, key)), "count": count, "sent": sent}
    for key, (count, sent) in totals.items()
  ]
  return sorted(lines, key=lambda line: -line["sent"])


def _taken(found) -> list[Collective]:
  """Leaves out the branches of conditionals that send less."""
  sent = collections.Counter()
  for branch, each in found:
    for name, number in branch:
      sent[name, number] += each.times * each.sent
  largest = {}
  for (name, number), total in sent.items():
    if total > sent[name, largest.get(name, -1)]:
      largest[name] = number
  return [
    each
    for branch, each in found
    if all(largest.get(name, number) == number for name, number in branch)
  ]


def _kind(opcode: str) -> str | None:
  base = opcode.removesuffix("-start")
  return base if base in _KINDS else None


def _pieces(run: Run) -> tuple[str, ...] | None:
  """What pieces of one fused collective share, or None if it is no piece."""
  if '"async_collective_fusion_config"' not in run.instruction.rest:
    return None
  chain = re.search(r'chain_id="(\d+)"', run.instruction.rest)
  channel = run.instruction.attribute("channel_id")
  return run.context, channel, chain[1] if chain else ""


def _collective(run, kind, layout, fused) -> list[Collective]:
  each = run.instruction
  arrays = _payload(each, kind)
  if not arrays:
    return []
  size = sum(array.bytes for array in arrays)
  dtype = max(arrays, key=lambda array: array.bytes).dtype
  common = {
    "dtype": dtype,
    "times": run.times,
    "guessed": run.guessed,
    "asynchronous": fused or run.concurrent or each.opcode.endswith("-start"),
  }
  if kind == "collective-permute":
    return _permutes(each, layout, size, common)
  groups = _groups(each, layout.devices)
  devices = groups.shape[1]
  if devices == 1:
    return []
  if kind == "reduce-scatter":
    size *= devices  # the result is a part
  elif kind == "all-reduce" and "all-reduce-scatter" in run.computation:
    kind = "reduce-scatter"  # fused with the slice that a device keeps
  passes = 2 if kind == "all-reduce" else 1
  return [
    Collective(
      kind=kind,
      axes=layout.axes_of(groups),
      devices=devices,
      payload=size,
      sent=passes * size * (devices - 1) / devices,
      **common,
    )
  ]


def _payload(each, kind) -> list[hlo.Array]:
  """Arrays that are moved. A `-start` has more in its tuple than results.

  all-gather-start gives ((operands), (results)) or (operand, result);
  collective-permute-start (operand, result, counters).
  """
  arrays = [array for array in each.arrays() if array.bytes]
  if not each.opcode.endswith("-start") or kind == "all-reduce":
    return arrays
  operands = len(each.operands())
  return arrays[operands : 2 * operands]


def _permutes(each, layout, size, common) -> list[Collective]:
  """One entry for each set of axes that some pairs cross."""
  text = each.attribute("source_target_pairs") or ""
  pairs = np.array(
    [[int(n) for n in pair] for pair in re.findall(r"(\d+),(\d+)", text)]
  ).reshape(-1, 2)
  crossing = collections.Counter(
    layout.axes_of(pair[None]) for pair in pairs if pair[0] != pair[1]
  )
  return [
    Collective(
      kind="collective-permute",
      axes=axes,
      devices=2,
      payload=size,
      # The mean over all devices; few patterns leave some without.
      sent=size * count / layout.devices,
      **common,
    )
    for axes, count in crossing.items()
  ]


def _groups(each, devices: int) -> np.ndarray:
  """Ids of the devices of each group, [groups, size].

  XLA writes {{0,1},{2,3}}; [2,4]<=[4,2]T(1,0), that is arange(8) as [4, 2],
  transposed, as [2, 4]; or mesh['a'=4,'b'=2] {'a'}: the ids as [4, 2], a
  group along a. An axis may be cut: 'a':(2)2 are two of its parts, the next
  after the first two.
  """
  found = _GROUPS.search(each.rest)
  text = found[1] if found else "{}"
  if text == "{}":
    return np.arange(devices)[None]
  if text.startswith("{{"):
    rows = re.findall(r"\{([\d,]+)\}", text)
    return np.array([[int(n) for n in row.split(",")] for row in rows])
  if text.startswith("["):
    shape, dims, order = _IOTA.fullmatch(text).groups()
    return _iota(dims, order).reshape(_numbers(shape))
  return _mesh_groups(*_MESH.fullmatch(text).groups())


def _mesh_groups(sizes, ids, axes) -> np.ndarray:
  names, lengths = [], []
  for name, length in re.findall(r"'([^']+)'=(\d+)", sizes):
    names.append(name)
    lengths.append(int(length))
  if ids is None:
    array = np.arange(math.prod(lengths))
  elif (iota := _MESH_IDS.fullmatch(ids)) is not None:
    array = _iota(*iota.groups())
  else:
    array = np.array(_numbers(ids))
  # Cut axes into parts, so that a group is a product of whole ones.
  grouped = {}
  for name, before, size in _AXIS.findall(axes):
    grouped.setdefault(name, []).append((int(before or 1), int(size or 0)))
  shape, inside = [], []
  for name, length in zip(names, lengths):
    for part, chosen in _parts(length, grouped.get(name, [])):
      inside += [len(shape)] if chosen else []
      shape.append(part)
  outside = [i for i in range(len(shape)) if i not in inside]
  array = array.reshape(shape).transpose(outside + inside)
  return array.reshape(-1, math.prod(shape[i] for i in inside))


def _parts(length, chosen) -> list[tuple[int, bool]]:
  """Lengths that an axis is cut into, and which of them a group spans."""
  parts, done = [], 1
  for before, size in sorted(chosen):
    if before > done:
      parts.append((before // done, False))
    size = size or length
    parts.append((size, True))
    done = before * size
  if done < length:
    parts.append((length // done, False))
  return parts


def _iota(dims, order) -> np.ndarray:
  shape = _numbers(dims)
  array = np.arange(math.prod(shape)).reshape(shape)
  return array.transpose(_numbers(order)).ravel() if order else array.ravel()


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]
