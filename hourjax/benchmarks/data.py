"""How full rows are, and how fast they are planned, read and resumed.

As many conversations are planned as VideoMarathon has; of these only sizes and
durations exist. What is read has real bytes and real text, as much as fits in
memory, and it is still in the page cache from being written: the disk is not
measured. The same features are also read from torch files, as the official
trainer reads them.
"""

import dataclasses
import importlib.util
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import numpy as np

from hourjax import processes
from hourjax.benchmarks.figures import peak_mib
from hourjax.data import synthetic
from hourjax.data.columns import Columns
from hourjax.data.dataset import Dataset
from hourjax.data.packing.row_plan import EPOCH, WINDOW, PlanOptions, RowPlan
from hourjax.data.pipeline import batches
from hourjax.data.prepared import Prepared
from hourjax.data.records.record import Record
from hourjax.data.rows import RowSpec
from hourjax.data.sample_sizes import FIELDS
from hourjax.data.store.features import FeatureStore
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import Experiment
from hourjax.training.data_loader import DataLoader

_WARM_TORCH = 3  # rows that torch reads before the clock starts


def measure_torch(
  store: FeatureStore,
  videos: Sequence[str],
  spec: RowSpec,
  folder: pathlib.Path,
  rows: int,
) -> dict[str, float]:
  """Measures torch's DataLoader with one padded sample a row.

  Args:
    store: a store with the features.
    videos: names of the videos that are written and read.
    spec: the rows that samples are padded to.
    folder: where bfloat16 `.pt` files are written.
    rows: how many rows to read.

  Returns:
    GB and rows a second, without and with two worker processes.
  """
  import torch  # not among the requirements

  kind = torch.bfloat16
  shape = (spec.frame_tokens, spec.width)
  paths = []
  for number, video in enumerate(videos):
    frames = np.arange(store.stored(video).frames)
    features = store.read(video, frames, shape).view(np.uint16)
    paths.append(folder / f"{number}.pt")
    torch.save(torch.from_numpy(features).view(kind), paths[-1])

  class Padded(torch.utils.data.Dataset):
    def __len__(self) -> int:
      return rows + _WARM_TORCH

    def __getitem__(self, k: int) -> tuple[torch.Tensor, int]:
      features = torch.load(paths[k % len(paths)], weights_only=True)
      features = features.reshape(-1, spec.width)
      row = torch.zeros(spec.capacity.features, spec.width, dtype=kind)
      row[: len(features)] = features
      return row, features.numel() * 2

  results = {}
  for workers in (0, 2):
    loader = iter(
      torch.utils.data.DataLoader(Padded(), batch_size=1, num_workers=workers)
    )
    for _ in range(_WARM_TORCH):
      next(loader)
    began, used = time.monotonic(), 0
    for _ in range(rows):
      used += int(next(loader)[1])
    took = time.monotonic() - began
    results[f"gb_per_second_{workers}_workers"] = round(used / took / 1e9, 2)
    results[f"rows_per_second_{workers}_workers"] = round(rows / took, 2)
  return results


_SLOTS = ("memory", "queries", "decoder")
_COLUMNS, _STORE, _READ = "columns.npz", "index", "read"
_EACH = 3  # conversations about each video that is read
_ROWS = 2  # in a batch
_WARM = 2  # batches that are read before the clock starts


@dataclasses.dataclass(frozen=True)
class Options:
  """Says how much is measured.

  Attributes:
    conversations: how many conversations are planned.
    videos: how many videos they are about.
    gigabytes: GB of features that are written and read.
    rows: rows that are read for each figure, an even number.
    step_rows: rows of a step, to turn steps into positions in the data.
    seed: the seed of everything that is drawn.
  """

  conversations: int = 700_000
  videos: int = 28_000
  gigabytes: float = 3.0
  rows: int = 12
  step_rows: int = 128
  seed: int = 0


def measure_data(
  experiment: Experiment, options: Options, folder: pathlib.Path
) -> dict[str, Any]:
  """Returns all figures as plain data.

  Args:
    experiment: its rows, data and reading options count.
    options: how much is measured.
    folder: where the files are written that are read.
  """
  durations = synthetic.video_durations(options.videos, options.seed)
  columns = synthetic.conversation_columns(
    durations, options.conversations, options.seed
  )
  columns.save(folder / _COLUMNS)
  synthetic.write_index(folder / _STORE, durations)
  planned = _in_a_process(measure_plan, experiment, options, folder)
  resumed = _in_a_process(measure_resume, experiment, options, folder)
  spec = experiment.row_spec
  store, read = synthetic.write_features(
    folder / _READ, spec, options.gigabytes, options.seed
  )
  synthetic.write_conversations(folder / "text", len(read), _EACH)
  videos = [synthetic.video_name(i) for i in range(len(read))]
  return {
    "capacity": {name: getattr(experiment.rows, name) for name in _SLOTS},
    "video_minutes": round(float(durations.mean()) / 60, 2),
    **planned,
    "resume_seconds": resumed,
    "read": measure_reading(experiment, options, folder, packed=True),
    "read_padded": measure_reading(experiment, options, folder, packed=False),
    "read_torch": measure_torch(store, videos, spec, folder, options.rows)
    if importlib.util.find_spec("torch")
    else None,
    "machine": {
      "cores": os.cpu_count(),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
    },
  }


def measure_plan(
  experiment: Experiment, options: Options, folder: pathlib.Path
) -> dict[str, Any]:
  """Measures how full an epoch's rows are, and the planning of them.

  Args:
    experiment: its rows and data count.
    options: not used.
    folder: where the columns and the index of the features are.

  Returns:
    `goodput`: the share of each capacity that is in use, and that share with
    one sample a row; seconds to open the data and to pack it; and MiB at peak.
  """
  before = peak_mib()
  began = time.monotonic()
  dataset, plan = _planned(experiment, folder)
  opened = time.monotonic()
  rows = plan.epoch_rows(0)
  done = time.monotonic()
  used = _used(rows, dataset.sizes)
  sizes = dataset.sizes[:, [FIELDS.index(name) for name in _SLOTS]]
  capacity = np.array([getattr(experiment.rows, name) for name in _SLOTS])
  alone = sizes[dataset.usable].mean(axis=0) / capacity
  return {
    "conversations": len(dataset),
    "skipped": len(dataset.skipped),
    "rows": len(rows),
    "goodput": _named(used / len(rows) / capacity),
    "goodput_one_sample_a_row": _named(alone),
    "plan_seconds": {
      "open": round(opened - began, 2),
      "pack": round(done - opened, 2),
      "total": round(done - began, 2),
    },
    "plan_peak_mib": {
      "total": round(peak_mib()),
      "of_it_imports": round(before),
    },
  }


def measure_resume(
  experiment: Experiment, options: Options, folder: pathlib.Path
) -> dict[str, float]:
  """Measures the seconds until the first row of a step is known, by step.

  Columns and index are read, samples sized, the plan is compared with the
  checkpoint's, and the window of the row is packed. Not counted are starting
  Python, reading the tokenizer, and restoring the state.

  Args:
    experiment: its rows and data count.
    options: how many rows a step has.
    folder: where the columns and the index of the features are.
  """
  dataset, plan = _planned(experiment, folder)
  steps_in_epoch = plan.rows_in_epoch(0) / options.step_rows
  middle = len(dataset) // WINDOW // 2 * WINDOW
  seconds = {}
  for step in (10, 1_000_000):
    began = time.monotonic()
    _, plan = _planned(experiment, folder)
    plan.fingerprint()
    epoch = int(step / steps_in_epoch)
    plan.row(plan.advance(epoch * EPOCH + middle, 1))
    seconds[f"step_{step}"] = round(time.monotonic() - began, 2)
  return seconds


def measure_reading(
  experiment: Experiment, options: Options, folder: pathlib.Path, packed: bool
) -> dict[str, float]:
  """Measures rows through the whole pipeline onto the device.

  Args:
    experiment: rows and reading options.
    options: how many rows are read.
    folder: where conversations and features are.
    packed: whether rows are packed; if not, each holds one sample and padding.

  Returns:
    GB, rows and hours of video a second.
  """
  prepared = Prepared(folder / "text")
  store = FeatureStore(folder / _READ)
  dataset = _dataset(experiment, prepared.records, prepared.columns, store)
  sizes = dataset.sizes
  if not packed:
    full = np.array([experiment.rows.astuple()])
    sizes = np.repeat(full, len(sizes), axis=0)
  plan = RowPlan(sizes, experiment.rows, PlanOptions(), members=dataset.usable)
  delivered = batches(
    dataset, plan, experiment.row_spec, rows=_ROWS, options=experiment.read
  )
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  loader = DataLoader(
    delivered, BatchSharding(mesh, experiment.row_spec, _ROWS)
  )
  for batch, _ in itertools.islice(loader, _WARM):
    jax.block_until_ready(batch)
  position = plan.advance(0, _WARM * _ROWS)
  began, minutes, slots = time.monotonic(), 0.0, 0
  for batch, _ in itertools.islice(loader, options.rows // _ROWS):
    jax.block_until_ready(batch)
    slots += batch.features.nbytes
  took = time.monotonic() - began
  loader.close()
  used = 0
  for _ in range(options.rows):
    for group in plan.row(position)[1]:
      for i in group:
        used += int(dataset.sizes[i, 0]) * experiment.row_spec.width * 2
        name = prepared.columns.videos[prepared.columns.video[i]]
        minutes += store.stored(name).duration / 60
    position = plan.advance(position, 1)
  return {
    "gb_per_second": round(used / took / 1e9, 2),
    "gb_per_second_with_padding": round(slots / took / 1e9, 2),
    "rows_per_second": round(options.rows / took, 2),
    "video_hours_per_second": round(minutes / 60 / took, 2),
  }


def _planned(
  experiment: Experiment, folder: pathlib.Path
) -> tuple[Dataset, RowPlan]:
  """Opens the data and makes the plan, as a run does before its first row."""
  columns = Columns.load(folder / _COLUMNS)
  store = FeatureStore(folder / _STORE)
  dataset = _dataset(experiment, _Nameless(len(columns)), columns, store)
  options = PlanOptions(
    seed=experiment.seed, share=experiment.data.share_memory
  )
  return dataset, RowPlan(
    dataset.sizes,
    experiment.rows,
    options,
    members=dataset.usable,
    memory=columns.video,
    stream=columns.stream,
  )


class _Nameless(Sequence[Record]):
  """Holds records of which only the name is ever read."""

  def __init__(self, count: int):
    self._count = count

  def __len__(self) -> int:
    return self._count

  @overload
  def __getitem__(self, index: int) -> Record: ...

  @overload
  def __getitem__(self, index: slice) -> Sequence[Record]: ...

  def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(self._count))]
    return Record(str(index), "video", ("",), (), "", {})


def _dataset(
  experiment: Experiment,
  records: Sequence[Record],
  columns: Columns,
  store: FeatureStore,
) -> Dataset:
  return Dataset(
    records,
    columns,
    tokenizer=synthetic.tokenizer(),
    spec=experiment.row_spec,
    options=experiment.sample_options,
    media_root="",
    features=store,
  )


def _used(
  rows: Sequence[Sequence[Sequence[int]]], sizes: np.ndarray
) -> np.ndarray:
  """Returns how many of the `_SLOTS` are used; a shared memory counts once.

  Args:
    rows: each a list of groups of samples that share a memory.
    sizes: the size of each sample.
  """
  groups = [group for row in rows for group in row]
  first = np.array([group[0] for group in groups])
  every = np.array([i for group in groups for i in group])
  memory = sizes[first, FIELDS.index("memory")].sum()
  text = [sizes[every, FIELDS.index(name)].sum() for name in _SLOTS[1:]]
  return np.array([memory, *text])


def _named(values: np.ndarray) -> dict[str, float]:
  return {n: round(float(v), 3) for n, v in zip(_SLOTS, values)}


def _in_a_process(
  function: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
  """Runs a function in a new process, so that its peak memory is its own."""
  with processes.pool(1) as pool:
    return pool.submit(function, *arguments).result()
