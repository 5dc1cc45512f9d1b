"""The training data of an experiment: samples, and the plan of their rows."""
# MERGED hourjax.training.feed:
# Batches on the device ahead of use, and what could not be read of them.

import collections
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from hourjax import schema
from hourjax.atomic_file import write_whole
from hourjax.batch import Batch
from hourjax.data.columns import Columns
from hourjax.data.dataset import Dataset, Unread
from hourjax.data.pipeline import Delivered
from hourjax.data.prepared import Prepared
from hourjax.data.row_plan import PlanOptions, RowPlan
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.jsonl import read_rows
from hourjax.training.batch_sharding import Placing
from hourjax.training.config import Experiment

_SHOWN = 20
MOST_WEIGHT = 10_000
_MOST_SAMPLES = 2**28  # of an epoch, whose order is an array in memory


def open_dataset(experiment: Experiment) -> Dataset:
  """The prepared dataset with the features there are.

  Raises:
    UserError: if it was prepared for another tokenizer, or more than
      `data.max_skipped` of the samples cannot be used.
  """
  data = experiment.data
  for key in ("dataset", "tokenizer"):
    if not getattr(data, key):
      raise UserError(
        f"config.data.{key} is empty; set --config.data.{key}=FOLDER (a dataset"
        " is what `python -m hourjax.prepare` writes)"
      )
  prepared = Prepared(data.dataset)
  tokenizer = Tokenizer.from_folder(data.tokenizer)
  if prepared.about["tokenizer_id"] != tokenizer.fingerprint:
    raise UserError(
      f"{data.dataset} was prepared for tokenizer"
      f" {prepared.about['tokenizer_id']}, {data.tokenizer} is"
      f" {tokenizer.fingerprint}; prepare again with --tokenizer="
      f"{data.tokenizer}, or correct config.data.tokenizer"
    )
  dataset = Dataset(
    prepared.records,
    prepared.columns,
    tokenizer=tokenizer,
    spec=experiment.row_spec,
    options=experiment.sample_options,
    media_root=data.media,
    features=FeatureStore(data.features) if data.features else None,
  )
  total = len(prepared.columns)
  if not len(dataset) or len(dataset.skipped) > data.max_skipped * total:
    reasons = [item.reason for item in dataset.skipped[:_SHOWN]]
    if len(dataset.skipped) > _SHOWN:
      reasons.append(f"... and {len(dataset.skipped) - _SHOWN} more")
    raise UserError(
      f"{len(dataset.skipped)} of {total} records of {data.dataset} cannot be"
      f" used, config.data.max_skipped={data.max_skipped} allows fewer; mend"
      " them or raise it:\n  " + "\n  ".join(reasons)
    )
  return dataset


def row_plan(experiment: Experiment, dataset: Dataset) -> RowPlan:
  """The rows of a run: a function of data, capacity and seed alone."""
  columns, data = dataset.columns, experiment.data
  return RowPlan(
    dataset.sizes,
    experiment.rows,
    PlanOptions(seed=experiment.seed, share=data.share_memory),
    members=dataset.usable,
    memory=columns.video,
    stream=columns.stream,
    weight=sample_weights(columns, data.weights),
  )


def sample_weights(columns: Columns, weights: str) -> np.ndarray:
  """float [N]: what "name=weight,..." says of each sample's stream or source.

  A name that is both is written "stream:name" or "source:name".

  Raises:
    UserError: not of this form, a name that does not occur or is both, a
      weight below zero or above MOST_WEIGHT, or an epoch of more samples than
      can be meant.
  """
  result = np.ones(len(columns))
  kinds = {
    "stream": (columns.streams, columns.stream),
    "source": (columns.sources, columns.source),
  }
  for item in filter(None, weights.split(",")):
    key, _, value = (part.strip() for part in item.rpartition("="))
    found = [
      (kind, name)
      for kind, (names, _) in kinds.items()
      for name in names
      if key in (name, f"{kind}:{name}")
    ]
    weight = _number(value)
    if len(found) != 1 or weight is None:
      raise UserError(
        f"config.data.weights: {item!r} must be NAME=WEIGHT with a weight from"
        f" 0 to {MOST_WEIGHT} and the name of one stream or source"
        " (stream:NAME or source:NAME if it is both); streams:"
        f" {', '.join(columns.streams)}; sources: {', '.join(columns.sources)}"
      )
    ((kind, name),) = found
    names, column = kinds[kind]
    result[column == names.index(name)] *= weight
  if (total := result.sum()) > _MOST_SAMPLES:
    raise UserError(
      f"config.data.weights={weights!r} makes an epoch of {total:.3g} samples"
      f" of {len(columns)}, at most {_MOST_SAMPLES} are meant; lower them, or"
      " set config.steps"
    )
  return result


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if 0 <= value <= MOST_WEIGHT else None


# A few failures at the start are no share yet.
_ENOUGH_SAMPLES = 1000
_SHOWN_feed = 20


class Feed:
  """Iterates over (micro-batch on the devices, what was delivered).

  While one is computed with, the next one is copied to the devices.

  Attributes:
    waited: seconds that the caller spent waiting for data.
  """

  def __init__(self, delivered: Iterator[Delivered], placing: Placing):
    """Starts reading.

    Args:
      delivered: endless, this host's rows of each micro-batch.
      placing: puts them on the devices.
    """
    self.waited = 0.0
    self._delivered, self._placing = delivered, placing
    self._pool = ThreadPoolExecutor(1)
    self._next: Future = self._pool.submit(self._place)

  def __iter__(self) -> "Feed":
    return self

  def __next__(self) -> tuple[Batch, Delivered]:
    began = time.monotonic()
    batch, delivered = self._next.result()
    self.waited += time.monotonic() - began
    self._next = self._pool.submit(self._place)
    return batch, delivered

  def close(self) -> None:
    """Stops reading; the batch being read is dropped."""
    self._pool.shutdown(wait=True, cancel_futures=True)
    self._delivered.close()

  def _place(self) -> tuple[Batch, Delivered]:
    delivered = next(self._delivered)
    return self._placing(delivered.batch), delivered


class _Line(schema.Schema):
  """What is read back of a line of `UnreadLedger`."""

  step: int
  kind: str


class UnreadLedger:
  """WORKDIR/unread.jsonl: samples that were left out of their rows.

  Every process notes those of its own rows; from the second one on in
  unread-1.jsonl and so on.

  Attributes:
    counts: of failures by kind, since the run began.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start: int,
    max_share: float,
    process: int = 0,
  ):
    """Keeps the lines up to step `start`; later steps are taken again."""
    name = f"unread-{process}.jsonl" if process else "unread.jsonl"
    self._path = pathlib.Path(workdir) / name
    self._max_share = max_share
    self._seen = 0
    self._new: list[Unread] = []
    self.counts: collections.Counter[str] = collections.Counter()
    if self._path.exists():
      lines = read_rows(self._path, {"step": _Line})
      kept = [line for line in lines if line["step"] <= start]
      self.counts.update(line["kind"] for line in kept)
      write_whole(self._path, "".join(json.dumps(x) + "\n" for x in kept))

  def add(self, step: int, delivered: Delivered) -> None:
    """Notes what a step's rows lack.

    Raises:
      UserError: more than the share of the samples seen since the start (but
        at least of 1000) could not be read.
    """
    self._seen += delivered.samples + len(delivered.unread)
    if not delivered.unread:
      return
    with open(self._path, "a") as file:
      for item in delivered.unread:
        line = {"step": step, **dataclasses.asdict(item)}
        file.write(json.dumps(line) + "\n")
    self._new += delivered.unread
    self.counts.update(item.kind for item in delivered.unread)
    if len(self._new) > self._max_share * max(self._seen, _ENOUGH_SAMPLES):
      reasons = "\n  ".join(item.reason for item in self._new[-_SHOWN_feed:])
      raise UserError(
        f"step {step}: {len(self._new)} of {self._seen} samples could not be"
        f" read, more than config.data.max_skipped={self._max_share}; mend"
        f" them or raise it (all are in {self._path}):\n  {reasons}"
      )
