"""Direct preference optimisation: pairs of answers, and a reference.

What the reference makes of each answer is computed once, before the first step,
and stored in WORKDIR/reference.npz: every pair keeps the memory tokens of epoch
0 whenever it is read, so these numbers stay right. No second model is held
while training.
"""

import functools
import pathlib
import zipfile
from collections.abc import Callable, Generator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float32

from hourjax import progress
from hourjax.atomic_file import replace_file
from hourjax.data.conversations import answer_ids, answer_spans
from hourjax.data.dataset import Dataset, Unread
from hourjax.data.packing.row_plan import PlanOptions, RowPlan
from hourjax.data.pipeline import Delivered
from hourjax.data.rows import Sample
from hourjax.errors import UserError
from hourjax.models.params import with_params
from hourjax.objectives import answer_rows
from hourjax.objectives.answer_rows import AnswerLoader, RowAnswer, Together
from hourjax.objectives.losses import DPO_MEANS, AnswerBatch, dpo_loss
from hourjax.objectives.reference import fingerprint
from hourjax.parallel import hosts, vocabulary
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import Experiment
from hourjax.training.data_loader import DataLoader, open_dataset
from hourjax.training.loop import Objective
from hourjax.training.train_state import Params, TrainState

_NAME = "reference.npz"
CHOSEN, REJECTED = range(2)
_Losses = Float32[np.ndarray, "N 2"]


class PreferenceObjective(Objective):
  """Trains the chosen answer of each pair to be likelier than the rejected.

  Attributes:
    reference: -log r of both answers of each record, by the reference model;
      NaN where a pair could not be read.
  """

  means = DPO_MEANS
  reference: _Losses

  def __init__(self, experiment: Experiment):
    """Opens nothing yet."""
    super().__init__(experiment)
    asked = experiment.objective
    self.loss = functools.partial(
      dpo_loss,
      beta=asked.beta,
      smoothing=asked.smoothing,
      sft_weight=asked.sft_weight,
    )

  def open_dataset(self) -> Dataset:
    """Opens the dataset; a sample takes what both of its answers take.

    Raises:
      UserError: too many records have no rejected answer, or are too large.
    """
    dataset, most = open_dataset(self.experiment), self.experiment.max_length
    columns, sizes = dataset.columns, dataset.sizes
    decoder = answer_rows.decoder_of(sizes)
    longer = columns.rejected - columns.tokens
    # Of a chosen answer that was cut, the true length is not known.
    other = np.where(decoder < most, np.minimum(decoder + longer, most), most)
    usable = [*dataset.usable.tolist(), *dataset.held_out.tolist()]
    problems = {
      i: "has no rejected answer, and config.objective.name is dpo, which"
      " learns from pairs; write it as 'rejected' in the last turn, drop the"
      " record, or set config.objective.name=sft"
      for i in usable
      if not columns.rejected[i] and not columns.held_out[i]
    }
    both = answer_rows.with_answers(
      sizes, answer_rows.queries_of(sizes), decoder + np.maximum(other, 0)
    )
    # Held-out data is evaluated by its answers alone.
    both[columns.held_out > 0] = sizes[columns.held_out > 0]
    answer_rows.set_sizes(dataset, self.experiment, both, problems)
    return dataset

  def start(
    self,
    dataset: Dataset,
    plan: RowPlan,
    sharding: BatchSharding,
    state: TrainState,
    workdir: pathlib.Path,
  ) -> None:
    """Reads what the reference makes of all answers, or computes it.

    Raises:
      UserError: the run goes on, and the file is missing or of other data.
    """
    path, rows = workdir / _NAME, plan.fingerprint()
    weights = ""
    if int(state.step) == 0:
      weights = fingerprint(state.trained | state.frozen)
    with hosts.together():
      found = _read(path, rows, weights, len(dataset.columns))
    if found is None:
      if not weights:
        raise UserError(
          f"{path}, the reference's log-probabilities of this run, is missing"
          f" or of other rows than {rows}; put it back, or start another"
          " workdir with config.init set to this one"
        )
      found = self._compute(dataset, sharding, state)
      with hosts.together():
        if hosts.is_primary():
          _write(path, rows, weights, found)
    self.reference = found

  def data_loader(
    self,
    dataset: Dataset,
    plan: RowPlan,
    sharding: BatchSharding,
    position: int,
  ) -> DataLoader:
    """Starts to read this process's rows of pairs."""
    made = self._delivered(dataset, plan, sharding, position, self.reference)
    return AnswerLoader(made, sharding)

  def _delivered(
    self,
    dataset: Dataset,
    plan: RowPlan,
    sharding: BatchSharding,
    position: int,
    reference: _Losses | None,
  ) -> Generator[tuple[AnswerBatch, Delivered], None, None]:
    """Yields micro-batches of pairs; without reference `pair` is a code."""

    def answers(position: int) -> tuple[list[Together], list[Unread]]:
      _, groups = plan.row(position)
      pairs: list[Together] = []
      failed: list[Unread] = []
      for group in groups:
        found, unread = self._pairs(dataset, group, reference, len(pairs))
        pairs, failed = [*pairs, *found], [*failed, *unread]
      return pairs, failed

    return answer_rows.deliver_answers(
      plan,
      self.experiment.row_spec,
      answers,
      rows=self.experiment.batch_rows,
      mine=sharding.local_rows,
      start=position,
      threads=self.experiment.read.threads,
    )

  def _pairs(
    self,
    dataset: Dataset,
    group: Sequence[int],
    reference: _Losses | None,
    before: int,
  ) -> tuple[list[Together], list[Unread]]:
    """Reads the pairs of records that share a memory.

    Args:
      dataset: of the run.
      group: the records.
      reference: of all records; None while it is computed. Then the number of
        a pair's answer is 1 + 2 x its record + which of both it is.
      before: pairs in the row so far.
    """
    found, failed = [], []
    samples, unread = _samples(dataset, group)
    failed += unread
    reuse = False
    for index, sample in samples:
      if reference is not None and np.isnan(reference[index]).any():
        reason = f"record {sample.name} could not be read by the reference"
        failed.append(Unread(sample.name, "reference", reason))
        continue
      try:
        pair = self._pair(dataset, index, sample, reuse)
      except UserError as error:
        failed.append(Unread(sample.name, error.kind, str(error)))
        continue
      reuse = True
      number = before + len(found) + 1
      made = []
      for side, answer in enumerate(pair):
        targets = answer.layout.targets
        own = np.zeros(len(targets), np.float32)
        if reference is not None:
          own[np.argmax(targets >= 0)] = reference[index, side]
        made.append(
          RowAnswer(
            answer,
            number if reference is not None else 1 + 2 * index + side,
            1 / (targets >= 0).sum() if side == CHOSEN else 0.0,
            own,
          )
        )
      found.append(made)
    return found, failed

  def _pair(
    self, dataset: Dataset, index: int, sample: Sample, reuse: bool
  ) -> list[Sample]:
    """Returns a record's chosen and rejected answer as samples."""
    record, tokenizer = dataset.record(index), dataset.tokenizer
    spans = answer_spans(sample.layout.labels, tokenizer)
    asked = sum(turn.role == "gpt" for turn in record.turns)
    most = self.experiment.max_length
    if len(spans) < asked:
      raise UserError(
        f"record {record.id}: its conversation is cut at config.max_length="
        f"{most} before the last answer; raise it, or shorten the record",
        kind="cut",
      )
    prompt = answer_rows.cut_prompt(sample.layout, spans[-1][0])
    texts = record.turns[-1].text, record.rejected or ""
    answers = []
    for side, text in enumerate(texts):
      ids = answer_ids(text, tokenizer)
      end = len(ids) - ids[::-1].index(tokenizer.im_end)
      layout = answer_rows.answer_layout(prompt, ids[:end], most)
      sign = np.float32((1, -1)[side])
      weights = np.where(layout.targets >= 0, sign, np.float32(0))
      answers.append(
        Sample(
          sample.name,
          layout,
          sample.kind,
          sample.visual,
          reuses_memory=reuse or side > 0,
          reuses_queries=side > 0,
          weights=weights,
        )
      )
    return answers

  def _compute(
    self, dataset: Dataset, sharding: BatchSharding, state: TrainState
  ) -> _Losses:
    """Returns -log r of both answers of each usable record."""
    columns = dataset.columns
    sums = np.full(2 * len(columns), np.nan)
    program = self._program(state)
    with progress.bar(
      len(dataset.usable), unit="pair", desc="reference"
    ) as bar:
      for stream in np.unique(columns.stream[dataset.usable]).tolist():
        members = dataset.usable[columns.stream[dataset.usable] == stream]
        capacity = self.experiment.rows_by_stream.get(
          columns.streams[stream], self.experiment.rows
        )
        plan = RowPlan(
          dataset.sizes,
          capacity,
          PlanOptions(shuffle=False, share=self.experiment.data.share_memory),
          members=members,
          memory=columns.video,
        )
        loader = AnswerLoader(
          self._delivered(dataset, plan, sharding, 0, None), sharding
        )
        try:
          left = plan.rows_in_epoch(0)
          while left > 0:
            rows, delivered = next(loader)
            codes, losses = program(state.trained, state.frozen, rows)
            _add_up(sums, np.asarray(codes), np.asarray(losses))
            left -= self.experiment.batch_rows
            bar.update(min(delivered.samples // 2, bar.total - bar.n))
        finally:
          loader.close()
    return sums.reshape(-1, 2).astype(np.float32)

  def _program(
    self, state: TrainState
  ) -> Callable[[Params, Params, AnswerBatch], tuple[jax.Array, jax.Array]]:
    """Returns the compiled losses of the labels of a micro-batch."""
    config = self.experiment.model
    replicated = state.step.sharding
    assert isinstance(replicated, NamedSharding)
    mesh = replicated.mesh
    assert isinstance(mesh, Mesh)

    def losses(
      trained: Params, frozen: Params, rows: AnswerBatch
    ) -> tuple[jax.Array, jax.Array]:
      model = with_params(config, {**frozen, **trained})
      hidden = model(rows.batch)
      table = model.output_embedding
      return rows.pair, vocabulary.token_losses(hidden, table, rows.target)

    compiled = jax.jit(losses, out_shardings=replicated)

    def run(
      trained: Params, frozen: Params, rows: AnswerBatch
    ) -> tuple[jax.Array, jax.Array]:
      with jax.set_mesh(mesh):
        return compiled(trained, frozen, rows)

    return run


def _samples(
  dataset: Dataset, group: Sequence[int]
) -> tuple[list[tuple[int, Sample]], list[Unread]]:
  """Reads the chosen samples of a group, with their indices."""
  found, failed = dataset.samples(group, 0)
  left = [item.id for item in failed]
  indices = []
  for index in group:
    name = dataset.record(index).id
    if name in left:
      left.remove(name)
    else:
      indices.append(index)
  return list(zip(indices, found, strict=True)), failed


def _add_up(sums: np.ndarray, codes: np.ndarray, losses: np.ndarray) -> None:
  """Sets the sums of the answers whose codes occur."""
  there = codes > 0
  found, place = np.unique(codes[there] - 1, return_inverse=True)
  sums[found] = np.bincount(place, losses[there].astype(np.float64))


def _write(path: pathlib.Path, rows: str, weights: str, found: _Losses) -> None:
  try:
    with replace_file(path) as partial, open(partial, "wb") as file:
      np.savez(
        file, losses=found, rows=np.array(rows), weights=np.array(weights)
      )
  except OSError as error:
    raise UserError(
      f"{path} cannot be written ({error}); make room, or choose another"
      " --workdir"
    ) from None


def _read(
  path: pathlib.Path, rows: str, weights: str, count: int
) -> _Losses | None:
  """Reads what `_write` wrote; None if that is of other rows or weights.

  Args:
    path: of the file.
    rows: fingerprint of the plan.
    weights: fingerprint of the weights; "" takes those of the file.
    count: number of records.
  """
  if not path.exists():
    return None
  try:
    with np.load(path, allow_pickle=False) as file:
      same = str(file["rows"]) == rows
      same &= weights in ("", str(file["weights"]))
      found = file["losses"]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None
  fits = found.shape == (count, 2) and found.dtype == np.float32
  return found if same and fits else None
