"""The folder of a run: its configuration and length, and whether it may go on.

    config.json     the configuration
    plan.json       fingerprint of the row plan, and rows of the first epoch; in
                    batches of samples, also how many rows its steps have
    skipped.json    records of the dataset that cannot be used, and why

`config_diff` says which keys of a run's configuration differ from those asked
for now. Only keys that do not change the numbers that come out may differ:
steps of two other configurations would make a run that nobody could name or
repeat.

The other files of the folder are described where they are written: metrics and
events in `metric_writer`, goodput.jsonl in `throughput`, unread.jsonl in
`data_loader`, nonfinite.jsonl in `faults`, checkpoints/ in `checkpoint`.
"""

import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import pydantic

from hourjax import jax_environment, schema
from hourjax.atomic_file import write_file
from hourjax.data.dataset import Dataset
from hourjax.data.packing.row_plan import RowPlan
from hourjax.data.records.record import Skipped
from hourjax.errors import UserError
from hourjax.parallel import hosts
from hourjax.training.checkpoint_format import (
  DamagedCheckpoint,
  checkpoint_folder,
  checkpoint_steps,
  read_manifest,
)
from hourjax.training.config import (
  Experiment,
  build_experiment,
  rename_old_keys,
)
from hourjax.training.train_state import TrainState

# Samples of a step in the published runs; the second in stage 3 of 7B.
PUBLISHED = (128, 256)


@dataclasses.dataclass(frozen=True)
class EpochCounts:
  """Holds what the first epoch of a run has.

  Attributes:
    plan: fingerprint of the row plan.
    rows: number of rows.
    streams: number of samples by stream.
    step_rows: rows of a step -> how many steps have so many; empty where a step
      is a number of rows.
  """

  plan: str
  rows: int
  streams: Mapping[int, int]
  step_rows: Mapping[int, int] = dataclasses.field(default_factory=dict)

  @property
  def samples(self) -> int:
    """Returns the number of samples."""
    return sum(self.streams.values())

  def saved(self) -> dict[str, Any]:
    """Returns what plan.json holds: all that takes seconds to count."""
    steps = {str(rows): n for rows, n in sorted(self.step_rows.items())}
    return {"plan": self.plan, "rows": self.rows} | (
      {"step_rows": steps} if steps else {}
    )


class _Saved(schema.Schema):
  """Describes plan.json."""

  plan: str
  rows: int = pydantic.Field(gt=0)
  step_rows: dict[str, int] = pydantic.Field(default_factory=dict)


def count_epoch(
  experiment: Experiment, plan: RowPlan, workdir: pathlib.Path
) -> EpochCounts:
  """Counts the rows of the first epoch, in all and by step.

  To count them the whole epoch is packed, which takes seconds for a million
  samples; a run that goes on finds the numbers in its plan.json.

  Args:
    experiment: of the run.
    plan: of its rows.
    workdir: of the run; may not be there.
  """
  path, fingerprint = workdir / "plan.json", plan.fingerprint()
  streams = plan.samples_by_stream(0)
  # One that cannot be read is counted again.
  with contextlib.suppress(UserError, ValueError):
    known = schema.read_schema(_Saved, path, remedy="")
    steps = {int(rows): n for rows, n in known.step_rows.items()}
    whole = sum(rows * n for rows, n in steps.items())
    wanted = known.rows if experiment.batch_samples else 0
    if known.plan == fingerprint and whole == wanted:
      return EpochCounts(fingerprint, known.rows, streams, steps)
  windows = plan.rows_by_window(0)
  found: dict[int, int] = {}
  if experiment.batch_samples:
    for rows in windows:
      found[rows] = found.get(rows, 0) + 1
  return EpochCounts(fingerprint, sum(windows), streams, found)


def epoch_steps(experiment: Experiment, counts: EpochCounts) -> int:
  """Returns the number of steps of the first epoch."""
  if experiment.batch_samples:
    return sum(counts.step_rows.values())
  return math.ceil(counts.rows / experiment.step_rows)


def total_steps(experiment: Experiment, counts: EpochCounts) -> int:
  """Returns the number of steps of the run.

  In batches of samples an epoch has the whole batches of each stream, as that
  of the official data loader, and where `drop_last` is False what is left of
  each; times the epochs, rounded up. Every epoch counts as the first. (The
  schedule of the official run does not count by stream, so that it may be
  longer by a step or two.)

  Args:
    experiment: with `steps`, or with `epochs` if that is 0.
    counts: of an epoch.
  """
  if experiment.steps:
    return experiment.steps
  if experiment.batch_samples:
    steps = epoch_steps(experiment, counts)
    return max(1, math.ceil(experiment.epochs * steps))
  return math.ceil(counts.rows * experiment.epochs / experiment.step_rows)


def describe_steps(experiment: Experiment, counts: EpochCounts) -> str:
  """Returns what a step is, and how many an epoch has, for the first line.

  Args:
    experiment: of the run.
    counts: of an epoch.
  """
  epoch, rows = epoch_steps(experiment, counts), experiment.batch_rows
  if not experiment.batch_samples:
    mean = counts.samples / counts.rows * experiment.step_rows
    published = " and ".join(
      f"{math.ceil(counts.samples / samples):,} of {samples}"
      for samples in PUBLISHED
    )
    return (
      f"{experiment.step_rows} rows, {mean:,.1f} samples on average"
      f" ({epoch:,} steps an epoch; in batches of samples, as published, it has"
      f" {published})"
    )
  micro = sum(-(-n // rows) * k for n, k in counts.step_rows.items())
  return (
    f"{experiment.batch_samples} samples of one stream, in"
    f" {counts.rows / epoch:,.1f} rows on average ({micro / epoch:.2f}"
    f" micro-batches of {rows} rows, {1 - counts.rows / (micro * rows):.0%} of"
    f" them empty; {epoch:,} steps an epoch)"
  )


def unknown_streams(experiment: Experiment, names: Sequence[str]) -> list[str]:
  """Returns a sentence if `stream_rows` names streams that the data lacks.

  Args:
    experiment: of the run.
    names: streams of the dataset.
  """
  unknown = sorted(set(experiment.rows_by_stream) - set(names))
  if not unknown:
    return []
  return [
    f"config.stream_rows names {', '.join(unknown)}, and the streams of the"
    f" dataset are {', '.join(names)}: rows of others have config.rows"
  ]


def left_out(
  experiment: Experiment, counts: EpochCounts, names: Sequence[str]
) -> list[str]:
  """Returns a sentence for each stream of which no sample is trained on.

  Args:
    experiment: of the run.
    counts: of an epoch.
    names: of the streams.
  """
  if not experiment.drop_last:
    return []
  samples = experiment.batch_samples
  return [
    f"stream {names[stream]} has {count} samples an epoch, fewer than"
    f" config.batch_samples={samples}, so config.drop_last leaves it out; set"
    " config.drop_last=False to train on it"
    for stream, count in counts.streams.items()
    if count < samples
  ]


def check_workdir(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Makes sure that a run may start or go on in a folder.

  Nothing is left in it.

  Raises:
    UserError: it holds the run of another configuration (see
      `check_config_change`), or the processes do not see the same folder.
  """
  with hosts.together():
    old = find_config(workdir)
    if old is not None:
      check_config_change(old, experiment, workdir)
  _check_shared(workdir)


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """Reads the configuration of a run; old names of keys become today's.

  Raises:
    UserError: config.json is missing, or is no JSON object.
  """
  path = pathlib.Path(workdir) / "config.json"
  config = schema.read_json(path, remedy="train first, or correct the folder")
  if not isinstance(config, dict):
    raise UserError(
      f"{path} is {schema.shorten(config)}, not the configuration of a run;"
      " train first, or correct the folder"
    )
  return rename_old_keys(config)


def find_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """Returns the configuration of the run in a folder; None if there is none.

  From config.json, or where that cannot be read, from the newest checkpoint
  with a sound manifest.
  """
  with contextlib.suppress(UserError):
    return read_config(workdir)
  folder = checkpoint_folder(workdir)
  for step in reversed(checkpoint_steps(folder)):
    with contextlib.suppress(DamagedCheckpoint):
      return rename_old_keys(read_manifest(folder, step)["config"])
  return None


def write_run_files(
  experiment: Experiment,
  counts: EpochCounts,
  skipped: list[Skipped],
  workdir: pathlib.Path,
) -> None:
  """Writes config.json, plan.json and skipped.json, each whole.

  Args:
    experiment: of the run.
    counts: of an epoch.
    skipped: records that cannot be used.
    workdir: is made if it is not there.

  Raises:
    UserError: the folder cannot be written to.
  """
  files = {
    "plan.json": json.dumps(counts.saved()),
    "config.json": json.dumps(dataclasses.asdict(experiment), indent=2),
    "skipped.json": json.dumps(
      [dataclasses.asdict(item) for item in skipped], indent=2
    ),
  }
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
      write_file(workdir / name, text + "\n")
  except OSError as error:
    raise UserError(
      f"{workdir} cannot be written to ({error}); make room, or choose another"
      " --workdir"
    ) from None


def _check_shared(workdir: pathlib.Path) -> None:
  """Makes sure that all processes see one folder, which checkpoints need."""
  token = hosts.tell(uuid.uuid4().hex)
  path = workdir / f".seen-by-all-{token}"
  with hosts.together():
    if hosts.is_primary() and hosts.count() > 1:
      workdir.mkdir(parents=True, exist_ok=True)
      path.touch()
  with hosts.together():
    if hosts.count() > 1 and not path.exists():
      raise UserError(
        f"process {hosts.index()} does not see what process 0 writes into"
        f" {workdir}; use a --workdir that all hosts share"
      )
  if hosts.is_primary():
    path.unlink(missing_ok=True)


# Pattern of keys -> why they may change in a run that goes on.
HARMLESS = {
  "log_every": "what is logged, not what is computed",
  "metrics.*": "what is logged, not what is computed",
  "read.*": "how far to read ahead; the rows are the same",
  "checkpoint_every": "when to save",
  "keep_checkpoints": "how much to keep",
  "on_save_error": "what to do when saving fails",
  "max_nonfinite": "when to give up",
  "eval_*": "what is measured of the model, not what it learns",
  "patience": "when to end",
  "data.max_skipped": "when to give up",
  "mesh.*": "where arrays lie; a checkpoint is restored onto any mesh",
  "model.remat": "what is computed twice; the same function",
  "model.attention.*": "who computes attention; the same function",
  # Moved or copied data. The fingerprint of the row plan tells whether the rows
  # are the same, and the dataset names its tokenizer.
  "data.dataset": "where the data lies",
  "data.media": "where the data lies",
  "data.features": "where the data lies",
  "data.tokenizer": "where the data lies",
}


def check_config_change(
  old: Mapping[str, Any], new: Experiment, workdir: str | os.PathLike
) -> None:
  """Raises an error unless a run of `old` may go on as `new`.

  Args:
    old: configuration of the run in `workdir`, as `read_config` returns it.
    new: the configuration asked for now.
    workdir: for the message.

  Raises:
    UserError: they differ (see `config_diff`); lists "key: old -> new".
  """
  found = config_diff(old, dataclasses.asdict(new))
  if not found:
    return
  lines = [f"{key}: {was} -> {now}" for key, (was, now) in found.items()]
  raise UserError(
    f"{workdir} holds the run of another configuration; differences"
    " (there -> asked for):\n  "
    + "\n  ".join(lines)
    + "\nchange these back, or start another workdir (with --config.init="
    f"{workdir} it begins with this run's weights)"
  )


def config_diff(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  """Returns the keys whose values differ, and change what a run computes.

  Keys of `HARMLESS` may differ, and so may batch_rows and accumulate if their
  product, the rows of a step, is the same, or if a step is `batch_samples`
  samples in any case: micro-batches change only rounding.
  Not even `steps` or `epochs` may grow: the learning rate of every step depends
  on them, and would jump.

  Args:
    old: a configuration as plain data. Keys that are missing in it, since an
      older version did not know them, count with their defaults.
    new: another one.

  Returns:
    Dotted key -> (old, new) as JSON text; "(not set)" where there is no value.
  """
  # If `old` has keys that this version does not know, they are listed.
  with contextlib.suppress(UserError, TypeError, ValueError):
    old = dataclasses.asdict(build_experiment(old))
  was, now = dict(_flat_texts(old)), dict(_flat_texts(new))
  found = {
    key: (was.get(key, "(not set)"), now.get(key, "(not set)"))
    for key in sorted({**was, **now})
    if was.get(key) != now.get(key) and not _harmless(key, now)
  }
  if set(found) & {"batch_rows", "accumulate"} and (
    _step_size(was) == _step_size(now)
  ):
    found.pop("batch_rows", None)
    found.pop("accumulate", None)
  return found


def _flat_texts(
  values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str]]:
  """Yields (dotted key, value as JSON) of nested mappings."""
  for key, value in values.items():
    if isinstance(value, Mapping):
      yield from _flat_texts(value, f"{prefix}{key}.")
    else:
      yield prefix + key, json.dumps(value)


def _harmless(key: str, now: Mapping[str, str]) -> bool:
  """Returns whether a key may change in a run that goes on as `now`."""
  if key.startswith("eval_") and now.get("patience", "0") != "0":
    return False  # which step is the best would depend on when it changed
  return any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def _step_size(texts: Mapping[str, str]) -> tuple[str, int] | None:
  """Returns the samples or rows of a step, None if they are not known."""
  try:
    if samples := int(texts.get("batch_samples", "0")):
      return "samples", samples
    return "rows", int(texts["batch_rows"]) * int(texts["accumulate"])
  except (KeyError, ValueError):
    return None


def run_summary(
  experiment: Experiment,
  dataset: Dataset,
  counts: EpochCounts,
  state: TrainState,
  steps: int,
) -> str:
  """Returns what is printed before the first step.

  Args:
    experiment: of the run.
    dataset: that it trains on.
    counts: of its first epoch.
    state: to start from.
    steps: of the whole run.
  """
  trained = sum(x.size for x in state.trained.values())
  frozen = sum(x.size for x in state.frozen.values())
  notes = [
    *unknown_streams(experiment, dataset.columns.streams),
    *left_out(experiment, counts, dataset.columns.streams),
    *dataset.notes,
  ]
  line = (
    f"{counts.samples} samples in {counts.rows} rows an epoch; {trained:,}"
    f" parameters trained, {frozen:,} frozen; {steps} steps of"
    f" {describe_steps(experiment, counts)}, from step"
    f" {int(state.step)}; {jax.devices()[0].platform} x {jax.device_count()}"
  )
  if compiler := jax_environment.flags_in_use(os.environ):
    notes.append(f"compiler flags {compiler}")
  return "\n".join([line, *(f"note: {text}" for text in notes)])
