"""Rows to batches: threads fill them ahead of use, in plan order.

A position in the data is one integer (see `plan`), the same on every host.
There are no worker processes: each would copy every array through shared
memory.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grain

from hourjax.batch import Batch
from hourjax.data.dataset import Dataset, Unread
from hourjax.data.plan import RowPlan
from hourjax.data.rows import Row, RowSpec, empty_rows, row_of
from hourjax.errors import UserError

_FAR = 2**40  # the plan has no end; Grain wants one


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """How far to read ahead.

  Attributes:
    threads: that fill rows.
    ahead: batches filled before they are asked for; a host holds at most
      `ahead` + 3 batches of its rows.
  """

  threads: int = 4
  ahead: int = 2

  def __post_init__(self):
    for name in ("threads", "ahead"):
      if getattr(self, name) < 1:
        raise UserError(
          f"config.read.{name} is {getattr(self, name)}; it must be at least 1"
        )


class Delivered(NamedTuple):
  """This host's rows of one global batch.

  Attributes:
    batch: the rows.
    position: of the row after the global batch.
    samples: that are in this host's rows.
    unread: samples that were left out of this host's rows.
  """

  batch: Batch
  position: int
  samples: int
  unread: tuple[Unread, ...]


def batches(
  dataset: Dataset,
  plan: RowPlan,
  spec: RowSpec,
  *,
  rows: int,
  start: int = 0,
  host: tuple[int, int] = (0, 1),
  options: ReadOptions = ReadOptions(),
) -> Iterator[Delivered]:
  """Endless batches from a position of the plan on.

  The global batch is the same for any number of hosts; host i of n fills the
  i-th n-th of its rows, of which it reads only its own.

  Args:
    dataset: samples by index.
    plan: which samples share a row.
    spec: of the rows.
    rows: in the global batch.
    start: position of its first row.
    host: index and number of hosts.
    options: how far to read ahead.

  Raises:
    UserError: the rows cannot be split evenly over the hosts.
  """
  index, count = host
  if rows % count:
    raise UserError(
      f"a batch of {rows} rows cannot be split over {count} hosts; make"
      " config.batch_rows a multiple"
    )
  mine = rows // count
  firsts = {0: plan.advance(start, 0)}  # of the batch that comes next
  with ThreadPoolExecutor(options.threads) as pool:

    def fill(number: int) -> Delivered:
      first = firsts.pop(number)
      batch = empty_rows(spec, mine)
      positions = [plan.advance(first, index * mine + i) for i in range(mine)]
      filled = pool.map(
        lambda i: fill_row(dataset, plan, spec, positions[i], row_of(batch, i)),
        range(mine),
      )
      samples, unread = zip(*filled)
      after = firsts[number + 1] = plan.advance(first, rows)
      return Delivered(batch, after, sum(samples), sum(unread, ()))

    source = grain.MapDataset.range(_FAR).map(fill)
    reader = source.to_iter_dataset(
      # One batch after another, in order; the pool fills its rows.
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=options.ahead)
    )
    yield from reader


def fill_row(
  dataset: Dataset, plan: RowPlan, spec: RowSpec, position: int, arrays: Batch
) -> tuple[int, tuple[Unread, ...]]:
  """Fills one row; returns the samples in it and those that are not.

  What cannot be read is left out: its place stays padding.
  """
  epoch, groups = plan.row(position)
  row, samples = Row(spec, arrays), 0
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
        if not sample.shares:
          unread += [
            Unread(s.name, "size", str(error)) for s in found if s.shares
          ]
          break
  row.finish()
  return samples, tuple(unread)
