"""What of its configuration may change when a run goes on.

`config_diff` says which keys of a run's configuration differ from those asked
for now. Only keys that do not change the numbers that come out may differ:
steps of two other configurations would make a run that nobody could name or
repeat.
"""

import contextlib
import dataclasses
import fnmatch
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from hourjax.errors import UserError
from hourjax.training.config import Experiment, build_experiment

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
    if was.get(key) != now.get(key) and not _harmless(key)
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


def _harmless(key: str) -> bool:
  """Returns whether a key may change in a run that goes on."""
  return any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def _step_size(texts: Mapping[str, str]) -> tuple[str, int] | None:
  """Returns the samples or rows of a step, None if they are not known."""
  try:
    if samples := int(texts.get("batch_samples", "0")):
      return "samples", samples
    return "rows", int(texts["batch_rows"]) * int(texts["accumulate"])
  except (KeyError, ValueError):
    return None
