"""Rows to batches: Grain reads ahead with threads, in plan order.

A position in the data is one integer, the number of rows consumed. There are
no worker processes: each would copy every array through shared memory.
"""

import dataclasses
from collections.abc import Iterator

import grain

from hourjax.batch import Batch
from hourjax.data.dataset import Dataset
from hourjax.data.plan import RowPlan
from hourjax.data.rows import RowSpec, build_row, stack_rows

_FAR = 2**40  # the plan has no end; Grain wants one


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """How far to read ahead.

  Attributes:
    threads: that build rows.
    ahead: rows built before they are asked for; each takes a row's memory.
  """

  threads: int = 4
  ahead: int = 8


def batches(
  dataset: Dataset,
  plan: RowPlan,
  spec: RowSpec,
  *,
  rows: int,
  start: int = 0,
  options: ReadOptions = ReadOptions(),
) -> Iterator[Batch]:
  """Endless batches of `rows` rows, from row `start` of the plan on."""

  def build(k: int) -> Batch:
    epoch, members = plan.row(k)
    return build_row([dataset.sample(i, epoch) for i in members], spec)

  source = grain.MapDataset.range(start, _FAR).map(build)
  reader = source.to_iter_dataset(
    grain.ReadOptions(
      num_threads=options.threads, prefetch_buffer_size=options.ahead
    )
  )
  yield from reader.batch(rows, batch_fn=stack_rows)
