"""The input pipeline: threads fill batches ahead of use, in plan order.

A position in the data is one integer (see `row_plan`), the same on every host.
There are no worker processes: each would copy every array through shared
memory.
"""

import dataclasses
import itertools
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import grain

from hourjax.batch import Batch
from hourjax.data.dataset import Dataset, Unread
from hourjax.data.packing.row_plan import RowPlan
from hourjax.data.rows import Row, RowSpec, empty_rows, row_bytes, row_of
from hourjax.errors import UserError

_FAR = 2**40  # stands for the end of the plan, which Grain asks for
_Row = TypeVar("_Row")
IN_USE = 3  # batches being filled, copied and computed with


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """Describes how far to read ahead.

  Attributes:
    threads: that fill rows.
    ahead: batches filled before they are asked for; a host holds at most
      `ahead` + IN_USE batches of its rows.
  """

  threads: int = 4
  ahead: int = 2

  def __post_init__(self) -> None:
    for name in ("threads", "ahead"):
      if getattr(self, name) < 1:
        raise UserError(
          f"config.read.{name} is {getattr(self, name)}; it must be at least 1"
        )


def check_memory(
  spec: RowSpec, rows: int, options: ReadOptions, beside: int = 0
) -> None:
  """Checks that this host's batches fit into its memory.

  Args:
    spec: of the rows.
    rows: of a batch that this host fills.
    options: how far to read ahead.
    beside: batches that are held beside those of the pipeline.

  Raises:
    UserError: they are larger than all memory that the machine has.
  """
  available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  beside += IN_USE
  each, batches_ = row_bytes(spec), options.ahead + beside
  if each * rows * batches_ > available:
    raise UserError(
      f"{rows} rows of {each / 2**20:,.1f} MiB (config.rows) a batch and"
      f" {batches_} batches at a time (config.read.ahead + {beside}) take"
      f" {each * rows * batches_ / 2**30:,.0f} GiB of this host's"
      f" {available / 2**30:,.0f} GiB of memory; lower config.batch_rows or"
      " config.read.ahead, and where config.batch_samples is 0 raise"
      " config.accumulate"
    )


class Delivered(NamedTuple):
  """Holds this host's rows of one global batch.

  Attributes:
    batch: the rows.
    position: of the row after the global batch.
    ends_step: whether a step of `PlanOptions.batch_samples` samples ends here.
    samples: how many samples are in this host's rows.
    unread: samples that were left out of this host's rows.
  """

  batch: Batch
  position: int
  ends_step: bool
  samples: int
  unread: tuple[Unread, ...]


def batches(
  dataset: Dataset,
  plan: RowPlan,
  spec: RowSpec,
  *,
  rows: int,
  start: int = 0,
  mine: Sequence[int] | None = None,
  options: ReadOptions = ReadOptions(),
) -> Generator[Delivered, None, None]:
  """Yields batches without end, from a position of the plan on.

  The global batch is the same for any number of hosts; each fills, and reads
  files for, the rows that its devices need. Where a step is a number of
  samples, the last of its batches is filled up with empty rows.

  Args:
    dataset: samples by index.
    plan: which samples share a row.
    spec: of the rows; their capacity is the plan's.
    rows: in the global batch.
    start: position of its first row.
    mine: indices of this host's rows in the global batch; all if None.
    options: how far to read ahead.
  """
  mine = range(rows) if mine is None else mine
  firsts = {0: plan.advance(start, 0)}  # of the batch that comes next
  with ThreadPoolExecutor(options.threads) as pool:

    def fill(number: int) -> Delivered:
      """Fills batch `number`; batches are asked for one after another."""
      first = firsts.pop(number)
      own = dataclasses.replace(spec, capacity=plan.capacity(first))
      batch = empty_rows(own, len(mine))
      found, after = plan.take(first, rows)
      places = [*found, *[None] * (rows - len(found))]
      if plan.ordered_by_work:
        places = heavy_with_light(places)
      filled = pool.map(
        lambda i: fill_row(
          dataset, plan, own, places[mine[i]], row_of(batch, i)
        ),
        range(len(mine)),
      )
      samples, unread = zip(*filled)
      firsts[number + 1] = after
      ends = plan.begins_step(after)
      return Delivered(batch, after, ends, sum(samples), sum(unread, ()))

    source = grain.MapDataset.range(_FAR).map(fill)
    reader = source.to_iter_dataset(
      # One batch after another, in order; the pool fills its rows.
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=options.ahead)
    )
    yield from reader


def heavy_with_light(rows: list[_Row]) -> list[_Row]:
  """Puts each heavy row of a micro-batch beside a light one.

  The rows come in descending order of their work, empty ones last. A group of
  devices takes neighbouring rows; of two, or four, each group gets about the
  same work: [0 1 2 3 4 5] become [0 5 1 4 2 3].
  """
  half = len(rows) // 2
  light = reversed(rows[-half:] if half else [])
  pairs = itertools.zip_longest(rows[: len(rows) - half], light)
  # An odd number of rows leaves the last pair half empty.
  return list(itertools.chain.from_iterable(pairs))[: len(rows)]


def fill_row(
  dataset: Dataset,
  plan: RowPlan,
  spec: RowSpec,
  position: int | None,
  arrays: Batch,
) -> tuple[int, tuple[Unread, ...]]:
  """Fills one row.

  What cannot be read is left out: its place stays padding.

  Args:
    dataset: samples by index.
    plan: which samples share the row.
    spec: of the row.
    position: of the row in the plan; None for a row that stays empty.
    arrays: of the row, filled in place.

  Returns:
    Number of samples in the row, and those that were left out.
  """
  row, samples = Row(spec, arrays), 0
  epoch, groups = (0, ()) if position is None else plan.row(position)
  unread: list[Unread] = []
  for group in groups:
    found, failed = dataset.samples(group, epoch, row.features_left)
    unread += failed
    for sample in found:
      try:
        row.add(sample)
        samples += 1
      except UserError as error:  # other files than were measured
        unread.append(Unread(sample.name, "size", str(error)))
        if not sample.reuses_memory:
          unread += [
            Unread(s.name, "size", str(error)) for s in found if s.reuses_memory
          ]
          break
  row.finish()
  return samples, tuple(unread)
