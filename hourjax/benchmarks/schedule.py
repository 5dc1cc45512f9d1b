"""The cycles of a Pallas TPU kernel, read from the compiler's final bundles.

The TPU is a machine of long instruction words: the compiler decides which
bundle of instructions is issued in which cycle, and writes that down. It does
not foresee waits for memory, and on v5e and v5p it issues products faster than
the matrix unit takes rows. So the rows are counted too, and the longer of the
two times counts.
"""

import collections
import itertools
import pathlib
import re
from typing import Any, NamedTuple

from hourjax.parallel.chips import CHIPS

# Flags with which the compiler writes final bundles into a folder.
DUMP_FLAGS = (
  "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
  " --xla_jf_dump_llo_pass_label_regex=final_bundles"
)

# `0x1b4 LB: >> { first ;; second }`: address, label, loop depth, bundle.
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:> ?)*)\{")
_PRODUCT = re.compile(r"vmatmul((?:\.[\w\[\]]+)*?)\.(mxu\d+)")
_BRANCH = "= sbr."


class Piece(NamedTuple):
  """Describes bundles that are issued one after the other.

  Attributes:
    start: number of the first bundle.
    cycles: how many bundles there are; one is issued in each cycle.
    depth: how many loops are around it; the grid is the outermost loop.
    labelled: whether it begins with a label, and not at the end of a branch.
    rows: rows that its products send through each matrix unit.
  """

  start: int
  cycles: int
  depth: int
  labelled: bool
  rows: dict[str, int]

  def matrix_cycles(self, chip: str) -> int:
    """Returns the cycles that the busiest matrix unit needs for its rows."""
    return max(self.rows.values(), default=0) // CHIPS[chip].matrix_rows

  def cost(self, chip: str) -> int:
    """Returns its cycles: of issue, or of the matrix unit if it needs more."""
    return max(self.cycles, self.matrix_cycles(chip))


def pieces(text: str) -> list[Piece]:
  """Cuts a kernel's final bundles at labels and after branches.

  A branch takes effect some bundles after it is issued; as many as lie, at
  the least, between a branch and the next label.

  Args:
    text: the text of the compiler's file.
  """
  labels, branches, depths, rows = [], [], [], []
  for line in text.splitlines():
    found = _BUNDLE.match(line)
    if not found:
      continue
    number = len(depths)
    depths.append(found[2].count(">"))
    rows.append(_rows(line))
    if found[1] or not number:
      labels.append(number)
    if _BRANCH in line:
      branches.append(number)
  after = [min((b for b in labels if b > x), default=x) - x for x in branches]
  delay = min((gap for gap in after if gap), default=1)
  cuts = {*labels, *(x + delay for x in branches), len(depths)}
  cuts = sorted(cut for cut in cuts if cut <= len(depths))
  return [
    Piece(
      start,
      stop - start,
      depths[start],
      start in labels,
      dict(sum(rows[start:stop], collections.Counter())),
    )
    for start, stop in itertools.pairwise(cuts)
  ]


def _rows(line: str) -> collections.Counter:
  """Returns the rows of one bundle's products, by matrix unit.

  A register holds 16 rows of bfloat16 or 8 of float32; `lmr` takes 8 rows of
  an operand that is transposed on the way.
  """
  rows = collections.Counter()
  for kind, unit in _PRODUCT.findall(line):
    rows[unit] += 16 if ".bf16" in kind and ".lmr" not in kind else 8
  return rows


class Forward(NamedTuple):
  """Holds the pieces of `attention_forward` by what a block does in them.

  A block is one pair of a query tile and a key tile.
  """

  first: list[Piece]  # begins an output tile
  new: list[Piece]  # the reference of a new segment
  whole: list[Piece]  # keys of one segment: the hot one
  chunk: list[Piece]  # of each chunk, whether it meets or not
  uniform: list[Piece]  # a chunk of one segment, in a tile of several
  mixed: list[Piece]  # a chunk of several
  last: list[Piece]  # ends an output tile
  always: list[Piece]  # of every block: addresses, transfers, branches


class Backward(NamedTuple):
  """Holds the pieces of `attention_backward`, named as in `Forward`."""

  first: list[Piece]
  whole: list[Piece]
  chunk: list[Piece]
  mixed: list[Piece]
  last: list[Piece]
  always: list[Piece]


class CausalForward(NamedTuple):
  """Holds the pieces of `attention_forward_causal`, named as in `Forward`."""

  first: list[Piece]
  whole: list[Piece]  # keys of one segment that lie before all queries
  chunk: list[Piece]
  uniform: list[Piece]  # such a chunk, in a tile with others
  diagonal: list[Piece]  # a chunk of one segment on the diagonal
  mixed: list[Piece]
  last: list[Piece]
  always: list[Piece]


class CausalBackward(NamedTuple):
  """Holds the pieces of `attention_backward_causal`, as `CausalForward`."""

  first: list[Piece]
  whole: list[Piece]
  chunk: list[Piece]
  uniform: list[Piece]
  diagonal: list[Piece]
  mixed: list[Piece]
  last: list[Piece]
  always: list[Piece]


Regions = Forward | Backward | CausalForward | CausalBackward


def causal_regions(
  found: list[Piece], kind: type[CausalForward] | type[CausalBackward]
) -> CausalForward | CausalBackward:
  """Names the pieces of a causal kernel.

  Args:
    found: all pieces of the kernel.
    kind: which kernel it is.

  Raises:
    ValueError: the compiler has laid the kernel out in another way.
  """
  (whole,), chunks = _products(found, 1, 3)
  uniform, diagonal, mixed = chunks
  return kind(
    whole=[whole],
    uniform=[uniform],
    diagonal=[diagonal],
    mixed=[mixed],
    **_rest(found, whole, whole, (whole,), tuple(chunks)),
  )


def forward_regions(found: list[Piece]) -> Forward:
  """Names the pieces of the forward kernel.

  Args:
    found: all pieces of the kernel.

  Raises:
    ValueError: the compiler has laid the kernel out in another way.
  """
  (new, whole), (uniform, mixed) = _products(found, 2, 2)
  return Forward(
    new=[new],
    whole=[whole],
    uniform=[uniform],
    mixed=[mixed],
    **_rest(found, new, whole, (new, whole), (uniform, mixed)),
  )


def backward_regions(found: list[Piece]) -> Backward:
  """Names the pieces of the backward kernel.

  Args:
    found: all pieces of the kernel.

  Raises:
    ValueError: the compiler has laid the kernel out in another way.
  """
  (whole,), (mixed,) = _products(found, 1, 1)
  rest = _rest(found, whole, whole, (whole,), (mixed,))
  return Backward(whole=[whole], mixed=[mixed], **rest)


def _products(
  found: list[Piece], outside: int, inside: int
) -> tuple[list[Piece], list[Piece]]:
  """Returns the pieces with products: of the grid's body, of the chunk loop.

  Args:
    found: all pieces of the kernel.
    outside: how many are expected in the grid's body.
    inside: how many are expected in the loop over chunks.
  """
  with_rows = [piece for piece in found if piece.rows]
  depths = [piece.depth for piece in with_rows]
  if depths != [1] * outside + [2] * inside:
    raise ValueError(
      f"expected {outside} pieces with products in the grid's body and then"
      f" {inside} in the loop over chunks; the compiler made pieces of loop"
      f" depths {depths}, cycles {[piece.cycles for piece in with_rows]}"
    )
  return with_rows[:outside], with_rows[outside:]


def _rest(
  found: list[Piece],
  entered: Piece,
  whole: Piece,
  branches: tuple[Piece, ...],
  chunks: tuple[Piece, ...],
) -> dict[str, list[Piece]]:
  """Names the other pieces, by where they lie beside those with products.

  Args:
    found: all pieces of the kernel.
    entered: the first piece with products that a block may run.
    whole: the piece of a block whose keys are of one segment.
    branches: all pieces with products in the grid's body.
    chunks: all pieces with products in the loop over chunks.
  """
  body = [piece for piece in found if piece.depth == 1]
  loop = [
    piece for piece in found if piece.depth == 2 and whole.start < piece.start
  ]
  end = loop[-1].start + loop[-1].cycles
  # `when(FIRST)` lies before the label at which the branch of `entered` is.
  label = max(
    piece.start
    for piece in body
    if piece.labelled and piece.start <= entered.start
  )
  first = max(
    (piece for piece in body if piece.start < label),
    key=lambda piece: piece.start,
  )
  last = next(
    piece for piece in body if piece.start >= end and not piece.labelled
  )
  special = (first, last, *branches)
  return {
    "first": [first],
    "last": [last],
    "chunk": [piece for piece in loop if piece not in chunks],
    "always": [piece for piece in body if piece not in special],
  }


def read_kernels(folder: pathlib.Path, name: str) -> list[list[Piece]]:
  """Reads the pieces of each kernel of a name.

  Args:
    folder: where the compiler has written its bundles.
    name: a pattern that the name must match.
  """
  pattern = re.compile(rf"\d+-(?:{name})[.\d]*-\d+-final_bundles\.txt")
  return [
    pieces(path.read_text())
    for path in sorted(folder.iterdir())
    if pattern.fullmatch(path.name)
  ]


def total(parts: list[Piece], chip: str) -> int:
  """Returns the cycles of pieces that are issued one after the other."""
  return sum(piece.cost(chip) for piece in parts)


def share_of_peak(flops: float, cycles: int, chip: str) -> float:
  """Returns the share of what one core could do in some cycles.

  Args:
    flops: operations that are done in them.
    cycles: the cycles.
    chip: a generation of `parallel.chips`.

  Raises:
    ValueError: the share is above 1, so cycles are missing.
  """
  share = flops / (CHIPS[chip].flops_per_cycle * cycles)
  if share > 1:
    raise ValueError(
      f"{flops:.4g} operations in {cycles} cycles are {share:.1%} of what a"
      f" core of {chip} can do; cycles are missing"
    )
  return share


def region_figures(flops: float, hot: list[Piece], chip: str) -> dict[str, Any]:
  """Returns the share of the peak that pieces reach, and what limits it.

  Args:
    flops: operations that are done in them.
    hot: pieces that are issued one after the other.
    chip: a generation of `parallel.chips`.
  """
  issued = sum(piece.cycles for piece in hot)
  needed = sum(piece.matrix_cycles(chip) for piece in hot)
  share = share_of_peak(flops, max(issued, needed), chip)
  return {
    "share_of_peak": round(share, 3),
    "schedule_cycles": issued,
    "matrix_unit_cycles": needed,
    "limit": "schedule" if issued > needed else "matrix unit",
  }


def overhead_share(flops: float, regions: Regions, chip: str) -> float:
  """Returns the share of the peak of a block that begins and ends no tile.

  Counted are the branch for keys of one segment and all that every block
  runs: addresses, transfers that are started, branches. Not counted is time
  that is spent waiting for a transfer.

  Args:
    flops: operations of the block.
    regions: the pieces of the kernel.
    chip: a generation of `parallel.chips`.
  """
  cycles = total(regions.whole, chip) + total(regions.always, chip)
  return share_of_peak(flops, cycles, chip)
