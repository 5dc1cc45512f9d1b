"""The memory that a scheduled program takes beside its arguments.

The compiler says it of a program that it has compiled to the end. Here it is
counted from the schedule alone: an array lies in HBM from the instruction that
makes it to the last one that reads it, and the peak is the largest sum.

    a = f(x)          a
    b = g(a)          a b       peak: a + b
    c = h(b)            b c     or b + c
    return c              c

Two names of one array count once: elements of tuples, results of loops, which
are updated in place, and results that take the place of an operand that nobody
reads afterwards. Arrays in VMEM, with S(1) in their layout, do not count.
"""

import functools
from collections.abc import Callable, Mapping

from hourjax.planning.compiler.hlo import Instruction, Program, called

# The result is the first operand, or a part of it.
_SAME = {"bitcast", "optimization-barrier", "copy-done", "async-done", "while"}
# The result may lie where an operand of the same size was.
_IN_PLACE = {
  "add", "subtract", "multiply", "select", "convert", "fusion", "all-reduce",
  "dynamic-update-slice", "custom-call", "scatter", "copy",
}  # fmt: skip
_Buffer = tuple[str, int]  # the instruction that makes it, and which of its own


def peak_bytes(program: Program) -> int:
  """Returns the most bytes of HBM that a program's temporaries take at once.

  Args:
    program: of a scheduled module, whose instructions stand in order.
  """

  @functools.cache
  def of(computation: str) -> int:
    return _peak(program.computations[computation], of)

  return of(program.entry)


def _peak(instructions: list[Instruction], of: Callable[[str], int]) -> int:
  """Returns the peak of one computation, with those that it runs.

  Args:
    instructions: of the computation, in order.
    of: returns the peak of another computation.
  """
  sizes: dict[_Buffer, int] = {}
  values = _values(instructions, sizes)
  last: dict[_Buffer, int] = {}
  for place, each in enumerate(instructions):
    for name in (each.name, *each.operands()):
      for buffer in values.get(name, ()):
        last[buffer] = place
  ends: dict[int, list[_Buffer]] = {}
  for buffer, place in last.items():
    ends.setdefault(place, []).append(buffer)
  live = most = 0
  begun: set[_Buffer] = set()
  for place, each in enumerate(instructions):
    for buffer in values[each.name]:
      if buffer not in begun:
        begun.add(buffer)
        live += sizes[buffer]
    inner = 0
    if each.opcode != "fusion":
      inner = max(map(of, called(each)), default=0)
    most = max(most, live + inner)
    live -= sum(sizes[b] for b in ends.get(place, ()) if b in begun)
  return most


def _values(
  instructions: list[Instruction], sizes: dict[_Buffer, int]
) -> dict[str, list[_Buffer]]:
  """Returns the buffers of each instruction's result.

  Args:
    instructions: of a computation, in order.
    sizes: gets the bytes of each buffer; 0 for those of the caller.
  """
  reads: dict[str, int] = {}
  for place, each in enumerate(instructions):
    for name in each.operands():
      reads[name] = place
  values: dict[str, list[_Buffer]] = {}
  root = next((each for each in instructions if each.root), None)
  for place, each in enumerate(instructions):
    values[each.name] = _result(each, place, values, reads, sizes)
  # What is returned lies in buffers of the caller: results that take the place
  # of donated arguments, the state of a loop.
  for buffer in values[root.name] if root else ():
    sizes[buffer] = 0
  return values


def _result(
  each: Instruction,
  place: int,
  values: Mapping[str, list[_Buffer]],
  reads: Mapping[str, int],
  sizes: dict[_Buffer, int],
) -> list[_Buffer]:
  """Returns the buffers of one instruction's result."""
  arrays, operands = each.arrays(), each.operands()
  first = list(values.get(operands[0], ())) if operands else []
  if each.opcode in _SAME and len(first) >= len(arrays):
    return first[: len(arrays)]
  if each.opcode == "get-tuple-element" and len(arrays) == 1:
    index = int(each.attribute("index") or 0)
    if index < len(first):
      return [first[index]]
  if each.opcode.endswith("-done") and first:
    # Of ((operands), (results)) or (operand, result, ...).
    start = len(first) // 2 if len(first) % 2 == 0 else 1
    return first[start : start + len(arrays)] or first[: len(arrays)]
  if each.opcode == "tuple":
    return [b for name in operands for b in values.get(name, ())]
  found = []
  free = [
    buffer
    for name in dict.fromkeys(operands)
    if each.opcode in _IN_PLACE and reads.get(name) == place
    for buffer in values.get(name, ())
  ]
  for number, array in enumerate(arrays):
    outside = each.opcode == "parameter" or "S(" in array.layout
    size = 0 if outside else array.padded_bytes
    same = [b for b in free if size and sizes[b] == size and b not in found]
    buffer = same[0] if same else (each.name, number)
    sizes.setdefault(buffer, size)
    found.append(buffer)
  return found
