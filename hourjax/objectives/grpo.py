"""Group-relative policy optimisation: rewards of answers that are sampled.

A step takes questions from the data, samples `group` answers to each with the
weights at hand, rewards them, and raises the probability of those that are
better than the mean of their group (arXiv 2402.03300). The answers to a
question share its encoded memory and prefill when they are sampled, and its
memory and queries in the row that is trained on.

With one update for each sampling, ratios of probabilities are 1 and nothing is
clipped. Answers depend on (seed, step, record) and the weights alone, so a run
that goes on samples what it would have sampled.
"""

import functools
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from hourjax.data.dataset import Dataset, Unread
from hourjax.data.packing.row_plan import RowPlan
from hourjax.data.pipeline import Delivered
from hourjax.data.rows import Sample
from hourjax.errors import UserError
from hourjax.models.params import with_params
from hourjax.objectives import answer_rows
from hourjax.objectives.answer_rows import RowAnswer, Together
from hourjax.objectives.losses import AnswerBatch, grpo_loss, grpo_means
from hourjax.objectives.reference import reference_params
from hourjax.objectives.rewards import (
  JUDGE,
  Judge,
  Reward,
  advantages,
  check_names,
  total_reward,
)
from hourjax.objectives.rollouts import Group, Prompted, Sampler
from hourjax.parallel import hosts, vocabulary
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import Experiment
from hourjax.training.data_loader import DataLoader, open_dataset
from hourjax.training.loop import Objective
from hourjax.training.train_state import Params, TrainState

_JUDGED = "judged.jsonl"
_NO_STATE = TrainState(None, {}, {}, None)  # before the first step


class RewardObjective(Objective):
  """Trains on rewards of answers that the model samples itself."""

  def __init__(self, experiment: Experiment, rewards: Mapping[str, Reward]):
    """Opens nothing yet.

    Args:
      experiment: of the run.
      rewards: that it may name.

    Raises:
      UserError: a reward is unknown.
    """
    super().__init__(experiment)
    self._rewards = dict(rewards)
    asked = experiment.objective
    self._weights = asked.reward_weights()
    check_names(self._weights, rewards, asked.judge)
    self.loss = functools.partial(grpo_loss, kl=asked.kl)
    self.means = grpo_means(asked.kl)

  def open_dataset(self) -> Dataset:
    """Opens the dataset; a sample takes a row's room for its whole group.

    Raises:
      UserError: too many groups do not fit, or there are several processes.
    """
    if hosts.count() > 1:
      raise UserError(
        f"config.objective.name=grpo samples answers in one process, and"
        f" {hosts.count()} were started; start one, on the devices of one host"
      )
    dataset, asked = open_dataset(self.experiment), self.experiment.objective
    sizes = dataset.sizes
    # A prompt is at most the whole record. In inference all its words are
    # queries, and not only those that training takes.
    decoder = answer_rows.decoder_of(sizes)
    queries = np.where(
      answer_rows.queries_of(sizes) > 0, np.maximum(decoder, 0), 0
    )
    each = np.minimum(decoder + asked.max_tokens, self.experiment.max_length)
    groups = answer_rows.with_answers(sizes, queries, asked.group * each)
    held_out = dataset.columns.held_out > 0
    groups[held_out] = sizes[held_out]  # evaluated by their answers alone
    answer_rows.set_sizes(dataset, self.experiment, groups, {})
    return dataset

  def start(
    self,
    dataset: Dataset,
    plan: RowPlan,
    sharding: BatchSharding,
    state: TrainState,
    workdir: pathlib.Path,
  ) -> None:
    """Prepares sampling, and the reference where the divergence counts.

    Raises:
      UserError: the reference is no longer that of the run, or the memory
        cannot be split over the devices.
    """
    self._sampler = Sampler(self.experiment, dataset, state.step.sharding.mesh)
    self._reference: Params | None = None
    if self.experiment.objective.kl:
      self._reference = reference_params(self.experiment, state, workdir)
    if JUDGE in self._weights:
      path = workdir / _JUDGED
      self._rewards[JUDGE] = Judge(self.experiment.objective.judge, path)

  def data_loader(
    self,
    dataset: Dataset,
    plan: RowPlan,
    sharding: BatchSharding,
    position: int,
  ) -> DataLoader:
    """Starts to read the questions of this run."""
    return RolloutLoader(
      self.experiment,
      dataset,
      plan,
      sharding,
      position,
      sampler=self._sampler,
      rewards=self._rewards,
      weights=self._weights,
      reference=self._reference,
    )


class RolloutLoader(DataLoader):
  """Iterates over micro-batches of answers that the model has just sampled.

  The visual input of the next micro-batch is read while the one before is
  computed with; its answers are sampled when it is asked for.
  """

  def __init__(
    self,
    experiment: Experiment,
    dataset: Dataset,
    plan: RowPlan,
    sharding: BatchSharding,
    position: int,
    *,
    sampler: Sampler,
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    reference: Params | None,
  ):
    """Starts to read.

    Args:
      experiment: of the run.
      dataset: of questions.
      plan: of their rows.
      sharding: puts rows onto the devices.
      position: of the first row.
      sampler: samples answers.
      rewards: by name.
      weights: of those that count.
      reference: trained parameters of the reference model; None if the
        divergence from it does not count.
    """
    self.waited = 0.0
    self._experiment, self._dataset, self._plan = experiment, dataset, plan
    self._sharding, self._sampler = sharding, sampler
    self._rewards, self._weights = rewards, weights
    self._reference, self._state = reference, _NO_STATE
    self._step, self._sums = 0, _Sums()
    self._pool = ThreadPoolExecutor(experiment.read.threads)
    self._read_ahead(plan.advance(position, 0))

  def begin_step(self, step: int, state: TrainState) -> None:
    """Samples with the weights before a step from now on."""
    self._step, self._state, self._sums = step, state, _Sums()
    self._sampler.use(state)

  @property
  def metrics(self) -> dict[str, float]:  # pyrefly: ignore[bad-override]
    """Returns the rewards of the step, and what sampling them took."""
    return self._sums.metrics()

  def __next__(self) -> tuple[Any, Delivered]:
    """Returns a micro-batch of answers, which it samples.

    Raises:
      UserError: a reward is not a finite number for each answer.
    """
    began = time.monotonic()
    rows = [[job.result() for job in row] for row in self._coming]
    self.waited += time.monotonic() - began
    first, after = self._first, self._after
    self._read_ahead(after)
    unread = [x for row in rows for x in row if isinstance(x, Unread)]
    read = [[x for x in row if isinstance(x, Prompted)] for row in rows]
    began = time.monotonic()
    groups = self._sampler.sample([p for row in read for p in row], self._step)
    self._sums.seconds += time.monotonic() - began
    made, failed, count = self._rows(read, groups, first)
    unread += failed
    batch = answer_rows.on_devices(made, self._sharding)
    if self._reference is not None:
      batch = batch._replace(reference=self._reference_losses(batch))
    ends = self._plan.begins_step(after)
    return batch, Delivered(made.batch, after, ends, count, tuple(unread))

  def close(self) -> None:
    """Stops to read."""
    self._pool.shutdown(wait=True, cancel_futures=True)

  def _read_ahead(self, first: int) -> None:
    """Starts to read the questions of the micro-batch at a position."""
    rows = self._experiment.batch_rows
    found, after = self._plan.take(first, rows)
    self._first, self._after = first, after
    self._coming: list[list[Future]] = [
      [self._pool.submit(self._read, g) for g in self._plan.row(place)[1]]
      for place in found
    ]

  def _read(self, group: Sequence[int]) -> Prompted | Unread:
    """Reads questions about one memory."""
    name = self._dataset.record(group[0]).id
    try:
      return self._sampler.read(group)
    except UserError as error:
      return Unread(name, error.kind, str(error))
    except OSError as error:
      return Unread(name, "unreachable", f"record {name}: {error}")

  def _rows(
    self,
    read: Sequence[Sequence[Prompted]],
    groups: Sequence[Group],
    first: int,
  ) -> tuple[AnswerBatch, list[Unread], int]:
    """Rewards answers, and lays them into the rows of a micro-batch.

    Args:
      read: by row, the questions about each memory.
      groups: answers to all of them, in their order.
      first: position of the first row.
    """
    capacity = self._plan.capacity(first)
    spec = answer_rows.with_capacity(self._experiment.row_spec, capacity)
    made = answer_rows.empty_answers(spec, self._experiment.batch_rows)
    unread: list[Unread] = []
    coming, total = iter(groups), 0
    for number in range(self._experiment.batch_rows):
      row = read[number] if number < len(read) else []
      of_row = [next(coming) for p in row for _ in p.layouts]
      count, failed = answer_rows.fill_answers(
        spec, made, number, self._together(of_row)
      )
      total += count
      unread += failed
    return made, unread, total

  def _together(self, groups: Sequence[Group]) -> Iterable[Together]:
    """Yields the answers of each group as they are laid into a row."""
    asked, most = self._experiment.objective, self._experiment.max_length
    for number, group in enumerate(groups, start=1):
      rewards, means = total_reward(
        self._rewards, self._weights, group.question, group.texts
      )
      self._sums.add(group, rewards, means)
      gains = advantages(rewards, asked.normalise)
      prompted = group.prompted
      answers = []
      for place, (ids, gain) in enumerate(zip(group.ids, gains)):
        layout = answer_rows.answer_layout(group.layout, ids, most)
        targets = layout.targets
        share = 1 / max((targets >= 0).sum(), 1)
        weights = np.where(targets >= 0, gain * share, 0).astype(np.float32)
        sample = Sample(
          group.question.id,
          layout,
          prompted.kind,
          prompted.visual,
          reuses_memory=group.number > 0 or place > 0,
          reuses_queries=place > 0,
          weights=weights,
        )
        nothing = np.zeros(len(targets), np.float32)
        answers.append(RowAnswer(sample, number, share, nothing))
      yield answers

  def _reference_losses(self, rows: AnswerBatch) -> jax.Array:
    """Returns -log r of each label by the reference model."""
    state = self._state
    assert self._reference is not None
    with jax.set_mesh(state.step.sharding.mesh):
      return _reference_losses(
        self._reference, state.frozen, rows, config=self._experiment.model
      )


@functools.partial(jax.jit, static_argnames="config")
def _reference_losses(
  trained: Params, frozen: Params, rows: AnswerBatch, *, config: Any
) -> jax.Array:
  model = with_params(config, {**frozen, **trained})
  hidden = model(rows.batch)
  return vocabulary.token_losses(hidden, model.output_embedding, rows.target)


class _Sums:
  """Adds up what is logged of the answers of a step."""

  def __init__(self) -> None:
    self.seconds = 0.0
    self._groups = self._answers = self._tokens = 0
    self._reward = self._spread = self._equal = self._finished = 0.0
    self._by_name: dict[str, float] = {}

  def add(
    self, group: Group, rewards: np.ndarray, means: Mapping[str, float]
  ) -> None:
    """Adds a group of answers with their rewards."""
    self._groups += 1
    self._answers += len(group.ids)
    self._tokens += sum(map(len, group.ids))
    self._reward += float(rewards.mean())
    self._spread += float(rewards.std())
    self._equal += float(np.ptp(rewards) == 0)
    self._finished += group.finished
    for name, mean in means.items():
      self._by_name[name] = self._by_name.get(name, 0.0) + mean

  def metrics(self) -> dict[str, float]:
    """Returns the means over groups, by name."""
    if not self._groups:
      return {}
    means = {
      "reward": self._reward,
      "reward_std": self._spread,
      "equal_groups": self._equal,
      "finished": self._finished,
      **{f"reward/{name}": x for name, x in self._by_name.items()},
    }
    return {f"grpo/{k}": v / self._groups for k, v in means.items()} | {
      "grpo/answers": float(self._answers),
      "grpo/answer_tokens": self._tokens / self._answers,
      "grpo/sampling_seconds": self.seconds,
    }
