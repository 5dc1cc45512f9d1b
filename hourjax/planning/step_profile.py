r"""Seconds of a trace by component of the model.

A trace of `jax.profiler` has the names of instructions, and the text of a
compiled program says under which `jax.named_scope` each of them was traced.
Scopes are named as `models.flops.count_flops` names components:

    trace                            program
    fusion.7, 3.1 ms to 3.4 ms       fusion.7: .../transpose(jvp())/.../
                                       decoder_linears/.../dot_general
             \                      /
       0.3 ms of decoder_linears, backward

What runs in no scope is "other".
"""

import collections
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jax.profiler import ProfileData

from hourjax.planning.compiler import hlo

# Scopes of the model, each of which may stand in another: the last one counts.
# The tower's attention is told apart from its products with weights, since
# estimates take the two to run at different speeds.
SCOPES = (
  "tower", "tower_attention", "projector", "memaug_projections",
  "memaug_self_attention", "memaug_cross_attention", "memaug_mlp",
  "decoder_linears", "decoder_attention", "lm_head",
)  # fmt: skip
_SCOPE = re.compile(rf"\b({'|'.join(SCOPES)})\b")
_PATH = re.compile(r'op_name="([^"]*)"')
_NAME = re.compile(r"%?([\w.\-]+)")
_DEVICE = re.compile(r"/device:(TPU|GPU):(\d+)")
# Instructions whose time is that of the instructions that they run.
_CONTAINERS = ("while", "conditional", "call")
_PRODUCTS = ("dot", "convolution", "custom-call", "ragged-dot")
_COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
  "ragged-all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip
_FORWARD, _BACKWARD = "forward", "backward"


class Label(NamedTuple):
  """Says what an instruction belongs to.

  Attributes:
    component: one of `SCOPES`, "update", "other" or "collectives".
    direction: "forward" or "backward"; what the backward pass computes again
      is backward.
  """

  component: str
  direction: str = _FORWARD


OTHER = Label("other")
COLLECTIVE = Label("collectives")


class Event(NamedTuple):
  """Holds one run of an instruction on a device.

  Attributes:
    device: its number.
    program: the name of the module, such as "jit_accumulate".
    name: of the instruction.
    start: in nanoseconds.
    end: in nanoseconds.
  """

  device: int
  program: str
  name: str
  start: float
  end: float


class Times(NamedTuple):
  """Holds how long a device did what, as a mean over devices, in seconds.

  They add up to the time from the first instruction to the last one.

  Attributes:
    work: by label, without collectives.
    collectives: time in which collectives ran and nothing else.
    idle: time in which nothing ran.
  """

  work: dict[Label, float]
  collectives: float
  idle: float

  @property
  def total(self) -> float:
    """Returns the seconds of everything."""
    return sum(self.work.values()) + self.collectives + self.idle

  def of(self, component: str, direction: str = "") -> float:
    """Returns the seconds of a component, in one direction or in both."""
    return sum(
      seconds
      for label, seconds in self.work.items()
      if label.component == component and direction in ("", label.direction)
    )


def label_program(
  text: str, component: str = ""
) -> tuple[str, dict[str, Label | None]]:
  """Returns the name of a program, and the label of each instruction.

  A fusion has the label of the product in it, if there is one: the compiler
  names it after its last instruction, which may belong to the next component.
  What the compiler has left without a name belongs to the same component as
  the loop or branch around it. Loops and branches themselves have None: their
  time is that of what they run.

  Args:
    text: of the compiled program, as `hlo.program_text` returns it.
    component: that all of it belongs to, collectives excepted; empty to go by
      the scopes.
  """
  program = hlo.parse(text)
  module = re.match(r"HloModule ([\w.\-]+)", text)
  labels: dict[str, Label | None] = {}
  todo = [(program.entry, Label(component) if component else OTHER)]
  while todo:
    name, around = todo.pop()
    instructions = {each.name: each for each in program.computations[name]}
    for each in instructions.values():
      label = _label(program, each, instructions, around)
      if component and label != COLLECTIVE:
        label = around
      container = each.opcode in _CONTAINERS
      labels[each.name] = None if container else label
      if container:
        todo += [(inner, label) for inner in hlo.called(each)]
  return module[1] if module else "", labels


def _label(
  program: hlo.Program,
  each: hlo.Instruction,
  siblings: Mapping[str, hlo.Instruction],
  around: Label,
) -> Label:
  """Returns the label of an instruction.

  Args:
    program: that it is part of.
    each: the instruction.
    siblings: the instructions of its computation by name.
    around: the label of the loop or branch in which it runs.
  """
  while each.opcode in ("async-done", "async-update"):
    # What runs stands at the start that it belongs to.
    each = siblings[each.operands()[0]]
  inside = list(_inside(program, each))
  products = [x for x in inside if x.opcode in _PRODUCTS]
  if not products and any(_is_collective(x.opcode) for x in (each, *inside)):
    return COLLECTIVE
  for candidate in (*products, each):
    path = _PATH.search(candidate.rest)
    scopes = _SCOPE.findall(path[1]) if path else ()
    if path and scopes:
      back = "transpose(" in path[1]
      return Label(scopes[-1], _BACKWARD if back else _FORWARD)
  return around


def _inside(
  program: hlo.Program, each: hlo.Instruction
) -> Iterator[hlo.Instruction]:
  """Yields the instructions of the computation that one runs as a whole."""
  if each.opcode in ("fusion", "async-start"):
    for name in hlo.called(each):
      for inner in program.computations[name]:
        yield inner
        yield from _inside(program, inner)


def _is_collective(opcode: str) -> bool:
  return re.sub("-(start|done)$", "", opcode) in _COLLECTIVES


def read_trace(folder: pathlib.Path) -> list[Event]:
  """Reads the instructions out of the traces in a folder.

  Of accelerators these are the events of the devices; on the CPU those that
  its threads run for a device.

  Args:
    folder: that was given to `jax.profiler.start_trace`.
  """
  planes = [
    plane
    for file in sorted(folder.rglob("*.xplane.pb"))
    for plane in ProfileData.from_file(str(file)).planes
  ]
  found = []
  for plane in planes:
    device = _DEVICE.fullmatch(plane.name)
    if device and device[1] == "TPU":
      found += _tpu_events(plane, int(device[2]))
    elif device:
      found += _gpu_events(plane, int(device[2]))
  if found:
    return found
  return [
    event
    for plane in planes
    if plane.name == "/host:CPU"
    for event in _cpu_events(plane)
  ]


def _tpu_events(plane: Any, device: int) -> Iterator[Event]:
  """Yields events of a TPU, whose program is the module that runs then.

  The names of events are whole instructions: "%fusion.7 = bf16[...] ...".
  """
  lines = {line.name: list(line.events) for line in plane.lines}
  modules = sorted(lines.get("XLA Modules", ()), key=lambda x: x.start_ns)
  number = 0
  for event in sorted(lines.get("XLA Ops", ()), key=lambda x: x.start_ns):
    while (
      number + 1 < len(modules)
      and modules[number + 1].start_ns <= event.start_ns
    ):
      number += 1
    name = _NAME.match(event.name)
    if modules and name:
      program = modules[number].name.partition("(")[0]
      yield Event(device, program, name[1], event.start_ns, event.end_ns)


def _gpu_events(plane: Any, device: int) -> Iterator[Event]:
  """Yields kernels and copies of all streams of a GPU."""
  for line in plane.lines:
    if line.name.startswith("Stream"):
      for event in line.events:
        stats = dict(event.stats)
        program = str(stats.get("hlo_module", ""))
        name = str(stats.get("hlo_op", event.name))
        yield Event(device, program, name, event.start_ns, event.end_ns)


def _cpu_events(plane: Any) -> Iterator[Event]:
  """Yields the instructions that threads of the host run for CPU devices."""
  for line in plane.lines:
    for event in line.events:
      stats = dict(event.stats)
      if "hlo_op" in stats:
        yield Event(
          int(stats.get("device_ordinal", 0)),
          str(stats["hlo_module"]),
          str(stats["hlo_op"]),
          event.start_ns,
          event.end_ns,
        )


def add_up(
  events: Iterable[Event], labels: Mapping[str, Mapping[str, Label | None]]
) -> Times:
  """Adds up the time of each component.

  Where several instructions run at a time, each gets its part of it; a
  collective beside which something runs gets nothing:

    product     ======      ====
    collective     ======
                product  waited  idle  product

  Args:
    events: of one or more devices.
    labels: by program, the labels of instructions, as `label_program` returns
      them. Instructions that are not among them are "other".

  Raises:
    ValueError: there is no event.
  """
  by_device = collections.defaultdict(list)
  for event in events:
    label = labels.get(event.program, {}).get(event.name, OTHER)
    if label is not None:
      by_device[event.device].append((event.start, event.end, label))
  if not by_device:
    raise ValueError("the trace has no instruction of a device")
  first = min(start for own in by_device.values() for start, _, _ in own)
  last = max(end for own in by_device.values() for _, end, _ in own)
  total = collections.defaultdict[Label, float](float)
  for own in by_device.values():
    for label, took in _sweep(own).items():
      total[label] += took
  seconds = {k: v / len(by_device) / 1e9 for k, v in total.items()}
  collectives = seconds.pop(COLLECTIVE, 0.0)
  busy = collectives + sum(seconds.values())
  return Times(seconds, collectives, max(0.0, (last - first) / 1e9 - busy))


def _sweep(
  spans: Iterable[tuple[float, float, Label]],
) -> dict[Label, float]:
  """Returns the nanoseconds of each label on one device, see `add_up`."""
  points = sorted(
    (time, change, label)
    for start, end, label in spans
    for time, change in ((start, 1), (end, -1))
  )
  running = collections.Counter[Label]()
  found = collections.defaultdict[Label, float](float)
  before = 0.0
  for time, change, label in points:
    took, before = time - before, time
    work = {k: n for k, n in running.items() if n and k != COLLECTIVE}
    if work:
      share = took / sum(work.values())
      for key, count in work.items():
        found[key] += share * count
    elif running[COLLECTIVE]:
      found[COLLECTIVE] += took
    running[label] += change
  return found
