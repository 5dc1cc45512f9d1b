"""Rows of answers: several to one prompt, which share its memory and queries.

A row holds for each prompt its memory, its queries and then the answers, each
behind a copy of the prompt's decoder tokens:

    memory           m m m m m m m m          encoded once
    queries          q q q q                  augmented by MemAug once
    decoder          p p p p a a   p p p p b b b
    decoder_source   queries 0-3   queries 0-3
    target           - - - a a -   - - - b b b -     of the answers alone
"""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from hourjax.batch import IGNORE
from hourjax.data.dataset import Dataset, Unread
from hourjax.data.layout import Layout
from hourjax.data.packing.row_plan import RowPlan
from hourjax.data.pipeline import Delivered, heavy_with_light
from hourjax.data.records.record import Skipped
from hourjax.data.rows import (
  ROWS,
  Row,
  RowSpec,
  Sample,
  Size,
  check_fits,
  empty_rows,
  row_of,
)
from hourjax.errors import UserError
from hourjax.objectives.losses import AnswerBatch
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import Experiment
from hourjax.training.data_loader import DataLoader

_QUERIES, _DECODER = (Size.names().index(n) for n in ("queries", "decoder"))
_LISTED = 20  # reasons in a message


class RowAnswer(NamedTuple):
  """Holds an answer as it is laid into a row.

  Attributes:
    sample: prompt and answer; its weights are what the objective makes of them.
    pair: number of its pair in the row, from 1.
    share: at each of its labels, see `AnswerBatch`.
    reference: [L], of its targets.
  """

  sample: Sample
  pair: int
  share: float
  reference: np.ndarray


# Answers that stand or fall together: a pair, or all to one question.
Together = Sequence[RowAnswer]
# Of a position in the plan: the answers of its row, and what was unread.
Answers = Callable[[int], tuple[Iterable[Together], list[Unread]]]


def answer_layout(prompt: Layout, ids: Sequence[int], most: int) -> Layout:
  """Returns the layout of a prompt and an answer, which alone has labels.

  Args:
    prompt: up to the opening of the assistant's turn.
    ids: tokens of the answer, the end of its turn included.
    most: the decoder's sequence is cut here.
  """
  start = len(prompt.decoder_token)
  tokens = np.append(prompt.decoder_token, np.asarray(ids, np.int32))
  source = np.append(prompt.decoder_source, np.full(len(ids), -1, np.int32))
  labels = np.where(np.arange(len(tokens)) < start, np.int32(IGNORE), tokens)
  cut = slice(most)
  return dataclasses.replace(
    prompt,
    decoder_token=tokens.astype(np.int32)[cut],
    decoder_source=source.astype(np.int32)[cut],
    labels=labels.astype(np.int32)[cut],
  )


def cut_prompt(layout: Layout, length: int) -> Layout:
  """Returns a layout's first `length` decoder positions."""
  return dataclasses.replace(
    layout,
    decoder_token=layout.decoder_token[:length],
    decoder_source=layout.decoder_source[:length],
    labels=layout.labels[:length],
  )


def set_sizes(
  dataset: Dataset,
  experiment: Experiment,
  sizes: Int64[np.ndarray, "N 7"],
  problems: dict[int, str],
) -> None:
  """Gives a dataset's samples other sizes; what then does not fit is skipped.

  Args:
    dataset: changed in place.
    experiment: with the capacities.
    sizes: of all samples, with all their answers.
    problems: why samples cannot be used, by index.

  Raises:
    UserError: more than `data.max_skipped` of the samples cannot be used.
  """
  columns, own = dataset.columns, experiment.rows_by_stream
  usable = [*dataset.usable.tolist(), *dataset.held_out.tolist()]
  problems = {i: problems[i] for i in usable if i in problems}
  limits = {
    number: own.get(name, experiment.rows)
    for number, name in enumerate(columns.streams)
  }
  for stream, capacity in limits.items():
    members = np.array([i for i in usable if columns.stream[i] == stream], int)
    over = (sizes[members] > np.array(capacity.astuple())).any(axis=1)
    for i in members[over].tolist():
      name = columns.streams[stream]
      key = f"config.stream_rows.{name}" if name in own else ROWS
      try:
        size = Size(*map(int, sizes[i]))
        check_fits(size, capacity, "all answers to its question", key)
      except UserError as error:
        problems.setdefault(i, str(error))
  share = experiment.data.max_skipped
  count = len(dataset.skipped) + len(problems)
  refused = len(problems) == len(usable) or count > share * len(columns)
  # Records are read for their names: of many, only those that are shown.
  for i in sorted(problems)[: _LISTED if refused else None]:
    name = dataset.record(i).id
    dataset.skipped.append(Skipped(name, f"record {name}: {problems[i]}"))
  dataset.sizes = sizes
  dataset.usable = dataset.usable[~np.isin(dataset.usable, list(problems))]
  kept = ~np.isin(dataset.held_out, list(problems))
  dataset.held_out = dataset.held_out[kept]
  if refused or not len(dataset):
    reasons = [item.reason for item in dataset.skipped[-_LISTED:]]
    raise UserError(
      f"{count} of {len(columns)} records of"
      f" {experiment.data.dataset} cannot be used with"
      f" config.objective.name={experiment.objective.name},"
      f" config.data.max_skipped={share} allows fewer; mend them or raise"
      " it:\n  " + "\n  ".join(reasons)
    )


def with_answers(
  sizes: Int64[np.ndarray, "N 7"],
  queries: np.ndarray,
  decoder: np.ndarray,
) -> Int64[np.ndarray, "N 7"]:
  """Returns sizes with other numbers of queries and decoder positions."""
  changed = sizes.copy()
  changed[:, _QUERIES], changed[:, _DECODER] = queries, decoder
  return changed


def queries_of(sizes: Int64[np.ndarray, "N 7"]) -> np.ndarray:
  """Returns the queries of samples, from their sizes."""
  return sizes[:, _QUERIES]


def decoder_of(sizes: Int64[np.ndarray, "N 7"]) -> np.ndarray:
  """Returns the decoder positions of samples, from their sizes."""
  return sizes[:, _DECODER]


def empty_answers(spec: RowSpec, rows: int) -> AnswerBatch:
  """Returns numpy arrays of rows; those of the batch are to be filled."""
  shape = rows, spec.capacity.decoder
  return AnswerBatch(
    empty_rows(spec, rows),
    np.zeros(shape, np.int32),  # pyrefly: ignore[bad-argument-type]
    np.zeros(shape, np.float32),  # pyrefly: ignore[bad-argument-type]
    np.zeros(shape, np.float32),  # pyrefly: ignore[bad-argument-type]
  )


def fill_answers(
  spec: RowSpec, rows: AnswerBatch, number: int, answers: Iterable[Together]
) -> tuple[int, tuple[Unread, ...]]:
  """Fills a row with answers.

  Args:
    spec: of the rows.
    rows: numpy arrays, filled in place.
    number: of the row in them.
    answers: in order.

  Returns:
    Number of answers in the row, and of those that do not fit.
  """
  row, count = Row(spec, row_of(rows.batch, number)), 0
  unread: list[Unread] = []
  placed = False  # the memory that answers without their own would read
  for together in answers:
    size = sum((answer.sample.size for answer in together), row.used)
    first = together[0].sample
    placed = placed or not first.reuses_memory
    try:
      check_fits(size, spec.capacity, first.name)
      if not placed:
        raise UserError(f"record {first.name}: its memory is not in the row")
    except UserError as error:  # other files than were measured
      unread += [Unread(first.name, "size", str(error)) for _ in together]
      placed = placed and first.reuses_memory
      continue
    for answer in together:
      start = row.used.decoder
      row.add(answer.sample)
      own = slice(start, row.used.decoder)
      targets = answer.sample.layout.targets
      labelled = targets != IGNORE
      rows.pair[number, own] = np.where(labelled, answer.pair, 0)
      rows.share[number, own] = np.where(labelled, answer.share, 0)
      rows.reference[number, own] = answer.reference
      count += 1
  row.finish()
  return count, tuple(unread)


def deliver_answers(
  plan: RowPlan,
  spec: RowSpec,
  answers: Answers,
  *,
  rows: int,
  mine: Sequence[int],
  start: int,
  threads: int,
) -> Generator[tuple[AnswerBatch, Delivered], None, None]:
  """Yields micro-batches of answers without end, as numpy arrays.

  Args:
    plan: of the rows.
    spec: of them; their capacity is the plan's.
    answers: of a row, by its position.
    rows: of a micro-batch, on all hosts together.
    mine: which of them this host fills.
    start: position of the first row.
    threads: that fill rows.
  """
  first = plan.advance(start, 0)
  with ThreadPoolExecutor(threads) as pool:
    while True:
      own = dataclasses.replace(spec, capacity=plan.capacity(first))
      found, after = plan.take(first, rows)
      places = [*found, *[None] * (rows - len(found))]
      if plan.ordered_by_work:
        places = heavy_with_light(places)
      made = empty_answers(own, len(mine))

      def fill(
        number: int,
        places: Sequence[int | None] = places,
        own: RowSpec = own,
        made: AnswerBatch = made,
      ) -> tuple[int, tuple[Unread, ...]]:
        """Fills one row of the micro-batch."""
        position = places[mine[number]]
        if position is None:
          return fill_answers(own, made, number, ())
        chosen, failed = answers(position)
        count, unread = fill_answers(own, made, number, chosen)
        return count, (*failed, *unread)

      counts, failed = zip(*pool.map(fill, range(len(mine))))
      delivered = Delivered(
        made.batch, after, plan.begins_step(after), sum(counts), sum(failed, ())
      )
      yield made, delivered
      first = after


def on_devices(rows: AnswerBatch, sharding: BatchSharding) -> AnswerBatch:
  """Returns rows of answers on the devices.

  Args:
    rows: numpy arrays of the rows that this host fills.
    sharding: of micro-batches.
  """
  others = (sharding.as_targets(np.asarray(array)) for array in rows[1:])
  return AnswerBatch(sharding(rows.batch), *others)


class AnswerLoader(DataLoader):
  """Iterates over micro-batches of answers on the devices."""

  def _load(self) -> tuple[AnswerBatch, Delivered]:
    """Reads the next micro-batch and copies it to the devices."""
    made, delivered = next(self._delivered)
    return on_devices(made, self._sharding), delivered


def with_capacity(spec: RowSpec, capacity: Size) -> RowSpec:
  """Returns a description of rows with another capacity."""
  return dataclasses.replace(spec, capacity=capacity)
