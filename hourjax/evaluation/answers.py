"""A model's answers to a list of single-question records."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from hourjax import progress
from hourjax.data.dataset import Dataset
from hourjax.data.plan import PlanOptions, RowPlan
from hourjax.data.records import Record, Skipped, check_media
from hourjax.data.rows import RowSpec, Size, build_row, stack_rows
from hourjax.data.sizes import FIELDS
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.inference.generation import generate
from hourjax.training.experiment import DataConfig, Experiment

_ROUNDING = 1.5  # capacities of consecutive groups grow by this factor


def answer_records(
  params: Mapping[str, jax.Array],
  experiment: Experiment,
  records: Sequence[Record],
  *,
  new_tokens: int,
  row_memory: int,
) -> tuple[dict[str, str], list[Skipped]]:
  """Greedy answers by record id.

  Records are answered from short to long in rows of growing capacity, so
  that each compiled shape is close to what it holds.

  Args:
    params: of the model, by path.
    experiment: model, tokenizer and data folders, as trained.
    records: their last gpt turn, if any, is not shown to the model.
    new_tokens: of an answer, at most; cut at the end of turn.
    row_memory: memory tokens that a row of short samples is filled to.

  Returns:
    Answers, and the records that could not be read.
  """
  records, skipped = _with_files(records, experiment.data)
  tokenizer = Tokenizer.from_folder(experiment.data.tokenizer)
  dataset = _dataset(experiment, records, tokenizer, _UNBOUNDED, new_tokens)
  memory = dataset.sizes[:, FIELDS.index("memory")]
  order = dataset.usable[np.argsort(memory[dataset.usable], kind="stable")]
  answers = {}
  bar = progress.bar(len(order), unit="question", desc="answer")
  for group in _groups(memory, order):
    capacity = _capacity(dataset.sizes[group], row_memory)
    spec = dataclasses.replace(experiment.row_spec, capacity=capacity)
    plan = RowPlan(dataset.sizes[group], capacity, PlanOptions(shuffle=False))
    rows = [[int(group[i]) for (i,) in row] for row in plan.epoch_rows(0)]
    most = max(map(len, rows))
    for members in rows:
      samples, failed = _read(dataset, members)
      skipped += failed
      tokens = _answer_row(params, experiment, samples, spec, most, new_tokens)
      for (index, _), ids in zip(samples, tokens):
        answers[dataset.record(index).id] = _text(ids, tokenizer)
      bar.update(len(members))
  bar.close()
  return answers, skipped + dataset.skipped


_UNBOUNDED = Size(*[2**31 - 1] * 7)


def _dataset(experiment, records, tokenizer, capacity, room) -> Dataset:
  data = experiment.data
  spec: RowSpec = dataclasses.replace(experiment.row_spec, capacity=capacity)
  options = dataclasses.replace(
    experiment.sample_options, prompt_only=True, answer_room=room
  )
  return Dataset.from_records(
    records,
    tokenizer=tokenizer,
    spec=spec,
    options=options,
    media_root=data.media,
    features=FeatureStore(data.features) if data.features else None,
  )


def _with_files(records, data: DataConfig):
  """Records whose files are there; stored videos need none."""
  kept, opened = [], []
  for record in records:
    stored = record.modality == "video" and data.features
    (opened if record.media and not stored else kept).append(record)
  if not opened:
    return kept, []
  found, lost = check_media(opened, data.media)
  return kept + found, lost


def _groups(memory: np.ndarray, order: np.ndarray):
  """Consecutive samples whose memories differ by less than `_ROUNDING`."""
  group = []
  for index in order.tolist():
    if group and memory[index] > _ROUNDING * memory[group[0]]:
      yield group
      group = []
    group.append(index)
  if group:
    yield group


def _capacity(sizes: np.ndarray, row_memory: int) -> Size:
  """The largest of each, times the samples that fill `row_memory`."""
  most = Size(*sizes.max(axis=0).tolist())
  times = max(1, row_memory // max(most.memory, 1))
  times = min(times, len(sizes))
  return Size(*(n * times for n in most.astuple()))


def _read(dataset: Dataset, members: Sequence[int]):
  """Samples by index, and those that cannot be read."""
  samples, skipped = [], []
  for index in members:
    made, failed = dataset.samples((index,), 0)
    samples += [(index, sample) for sample in made]
    skipped += [Skipped(item.id, item.reason) for item in failed]
  return samples, skipped


def _answer_row(params, experiment, samples, spec, most, new_tokens):
  """Token ids of the answers; `samples` are (index, sample) pairs."""
  batch = stack_rows([build_row([sample for _, sample in samples], spec)])
  last, start = np.full((1, most), -1, np.int32), 0
  for slot, (_, sample) in enumerate(samples):
    start += sample.size.decoder
    last[0, slot] = start - new_tokens - 1
  tokens = generate(
    params,
    jax.device_put(batch),
    last,
    config=experiment.model,
    new_tokens=new_tokens,
  )
  return np.asarray(tokens)[0, : len(samples)]


def _text(ids: np.ndarray, tokenizer: Tokenizer) -> str:
  """Token ids up to the end of the turn, as text."""
  ends = np.flatnonzero((ids == tokenizer.im_end) | (ids == tokenizer.pad))
  if len(ends):
    ids = ids[: ends[0]]
  return tokenizer.decode(ids.tolist()).strip()
