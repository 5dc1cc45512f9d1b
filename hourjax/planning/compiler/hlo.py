"""The text of a compiled XLA program: which instructions run, and how often.

Only what plans and benchmarks need is understood: instructions with their
shapes and attributes, which computation calls which, and how many turns loops
take.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# The opcode is the first lower-case word after the shape that is followed by
# a parenthesis; layouts such as {1,0:T(8,128)} have no blank before theirs.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAMES = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TILE = re.compile(r":T\(([\d,]+)\)")
_BITS = re.compile(r"[a-z]+(\d+)")
# Of opcodes that run other computations as part of the program.
_CALLS = {
  "fusion": ("calls",),
  "call": ("to_apply",),
  "async-start": ("calls",),
  "while": ("body", "condition"),
  "conditional": (
    "branch_computations",
    "true_computation",
    "false_computation",
  ),
}


def program_text(compiled: jax.stages.Compiled) -> str:
  """Returns the text of a compiled program.

  Raises:
    ValueError: the compiler gives no text.
  """
  text = compiled.as_text()
  if text is None:
    raise ValueError("the compiler gives no text of the program")
  return text


def program_memory(compiled: jax.stages.Compiled) -> Any:
  """Returns the bytes that a compiled program takes, as the compiler says.

  Returns:
    XLA's `CompiledMemoryStats`, with `argument_size_in_bytes` and the like.

  Raises:
    ValueError: the compiler does not say.
  """
  memory = compiled.memory_analysis()
  if memory is None:
    raise ValueError("the compiler does not say how much memory it allots")
  return memory


class Array(NamedTuple):
  """Describes one array of a shape, as XLA writes it.

  Attributes:
    dtype: such as "bf16".
    sizes: length of each dimension.
    layout: such as "{1,0:T(8,128)}", or empty.
  """

  dtype: str
  sizes: tuple[int, ...]
  layout: str

  @property
  def bytes(self) -> int:
    """Returns the bytes of its elements, without padding."""
    return math.ceil(math.prod(self.sizes) * _bits(self.dtype) / 8)

  @property
  def padded_bytes(self) -> int:
    """Returns the bytes that it takes of memory: its tiles are padded.

    In a layout {1,0:T(8,128)(2,1)} the minor dimensions are filled up to
    multiples of 8 and 128; the second tile only orders what is in the first.
    """
    tile = _TILE.search(self.layout)
    if not tile or not self.sizes:
      return self.bytes
    order = [int(n) for n in self.layout[1:].partition(":")[0].split(",")]
    sizes = [self.sizes[i] for i in order]  # the minor-most first
    steps = [int(n) for n in tile[1].split(",")][::-1]
    if len(steps) == 1:  # a tile of one dimension holds all that is minor
      sizes[0] = -(-sizes[0] // steps[0]) * steps[0]
    for i, step in enumerate(steps[: len(sizes)]):
      sizes[i] = -(-sizes[i] // step) * step
    return math.ceil(math.prod(sizes) * _bits(self.dtype) / 8)


def _bits(dtype: str) -> int:
  """Returns the bits of an element.

  Raises:
    ValueError: the dtype is not known here.
  """
  if dtype in ("pred", "token", "opaque"):
    return 8 if dtype == "pred" else 0
  found = _BITS.match(dtype)
  if not found:
    raise ValueError(f"the compiled program has arrays of dtype {dtype!r}")
  return int(found[1])


class Instruction(NamedTuple):
  """Describes one line of a computation.

  Attributes:
    name: without the percent sign.
    shape: the shape of the result, as text.
    opcode: "all-gather", "fusion", ...
    rest: operands and attributes, as text.
    root: whether it is the computation's result.
  """

  name: str
  shape: str
  opcode: str
  rest: str
  root: bool

  def arrays(self) -> list[Array]:
    """Returns the arrays of the result; of a tuple all of them, in order."""
    return [
      Array(dtype, tuple(int(n) for n in sizes.split(",") if n), layout)
      for dtype, sizes, layout in _ARRAY.findall(self.shape)
    ]

  def operands(self) -> list[str]:
    """Returns the names of the operands."""
    depth = 1
    for end, letter in enumerate(self.rest):
      depth += (letter == "(") - (letter == ")")
      if not depth:
        return _NAMES.findall(self.rest[:end])
    return _NAMES.findall(self.rest)

  def attribute(self, key: str) -> str | None:
    """Returns the value of `key=value`, braces and brackets included.

    Args:
      key: the attribute's name.

    Returns:
      The value as text, or None if there is no such attribute.
    """
    found = re.search(rf"[, ]{key}=", self.rest)
    if not found:
      return None
    start, depth = found.end(), 0
    for end in range(start, len(self.rest)):
      letter = self.rest[end]
      depth += (letter in "{[(") - (letter in "}])")
      if not depth and letter == "," and self.rest[end : end + 2] == ", ":
        return self.rest[start:end]
    return self.rest[start:]


class Program(NamedTuple):
  """Holds a compiled module.

  Attributes:
    computations: instructions by the name of the computation.
    entry: the name of the computation with which the program begins.
  """

  computations: dict[str, list[Instruction]]
  entry: str

  def find(self, computation: str, name: str) -> Instruction | None:
    """Returns an instruction of a computation by name, or None."""
    for each in self.computations[computation]:
      if each.name == name:
        return each
    return None


def parse(text: str) -> Program:
  """Parses the text of a compiled program.

  Args:
    text: as `program_text` returns it.

  Raises:
    ValueError: it has no entry computation.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = computations.setdefault(header[2], [])
        entry = header[2] if header[1] else entry
      continue
    # A kernel's attributes may go over several lines, which match nothing.
    if line == "}":
      current = None
      continue
    found = _INSTRUCTION.match(line)
    if found:
      root, name, shape, opcode = found.groups()
      rest = line[found.end() :]
      current.append(Instruction(name, shape, opcode, rest, bool(root)))
  if entry is None:
    raise ValueError("no ENTRY computation in the compiler's text")
  return Program(computations, entry)


class Run(NamedTuple):
  """Describes an instruction as the program executes it.

  Attributes:
    instruction: what runs.
    computation: the name of the computation in which it stands.
    contexts: the computations around it, the innermost last; but of a fusion
      not its own.
    times: how often it runs in one execution of the program.
    guessed: whether a loop of unknown length is around it.
    concurrent: whether it runs beside other instructions (`async-start`).
    branch: for each conditional around it, the conditional's name and the
      number of the branch. Only one branch of a conditional is taken.
  """

  instruction: Instruction
  computation: str
  contexts: tuple[str, ...]
  times: float
  guessed: bool = False
  concurrent: bool = False
  branch: tuple[tuple[str, int], ...] = ()


def runs(program: Program, unknown_trips: float = 1.0) -> Iterator[Run]:
  """Yields every instruction that the program executes, and how often.

  Args:
    program: the program to walk through.
    unknown_trips: how many turns a loop counts whose length only the data
      decides.
  """
  todo = collections.deque(
    [
      Run(
        Instruction("", "", "", "", False), program.entry, (program.entry,), 1.0
      )
    ]
  )
  while todo:
    around = todo.popleft()
    for each in program.computations[around.computation]:
      run = around._replace(instruction=each)
      yield run
      for number, name in enumerate(called(each)):
        inner = run._replace(computation=name)
        if each.opcode == "while":
          trips = trip_count(program, around.computation, each)
          known = trips is not None
          inner = inner._replace(
            times=run.times * (trips if known else unknown_trips),
            guessed=run.guessed or not known,
          )
        if each.opcode == "conditional":
          inner = inner._replace(branch=(*run.branch, (each.name, number)))
        if each.opcode == "async-start":
          inner = inner._replace(concurrent=True)
        elif each.opcode != "fusion":
          inner = inner._replace(contexts=(*run.contexts, name))
        todo.append(inner)


def called(each: Instruction) -> list[str]:
  """Returns the names of the computations that an instruction runs."""
  found = []
  for key in _CALLS.get(each.opcode, ()):
    value = each.attribute(key)
    found += _NAMES.findall(value) if value else []
  return found


def trip_count(
  program: Program, computation: str, loop: Instruction
) -> int | None:
  """Returns how many turns a `while` takes, or None where the data decides.

  XLA often writes the number down. Where it does not, the number follows if
  the condition compares an element of the loop's tuple with a constant, the
  element starts at a constant, and the body adds a constant to it.

  Args:
    program: the whole program.
    computation: the name of the computation in which the loop stands.
    loop: the `while` instruction.
  """
  known = _TRIPS.search(loop.rest)
  if known:
    return int(known[1])
  condition, body = loop.attribute("condition"), loop.attribute("body")
  if condition is None or body is None:
    raise ValueError(f"the loop {loop.name} has no condition or no body")
  compared = _comparison(program, condition.lstrip("%"))
  if compared is None:
    return None
  place, limit, direction = compared
  start = _start(program, computation, loop, place)
  step = _step(program, body.lstrip("%"), place)
  if start is None or not step:
    return None
  span = limit - start
  if direction in ("LE", "GE"):
    span += 1 if direction == "LE" else -1
  return max(0, -(-span // step))


def _comparison(
  program: Program, condition: str
) -> tuple[int, int, str] | None:
  """Returns what a loop's condition compares, or None.

  Returns:
    The element of the loop's tuple, the constant, and "LT" or the like.
  """
  for each in program.computations[condition]:
    if each.opcode != "compare":
      continue
    direction = re.search(r"direction=(\w\w)", each.rest)
    sides = each.operands()
    place = _element(program, condition, sides[0])
    limit = _constant(program, condition, sides[1])
    if place is not None and limit is not None and direction:
      return place, limit, direction[1]
  return None


def _start(
  program: Program, computation: str, loop: Instruction, place: int
) -> int | None:
  """Returns the constant at which an element of a loop's tuple starts."""
  operands = loop.operands()
  made = operands and program.find(computation, operands[0])
  if not made or made.opcode != "tuple":
    return None
  return _constant(program, computation, made.operands()[place])


def _step(program: Program, body: str, place: int) -> int | None:
  """Returns the constant that a loop's body adds to an element."""
  root = next((x for x in program.computations[body] if x.root), None)
  if root is None or root.opcode != "tuple":
    return None
  made = program.find(body, root.operands()[place])
  while made and made.opcode in ("copy", "bitcast"):
    made = program.find(body, made.operands()[0])
  if made is None or made.opcode != "add":
    return None
  return _constant(program, body, made.operands()[1])


def _element(program: Program, computation: str, name: str) -> int | None:
  """Returns which element of a tuple an instruction reads."""
  found = program.find(computation, name)
  while found and found.opcode in ("copy", "bitcast"):
    found = program.find(computation, found.operands()[0])
  if found is None or found.opcode != "get-tuple-element":
    return None
  index = found.attribute("index")
  return None if index is None else int(index)


def _constant(program: Program, computation: str, name: str) -> int | None:
  """Returns the value of an instruction that is an integer constant."""
  found = program.find(computation, name)
  while found and found.opcode in ("copy", "bitcast", "convert"):
    found = program.find(computation, found.operands()[0])
  if found is None or found.opcode != "constant":
    return None
  value = re.match(r"(-?\d+)\)", found.rest)
  return int(value[1]) if value else None
