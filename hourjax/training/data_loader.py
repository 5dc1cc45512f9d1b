"""The training data of an experiment: from a dataset to batches on devices.

`open_dataset` reads what was prepared, `row_plan` decides which samples make
which rows, `DataLoader` copies micro-batches to the devices while the one
before is computed with, and `UnreadSampleLog` lists samples that could not be
read.
"""

import collections
import dataclasses
import os
import pathlib
import time
import types
import zipfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hourjax import schema
from hourjax.atomic_file import replace_file
from hourjax.data.columns import Columns
from hourjax.data.dataset import Dataset, Unread
from hourjax.data.forgetting import EMBEDDER_PARAMS, Embedder
from hourjax.data.packing.row_plan import PlanOptions, RowPlan
from hourjax.data.pipeline import Delivered
from hourjax.data.prepared import Prepared
from hourjax.data.rows import batch_capacity
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.jsonl import JsonlWriter, read_valid_rows
from hourjax.models.config import ModelConfig
from hourjax.models.flops import uneven_flops
from hourjax.models.params import narrow_dtype
from hourjax.parallel import hosts
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import DataConfig, Experiment
from hourjax.training.train_state import TrainState

_LISTED = 20  # reasons in a message
MAX_WEIGHT = 10_000
_MAX_SAMPLES = 2**28  # of an epoch, whose order is an array in memory
# Samples that the share of failures is at least taken of: a few failures right
# after the start must not stop a run.
_ENOUGH_SAMPLES = 1000


def open_dataset(experiment: Experiment) -> Dataset:
  """Opens the prepared dataset and its feature store.

  Args:
    experiment: of the run; its `data` says where they are.

  Raises:
    UserError: `data.dataset` or `data.tokenizer` is empty, the dataset was
      prepared for another tokenizer, more than `data.max_skipped` of its
      records cannot be used, or `data.media` is empty and videos come as
      pixels.
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
    stream_rows=experiment.rows_by_stream,
  )
  total = len(prepared.columns)
  if not len(dataset) or len(dataset.skipped) > data.max_skipped * total:
    reasons = [item.reason for item in dataset.skipped[:_LISTED]]
    if len(dataset.skipped) > _LISTED:
      reasons.append(f"... and {len(dataset.skipped) - _LISTED} more")
    raise UserError(
      f"{len(dataset.skipped)} of {total} records of {data.dataset} cannot be"
      f" used, config.data.max_skipped={data.max_skipped} allows fewer; mend"
      " them or raise it:\n  " + "\n  ".join(reasons)
    )
  _check_media(data, dataset)
  return dataset


def _check_media(data: DataConfig, dataset: Dataset) -> None:
  """Raises a UserError if videos come as pixels and no media folder is set."""
  pixels = dataset.pixel_videos()
  if data.media or not pixels or pathlib.Path(pixels[0]).exists():
    return
  wanted = f"set --config.data.media=FOLDER to read the pixels of {pixels[0]}"
  if data.features:
    wanted += f", or extract them to {data.features}"
  raise UserError(
    f"config.data.media is empty, and {len(pixels):,} videos come as pixels;"
    f" {wanted}"
  )


def row_plan(experiment: Experiment, dataset: Dataset) -> RowPlan:
  """Returns the plan of all rows, a function of data, capacity and seed."""
  columns, data = dataset.columns, experiment.data
  return RowPlan(
    dataset.sizes,
    experiment.rows,
    PlanOptions(
      seed=experiment.seed,
      share=data.share_memory,
      batch_samples=experiment.batch_samples,
      drop_last=experiment.drop_last,
    ),
    members=dataset.usable,
    memory=columns.video,
    stream=columns.stream,
    weight=sample_weights(columns, data.weights),
    **plan_by_work(experiment, dataset.sizes, columns.streams),
  )


def plan_by_work(
  experiment: Experiment, sizes: np.ndarray, streams: Sequence[str]
) -> dict[str, Any]:
  """Returns the arguments of `RowPlan` that depend on what rows cost.

  Args:
    experiment: with the model and the capacities.
    sizes: of all samples, `[N, 7]`.
    streams: the names of the streams, by number.
  """
  own = experiment.rows_by_stream
  return {
    "stream_capacity": {
      number: own[name] for number, name in enumerate(streams) if name in own
    },
    "work": uneven_flops(experiment.model, sizes),
  }


def sample_weights(columns: Columns, weights: str) -> np.ndarray:
  """Returns how often each sample is taken in an epoch, float [samples].

  Args:
    columns: of the dataset, with the stream and the source of each sample.
    weights: "NAME=WEIGHT,..." with names of streams or sources; the weights of
      a sample's stream and source are multiplied. A name that is both is
      written "stream:NAME" or "source:NAME".

  Raises:
    UserError: the text has another form, a name does not occur or is both, a
      weight is below 0 or above `MAX_WEIGHT`, or an epoch would have too many
      samples.
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
        f" 0 to {MAX_WEIGHT} and the name of one stream or source"
        " (stream:NAME or source:NAME if it is both); streams:"
        f" {', '.join(columns.streams)}; sources: {', '.join(columns.sources)}"
      )
    ((kind, name),) = found
    names, column = kinds[kind]
    result[column == names.index(name)] *= weight
  if (total := result.sum()) > _MAX_SAMPLES:
    raise UserError(
      f"config.data.weights={weights!r} makes an epoch of {total:.3g} samples"
      f" of {len(columns)}, at most {_MAX_SAMPLES} are meant; lower them, or"
      " set config.steps"
    )
  return result


def _number(text: str) -> float | None:
  """Returns a weight, None if the text is none."""
  try:
    value = float(text)
  except ValueError:
    return None
  return value if 0 <= value <= MAX_WEIGHT else None


class DataLoader:
  """Iterates over micro-batches on the devices, and prefetches the next one.

  While one micro-batch is computed with, a thread reads the next one and copies
  it to the devices.

  Attributes:
    waited: seconds that the caller has spent waiting for data.
    metrics: of the micro-batches of the step, where there are any.
  """

  metrics: Mapping[str, float] = types.MappingProxyType({})

  def __init__(
    self,
    delivered: Generator[Any, None, None],
    sharding: BatchSharding,
  ):
    """Starts to read.

    Args:
      delivered: endless, this host's rows of each micro-batch.
      sharding: puts them onto the devices.
    """
    self.waited = 0.0
    self._delivered, self._sharding = delivered, sharding
    self._pool = ThreadPoolExecutor(1)
    self._next: Future[tuple[Any, Delivered]] = self._pool.submit(self._load)

  def begin_step(self, step: int, state: TrainState) -> None:
    """Is told that the micro-batches to come are of a step.

    Args:
      step: its number.
      state: before it.
    """

  def __iter__(self) -> "DataLoader":
    return self

  def __next__(self) -> tuple[Any, Delivered]:
    """Returns a micro-batch on the devices, and the rows that it was made of.

    Raises:
      Exception: whatever reading the rows has raised.
    """
    began = time.monotonic()
    batch, delivered = self._next.result()
    self.waited += time.monotonic() - began
    self._next = self._pool.submit(self._load)
    return batch, delivered

  def close(self) -> None:
    """Stops to read; the micro-batch that is being read is dropped."""
    self._pool.shutdown(wait=True, cancel_futures=True)
    self._delivered.close()

  def _load(self) -> tuple[Any, Delivered]:
    """Reads the next micro-batch and copies it to the devices."""
    delivered = next(self._delivered)
    return self._sharding(delivered.batch), delivered


class MicroBatches:
  """Iterates over one step's micro-batches on the devices.

  Attributes:
    capacity: of their rows.
    delivered: the rows that each of them was made of, so far.
  """

  def __init__(self, loader: DataLoader, count: int):
    """Loads the first one.

    Args:
      loader: of all steps.
      count: how many there are; 0 for as many as the step's samples need.
    """
    self._loader, self._count = loader, count
    self.delivered: list[Delivered] = []
    # Loaded at once: its shapes decide which program runs.
    self._first: tuple[Any, Delivered] | None = next(loader)
    self.capacity = batch_capacity(self._first[1].batch)

  def __iter__(self) -> Iterator[Any]:
    return self

  def __next__(self) -> Any:
    """Returns the next micro-batch of the step."""
    done = self.delivered
    if self._first is not None:
      # Let go of: its memory is free as soon as it was computed with.
      (batch, delivered), self._first = self._first, None
      done.append(delivered)
      return batch
    if len(done) == self._count if self._count else done[-1].ends_step:
      raise StopIteration
    batch, delivered = next(self._loader)
    self.delivered.append(delivered)
    return batch


class _UnreadLine(schema.Schema):
  """Describes what is read back of a line of unread.jsonl."""

  step: int
  kind: str


class UnreadSampleLog:
  """Writes WORKDIR/unread.jsonl, the samples that could not be read.

  They are left out of their rows. Every process lists those of its own rows:
  the first one in unread.jsonl, the others in unread-1.jsonl and so on.

  Attributes:
    counts: number of such samples since the run began, by kind of failure.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start: int,
    max_share: float,
    process: int = 0,
  ):
    """Drops the lines after step `start`, since those steps are taken again.

    Args:
      workdir: of the run.
      start: step of the checkpoint that the run goes on from, 0 for a new run.
      max_share: if a larger share of the samples cannot be read, the run stops.
      process: index of this process.

    Raises:
      UserError: a line is of another kind.
    """
    name = f"unread-{process}.jsonl" if process else "unread.jsonl"
    self._path = pathlib.Path(workdir) / name
    self._max_share = max_share
    self._seen = 0
    self._new: list[Unread] = []
    self.counts: collections.Counter[str] = collections.Counter()
    self._writer = JsonlWriter.at(self._path)
    if self._path.exists():
      lines = read_valid_rows(self._path, {"step": _UnreadLine})
      kept = [line for line in lines if line["step"] <= start]
      self.counts.update(line["kind"] for line in kept)
      self._writer = JsonlWriter.at(self._path, kept)
      self._writer.open()

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()

  def add(self, step: int, delivered: Delivered) -> None:
    """Lists the samples that a micro-batch lacks.

    Args:
      step: that the micro-batch is of.
      delivered: its rows.

    Raises:
      UserError: too many samples could not be read, see `add_samples`.
    """
    self.add_samples(step, delivered.samples, delivered.unread)

  def add_samples(
    self, step: int, samples: int, unread: Sequence[Unread]
  ) -> None:
    """Lists samples that were to be read in a step, and could not be.

    Args:
      step: in which they were.
      samples: how many could be read.
      unread: the others.

    Raises:
      UserError: more than `max_share` of the samples seen since the start, or
        of 1000 if they are fewer, could not be read.
    """
    self._seen += samples + len(unread)
    if not unread:
      return
    self._writer.add(
      *({"step": step, **dataclasses.asdict(item)} for item in unread)
    )
    self._new += unread
    self.counts.update(item.kind for item in unread)
    if len(self._new) > self._max_share * max(self._seen, _ENOUGH_SAMPLES):
      reasons = "\n  ".join(item.reason for item in self._new[-_LISTED:])
      raise UserError(
        f"step {step}: {len(self._new)} of {self._seen} samples could not be"
        f" read, more than config.data.max_skipped={self._max_share}; mend"
        f" them or raise it (all are in {self._path}):\n  {reasons}"
      )


# The projector and word embeddings that question-guided forgetting uses. Rows
# are filled on the host, ahead of the steps that change the parameters, and a
# run that goes on must keep the frames that it kept before. So a run compares
# frames with questions by the parameters that it started from, and keeps them.
# `ask` and `evaluate` compare by the parameters that they answer with.
QUESTION_EMBEDDER = "question_embedder.npz"


def question_embedder(
  state: TrainState, config: ModelConfig, workdir: pathlib.Path
) -> Embedder:
  """Returns the embedder of a run; at step 0 it also writes it down.

  All processes must call it. Weights are rounded to the compute dtype, as the
  model rounds them when it uses them.

  Args:
    state: that the run starts or goes on from.
    config: of the model.
    workdir: of the run.

  Raises:
    UserError: the run goes on and the file is missing or damaged, or it cannot
      be written.
  """
  path = workdir / QUESTION_EMBEDDER
  if int(state.step) > 0:
    with hosts.together():
      return Embedder(_read_embedder(path, config))
  params = {
    name: _on_host((state.trained | state.frozen)[name], name, config)
    for name in EMBEDDER_PARAMS
  }
  with hosts.together():
    if hosts.is_primary():
      _write_embedder(path, params)
  return Embedder(params)


def _on_host(array: jax.Array, name: str, config: ModelConfig) -> np.ndarray:
  """Gathers an array from all devices of all processes."""
  dtype = narrow_dtype(name, config)
  mesh = getattr(array.sharding, "mesh", None)
  whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  # Cast before it is gathered: half as much is sent and held.
  cast = jax.jit(lambda x: x.astype(dtype), out_shardings=whole)
  return np.asarray(cast(array).addressable_data(0))


def _write_embedder(path: pathlib.Path, params: dict[str, np.ndarray]) -> None:
  # numpy would forget the name of bfloat16, so bits are written.
  bits: dict[str, Any] = {name: _as_bits(x) for name, x in params.items()}
  try:
    with replace_file(path) as partial, open(partial, "wb") as file:
      np.savez(file, **bits)
  except OSError as error:
    raise UserError(
      f"{path} cannot be written ({error}); make room, or choose another"
      " --workdir"
    ) from None


def _as_bits(value: np.ndarray) -> np.ndarray:
  return value.view(np.uint16) if value.dtype == jnp.bfloat16 else value


def _read_embedder(
  path: pathlib.Path, config: ModelConfig
) -> dict[str, np.ndarray]:
  try:
    with np.load(path) as found:
      bits = {name: found[name] for name in EMBEDDER_PARAMS}
      return {
        name: value.view(narrow_dtype(name, config))
        for name, value in bits.items()
      }
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(
      f"{path}, by which forgetting.temporal=question chose the frames of this"
      f" run, cannot be read ({error}); put it back, or start another workdir"
      " with config.init set to this one"
    ) from None
