"""The collectives of a compiled program: what devices send, by mesh axis."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from hourjax.planning.compiler import hlo
from hourjax.planning.compiler.hlo import Program, Run

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
  """Describes one collective of a compiled program.

  Attributes:
    kind: "all-gather", ...
    dtype: the dtype of the largest array, as XLA writes it.
    axes: axes of the mesh along which the devices of a group differ.
    devices: how many devices a group has.
    payload: bytes of the whole that is gathered, reduced or sent on.
    sent: bytes that a device sends in one execution, if a ring is used.
    times: how often it is executed in one run of the program.
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
  """Describes a mesh. Ids of devices run through it in row-major order.

  Attributes:
    names: names of the axes.
    sizes: devices along each axis.
  """

  names: tuple[str, ...]
  sizes: tuple[int, ...]

  @classmethod
  def of(cls, mesh: Mesh) -> "Layout":
    """Returns the layout of a mesh of jax."""
    return cls(tuple(mesh.axis_names), tuple(mesh.devices.shape))

  @property
  def devices(self) -> int:
    """Returns the number of devices."""
    return math.prod(self.sizes)

  def axes_of(self, groups: np.ndarray) -> tuple[str, ...]:
    """Returns the axes along which the devices of a group differ.

    Args:
      groups: ids of devices `[n, size]`, a group in each row.
    """
    places = np.stack(np.unravel_index(groups, self.sizes), axis=-1)
    varies = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, yes in zip(self.names, varies) if yes)


def collectives(
  program: Program, layout: Layout, unknown_trips: float = 1.0
) -> list[Collective]:
  """Lists all collectives between devices, one entry each.

  A collective that the compiler has cut into pieces and fused with other work
  stands in the text several times under one channel, and counts once. Of the
  branches of a conditional the one that sends the most counts.

  Args:
    program: as compiled for the mesh.
    layout: the layout of the mesh.
    unknown_trips: how many turns a loop counts whose length only the data
      decides.

  Raises:
    ValueError: groups of devices are written in a way not known here.
  """
  found: list[_Branched] = []
  seen = set()
  for run in hlo.runs(program, unknown_trips):
    kind = _kind(run.instruction.opcode)
    if kind is None:
      continue
    pieces = _pieces(run)
    if pieces is not None:
      # Also one that the compiler has put into a loop, beside its products.
      if any((context, *pieces) in seen for context in run.contexts):
        continue
      seen.add((run.contexts[-1], *pieces))
    for each in _collective(run, kind, layout, pieces is not None):
      found.append((run.branch, each))
  return _of_taken_branches(found)


def by_axis(
  found: Iterable[Collective], times: float = 1.0
) -> list[dict[str, Any]]:
  """Adds up collectives that differ in nothing but their arrays.

  Args:
    found: the collectives of a program.
    times: how often the program runs.

  Returns:
    Totals as plain data, those that send the most first. Each has `axes`
    ("fsdp+seq"), `kind`, `dtype`, `devices` (of a group), `asynchronous`,
    `guessed`, `count` (executions) and `sent` (bytes of a device).
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


# The branches of conditionals in which a collective stands, as in `hlo.Run`,
# and the collective.
_Branched = tuple[tuple[tuple[str, int], ...], Collective]


def _of_taken_branches(found: Sequence[_Branched]) -> list[Collective]:
  """Returns collectives without those of branches that send less."""
  sent: dict[tuple[str, int], float] = collections.defaultdict(float)
  for branch, each in found:
    for name, number in branch:
      sent[name, number] += each.times * each.sent
  largest: dict[str, int] = {}
  for (name, number), total in sent.items():
    if total > sent.get((name, largest.get(name, -1)), 0.0):
      largest[name] = number
  return [
    each
    for branch, each in found
    if all(largest.get(name, number) == number for name, number in branch)
  ]


def _kind(opcode: str) -> str | None:
  """Returns the kind of a collective, or None for any other opcode."""
  base = opcode.removesuffix("-start")
  return base if base in _KINDS else None


def _pieces(run: Run) -> tuple[str, ...] | None:
  """Returns what the pieces of one fused collective have in common.

  Returns:
    The same for all pieces of one collective; None if this is no piece.
  """
  if '"async_collective_fusion_config"' not in run.instruction.rest:
    return None
  chain = re.search(r'chain_id="(\d+)"', run.instruction.rest)
  channel = run.instruction.attribute("channel_id")
  return channel or "", chain[1] if chain else ""


def _collective(
  run: Run, kind: str, layout: Layout, fused: bool
) -> list[Collective]:
  """Returns the entries of one instruction: none if it moves nothing.

  Args:
    run: a collective instruction.
    kind: its kind.
    layout: the layout of the mesh.
    fused: whether it is a piece of a fused collective.
  """
  each = run.instruction
  arrays = _payload(each, kind)
  if not arrays:
    return []
  size = sum(array.bytes for array in arrays)
  dtype = max(arrays, key=lambda array: array.bytes).dtype
  common: dict[str, Any] = {
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
    size *= devices  # the result is one part of what is reduced
  elif kind == "all-reduce" and "all-reduce-scatter" in run.computation:
    # The reduction is fused with taking the part that the device keeps.
    kind = "reduce-scatter"
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


def _payload(each: hlo.Instruction, kind: str) -> list[hlo.Array]:
  """Returns the arrays that an instruction moves.

  A `-start` has more in its tuple than its results: all-gather-start gives
  ((operands), (results)) or (operand, result), collective-permute-start
  (operand, result, counters).
  """
  arrays = [array for array in each.arrays() if array.bytes]
  if not each.opcode.endswith("-start") or kind == "all-reduce":
    return arrays
  operands = len(each.operands())
  return arrays[operands : 2 * operands]


def _permutes(
  each: hlo.Instruction, layout: Layout, size: float, common: Mapping[str, Any]
) -> list[Collective]:
  """Returns the entries of a permutation, one for each set of axes crossed.

  Args:
    each: the instruction, with pairs (sender, receiver).
    layout: the layout of the mesh.
    size: bytes that a sender sends.
    common: fields of the entries that are the same for all of them.
  """
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
      # The mean over all devices, since not every device need send.
      sent=size * count / layout.devices,
      **common,
    )
    for axes, count in crossing.items()
  ]


def _groups(each: hlo.Instruction, devices: int) -> np.ndarray:
  """Returns the ids of the devices of each group, `[groups, size]`.

  XLA writes groups in one of three ways:
    {{0,1},{2,3}}: the ids themselves.
    [2,4]<=[4,2]T(1,0): arange(8) in the shape [4, 2], transposed, and then in
      the shape [2, 4], a group in each row.
    mesh['a'=4,'b'=2] {'a'}: the ids in the shape [4, 2], and groups along a.
      An axis may be cut: 'a':(2)2 is the second factor of a = 2 x 2, that is
      2 parts after 2 have been taken.

  Args:
    each: a collective instruction.
    devices: all devices; they are one group if none is written.
  """
  found = _GROUPS.search(each.rest)
  text = found[1] if found else "{}"
  if text == "{}":
    return np.arange(devices)[None]
  if text.startswith("{{"):
    rows = re.findall(r"\{([\d,]+)\}", text)
    return np.array([[int(n) for n in row.split(",")] for row in rows])
  if text.startswith("["):
    if (iota := _IOTA.fullmatch(text)) is None:
      raise ValueError(f"groups of devices are written as {text!r}")
    shape, dims, order = iota.groups()
    return _iota(dims, order).reshape(_numbers(shape))
  if (mesh := _MESH.fullmatch(text)) is None:
    raise ValueError(f"groups of devices are written as {text!r}")
  return _mesh_groups(*mesh.groups())


def _mesh_groups(sizes: str, ids: str | None, axes: str) -> np.ndarray:
  """Returns `_groups` of mesh[sizes], device_ids=(ids) {axes}."""
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
  grouped: dict[str, list[tuple[int, int]]] = {}
  for name, before, size in _AXIS.findall(axes):
    grouped.setdefault(name, []).append((int(before or 1), int(size or 0)))
  shape: list[int] = []
  inside: list[int] = []
  for name, length in zip(names, lengths):
    for part, chosen in _parts(length, grouped.get(name, [])):
      inside += [len(shape)] if chosen else []
      shape.append(part)
  outside = [i for i in range(len(shape)) if i not in inside]
  array = array.reshape(shape).transpose(outside + inside)
  return array.reshape(-1, math.prod(shape[i] for i in inside))


def _parts(
  length: int, chosen: Iterable[tuple[int, int]]
) -> list[tuple[int, bool]]:
  """Cuts an axis into factors of its length.

  Args:
    length: of the axis.
    chosen: for each factor that a group spans, the product of the factors
      before it and its own length; length 0 stands for all of the axis.

  Returns:
    Each factor, and whether a group spans it.
  """
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


def _iota(dims: str, order: str | None) -> np.ndarray:
  """Returns arange in the shape `dims`, transposed by `order`, and flat."""
  shape = _numbers(dims)
  array = np.arange(math.prod(shape)).reshape(shape)
  return array.transpose(_numbers(order)).ravel() if order else array.ravel()


def _numbers(text: str) -> list[int]:
  """Returns the numbers of "1,2,3"."""
  return [int(n) for n in text.split(",")]
