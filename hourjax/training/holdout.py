"""Evaluation during training, on held-out data.

Every `config.eval_every` steps the model reads the same rows of the data that
`prepare --holdout` set aside, and what it says of their labels goes into the
metrics of that step:

    eval/answer_loss             mean cross entropy of the answers' tokens
    eval/markup_loss             that of <|im_start|>, <|im_end|>, newlines and
                                 roles, which are most labels and soon learnt
    eval/first_token_accuracy    of multiple-choice answers, how often the
                                 option's letter is the most likely token
    eval/answer_tokens           how many tokens and letters these are of
    eval/letters

and the first three again for each stream and topic, where there are several, as
`eval/answer_loss/stream:long` and `eval/answer_loss/topic:action`.

Rows are chosen once, and forgetting keeps in them what it keeps in epoch 0.
Losses of single positions leave the devices and are added up on the host in the
order of the rows, so evaluations are the same on any mesh and number of hosts,
but for rounding within a row.
"""

import collections
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Float64, Int, Int32

from hourjax import progress
from hourjax.batch import IGNORE, Batch
from hourjax.data.conversations import answer_spans
from hourjax.data.dataset import Dataset, Unread
from hourjax.data.packing.row_plan import PlanOptions, RowPlan
from hourjax.data.pipeline import check_memory, fill_row
from hourjax.data.records.questions import letter_answers, question_facts
from hourjax.data.rows import Row, Size, empty_rows, row_of
from hourjax.models.config import ModelConfig
from hourjax.models.params import with_params
from hourjax.parallel import vocabulary
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import Experiment
from hourjax.training.data_loader import UnreadSampleLog, sample_weights
from hourjax.training.metric_writer import MetricWriter
from hourjax.training.train_state import Params, TrainState

_IN_USE = 2  # batches: one that is computed with, and one that is read
MARKUP, ANSWER, LETTER = KINDS = range(3)  # LETTER: also part of an answer


def position_scores(
  trained: Params,
  frozen: Params,
  batch: Batch,
  codes: Int[Array, "B L"],
  *,
  config: ModelConfig,
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"], Int[Array, "B L"]]:
  """Computes the loss of each label, and whether it is the most likely token.

  Args:
    trained: parameters by path.
    frozen: the other parameters.
    batch: a micro-batch.
    codes: of the labels; returned as they are, so that every host gets those of
      all rows.
    config: of the model.
  """
  model = with_params(config, {**frozen, **trained})
  hidden, table = model(batch), model.output_embedding
  losses = vocabulary.token_losses(hidden, table, batch.target)
  right = vocabulary.most_likely(hidden, table, batch.target)
  return losses, right, codes


@functools.lru_cache(maxsize=1)
def _program(
  config: ModelConfig, replicated: NamedSharding
) -> Callable[..., tuple[jax.Array, ...]]:
  """Returns `position_scores`, compiled at its first call for a mesh."""
  scores = functools.partial(position_scores, config=config)
  return jax.jit(scores, out_shardings=replicated)


class Sums(NamedTuple):
  """Holds sums over labels, each float [..., kinds].

  Attributes:
    count: number of labels.
    loss: their losses.
    right: how many of them were the most likely token.
  """

  count: np.ndarray
  loss: np.ndarray
  right: np.ndarray

  def over(self, *axes: int) -> "Sums":
    """Returns the sums over axes, which disappear."""
    return Sums(*(array.sum(axis=axes) for array in self))

  def at(self, index: int) -> "Sums":
    """Returns the sums at an index of the first axis."""
    return Sums(*(array[index] for array in self))

  def means(self, suffix: str = "") -> dict[str, float]:
    """Returns the metrics of one group of labels; those of no label lack."""
    answers = self.count[ANSWER] + self.count[LETTER]
    answer_loss = self.loss[ANSWER] + self.loss[LETTER]
    found = {
      "answer_loss": (answer_loss, answers),
      "markup_loss": (self.loss[MARKUP], self.count[MARKUP]),
      "first_token_accuracy": (self.right[LETTER], self.count[LETTER]),
    }
    return {
      f"eval/{name}{suffix}": float(total / count)
      for name, (total, count) in found.items()
      if count
    }


class LabelCodes:
  """Numbers labels by what is added up apart: stream, topic and kind.

  Code 0 is no label. The others count kinds the fastest: with the topics "" and
  "action", which is number 1, an answer about it in stream 2 has the code
  1 + (2 * 2 + 1) * 3 + ANSWER = 17.
  """

  def __init__(self, streams: Sequence[str], topics: Sequence[str]):
    """Takes the names.

    Args:
      streams: all of the dataset.
      topics: the first of them is "", of labels without one.
    """
    self._streams, self._topics = streams, topics
    self._shape = len(streams), len(topics), len(KINDS)

  def code(self, stream: int, topic: int, kind: int) -> int:
    """Returns the code of labels."""
    return 1 + int(np.ravel_multi_index((stream, topic, kind), self._shape))

  def zeros(self) -> Float64[np.ndarray, "3 codes"]:
    """Returns the sums over no label: their number, loss, and those right."""
    return np.zeros((len(Sums._fields), 1 + int(np.prod(self._shape))))

  def add(
    self,
    sums: Float64[np.ndarray, "3 codes"],
    codes: Int[np.ndarray, "B L"],
    losses: Float[np.ndarray, "B L"],
    right: Bool[np.ndarray, "B L"],
  ) -> None:
    """Adds the labels of rows to the sums, row after row."""
    # One after another and in float64, whatever a micro-batch holds.
    for total, values in zip(sums, (np.ones(codes.shape), losses, right)):
      np.add.at(total, codes.reshape(-1), values.reshape(-1))

  def metrics(self, sums: Float64[np.ndarray, "3 codes"]) -> dict[str, float]:
    """Returns the metrics of all labels, and by stream and topic."""
    whole = Sums(*(total[1:].reshape(self._shape) for total in sums))
    of_all = whole.over(0, 1)
    letters = of_all.count[LETTER]
    found = of_all.means() | {
      "eval/answer_tokens": float(of_all.count[ANSWER] + letters),
      "eval/letters": float(letters),
    }
    streams = [
      whole.over(1).at(i).means(f"/stream:{name}")
      for i, name in enumerate(self._streams)
    ]
    if sum(map(bool, streams)) > 1:
      found |= {k: v for means in streams for k, v in means.items()}
    for i, name in enumerate(self._topics):
      if name:
        found |= whole.over(0).at(i).means(f"/topic:{name}")
    return found


class _Answers(NamedTuple):
  """Holds what is known of a record's answers.

  Attributes:
    name: id of the record.
    topics: number of each answer's topic.
    letters: whether each begins with an option's letter.
  """

  name: str
  topics: list[int]
  letters: list[bool]


def held_out_rows(
  experiment: Experiment, dataset: Dataset
) -> list[tuple[RowPlan, int]]:
  """Returns the rows that every evaluation reads, as (plan, position).

  The same for all seeds and steps. Rows of the streams take turns, so that a
  small stream is measured as well as a large one; streams and sources that
  training leaves out (`config.data.weights`) are left out.
  """
  columns, data = dataset.columns, experiment.data
  members = dataset.held_out
  members = members[sample_weights(columns, data.weights)[members] > 0]
  plans = [
    RowPlan(
      dataset.sizes,
      experiment.rows_by_stream.get(columns.streams[stream], experiment.rows),
      PlanOptions(share=data.share_memory),
      members=members[columns.stream[members] == stream],
      memory=columns.video,
    )
    for stream in np.unique(columns.stream[members]).tolist()
  ]
  counts = [plan.rows_in_epoch(0) for plan in plans]
  rows = [
    (plan, plan.advance(0, k))
    for k in range(min(max(counts, default=0), experiment.eval_rows))
    for plan, count in zip(plans, counts)
    if k < count
  ]
  return rows[: experiment.eval_rows]


class HoldoutEvaluation:
  """Evaluates the model on held-out data, when that is due."""

  def __init__(
    self,
    experiment: Experiment,
    dataset: Dataset,
    sharding: BatchSharding,
    steps: int,
  ):
    """Chooses the rows, and reads their records.

    Args:
      experiment: of the run.
      dataset: with held-out data, or without any: then nothing is evaluated.
      sharding: puts rows onto the devices.
      steps: of the run.

    Raises:
      UserError: a record cannot be read, or this host's memory does not hold
        the batches of evaluation and training together.
    """
    self._experiment, self._dataset = experiment, dataset
    self._sharding, self._steps = sharding, steps
    self._rows: list[tuple[RowPlan, int]] = []
    self._answers: dict[int, _Answers] = {}
    if experiment.eval_every and len(dataset.held_out):
      with progress.step("choosing the held-out rows to evaluate on"):
        self._rows = held_out_rows(experiment, dataset)
        self._codes = self._read_answers()
      rows = len(sharding.local_rows)
      for spec in experiment.row_specs.values():
        check_memory(spec, rows, experiment.read, _IN_USE)

  def report(self) -> None:
    """Prints what is evaluated on, or why nothing is."""
    every, held_out = self._experiment.eval_every, len(self._dataset.held_out)
    if self._rows:
      print(
        f"evaluation every {every} steps on {len(self._rows)} rows of"
        f" {len(self._answers)} samples, of {held_out} that are held out",
        file=sys.stderr,
      )
    elif held_out:
      print(
        f"note: {held_out} samples are held out, and nothing is evaluated on"
        " them; set config.eval_every",
        file=sys.stderr,
      )
    elif every:
      print(
        f"note: nothing is evaluated, although config.eval_every is {every},"
        f" since {self._experiment.data.dataset} has no held-out data; prepare"
        " it with --holdout=0.5%",
        file=sys.stderr,
      )

  def evaluate(
    self,
    step: int,
    state: TrainState,
    metrics: MetricWriter,
    unread: UnreadSampleLog,
  ) -> dict[str, float]:
    """Returns the metrics of held-out data after a step; {} if none are due.

    They are due every `config.eval_every` steps and after the last one. All
    processes must call it, and get the same.

    Args:
      step: that was taken.
      state: after it.
      metrics: gets the time that the evaluation took.
      unread: gets the samples that could not be read.
    """
    every = self._experiment.eval_every
    if not self._rows or (step % every and step != self._steps):
      return {}
    began, sums = time.monotonic(), self._codes.zeros()
    program = _program(self._experiment.model, state.step.sharding)
    with progress.step("evaluating on held-out data"):
      for batch, codes, samples, failed in self._micro_batches():
        with jax.set_mesh(state.step.sharding.mesh):
          scores = program(state.trained, state.frozen, batch, codes)
        losses, right, codes = map(np.asarray, scores)
        self._codes.add(sums, codes, losses, right)
        unread.add_samples(step, samples, failed)
    metrics.add_lost(time.monotonic() - began, "evaluate")
    return self._codes.metrics(sums)

  def _micro_batches(
    self,
  ) -> Iterator[tuple[Batch, jax.Array, int, tuple[Unread, ...]]]:
    """Yields what `_read` returns; the next one is read meanwhile."""
    each = self._experiment.batch_rows
    # Rows of different capacities share no micro-batch.
    alike: dict[Size, list[tuple[RowPlan, int]]] = {}
    for plan, position in self._rows:
      alike.setdefault(plan.capacity(position), []).append((plan, position))
    parts = [
      (capacity, rows[i : i + each])
      for capacity, rows in alike.items()
      for i in range(0, len(rows), each)
    ]
    with ThreadPoolExecutor(1) as reader:
      coming = reader.submit(self._read, *parts[0])
      for number in range(1, len(parts) + 1):
        found = coming.result()
        if number < len(parts):
          coming = reader.submit(self._read, *parts[number])
        yield found

  def _read(
    self, capacity: Size, rows: Sequence[tuple[RowPlan, int]]
  ) -> tuple[Batch, jax.Array, int, tuple[Unread, ...]]:
    """Reads this host's rows of a micro-batch.

    Args:
      capacity: of its rows.
      rows: as `held_out_rows` returns them; where they are fewer than the
        micro-batch has, the others stay empty.

    Returns:
      The micro-batch and the codes of its targets, on the devices; how many
      samples were read here, and those that could not be.
    """
    spec = dataclasses.replace(self._experiment.row_spec, capacity=capacity)
    mine = self._sharding.local_rows
    batch = empty_rows(spec, len(mine))
    codes = np.zeros(batch.target.shape, np.int32)

    def fill(i: int) -> tuple[int, tuple[Unread, ...]]:
      arrays = row_of(batch, i)
      if mine[i] >= len(rows):
        Row(spec, arrays).finish()
        return 0, ()
      plan, position = rows[mine[i]]
      count, failed = fill_row(self._dataset, plan, spec, position, arrays)
      placed = self._placed(plan, position, failed)
      if len(placed) == count:
        codes[i] = self._row_codes(arrays, placed)
      return count, failed

    with ThreadPoolExecutor(self._experiment.read.threads) as pool:
      counts, failed = zip(*pool.map(fill, range(len(mine))))
    placed = self._sharding(batch), self._sharding.as_targets(codes)
    return *placed, sum(counts), sum(failed, ())

  def _placed(
    self, plan: RowPlan, position: int, failed: Sequence[Unread]
  ) -> list[int]:
    """Returns the samples of a row without those that could not be read."""
    left_out = collections.Counter(item.id for item in failed)
    placed = []
    for index in (i for group in plan.row(position)[1] for i in group):
      name = self._answers[index].name
      if left_out[name]:
        left_out[name] -= 1
      else:
        placed.append(index)
    return placed

  def _row_codes(
    self, arrays: Batch, placed: Sequence[int]
  ) -> Int32[np.ndarray, "L"]:
    """Returns the codes of the targets of a row; 0 where there is none.

    Args:
      arrays: of the row.
      placed: its samples in order.
    """
    codes = np.zeros(len(arrays.target), np.int32)
    for segment, index in enumerate(placed, start=1):
      own = np.flatnonzero(arrays.decoder_segment == segment)
      codes[own] = self._sample_codes(arrays.target[own], index)
    return codes

  def _sample_codes(
    self, targets: Int32[np.ndarray, "n"], index: int
  ) -> Int32[np.ndarray, "n"]:
    """Returns the codes of one sample's targets."""
    stream = int(self._dataset.columns.stream[index])
    code = functools.partial(self._codes.code, stream)
    codes = np.where(targets == IGNORE, 0, code(0, MARKUP))
    _, topics, letters = self._answers[index]
    spans = answer_spans(targets, self._dataset.tokenizer)
    for (start, end), topic, letter in zip(spans, topics, letters):
      codes[start:end] = code(topic, ANSWER)
      if letter:
        codes[start : min(start + 1, end)] = code(topic, LETTER)
    return codes.astype(np.int32)

  def _read_answers(self) -> LabelCodes:
    """Reads what is known of the answers; returns the numbers of their topics.

    Every process reads all records, so that all give a topic the same number.
    """
    rows = [plan.row(position)[1] for plan, position in self._rows]
    indices = [i for row in rows for group in row for i in group]
    records = {index: self._dataset.record(index) for index in indices}
    topics = {
      index: [topic for topic, _, _ in question_facts(record)]
      for index, record in records.items()
    }
    names = sorted({"", *(name for of in topics.values() for name in of)})
    self._answers = {
      index: _Answers(
        record.id,
        [names.index(topic) for topic in topics[index]],
        letter_answers(record.turns),
      )
      for index, record in records.items()
    }
    return LabelCodes(self._dataset.columns.streams, names)
