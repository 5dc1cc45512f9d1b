"""What may change in the configuration of a run that goes on.

Everything else decides which numbers come out, and a run whose steps belong to
two configurations has no name.
"""

import contextlib
import dataclasses
import fnmatch
import json
import os
from collections.abc import Mapping
from typing import Any

from hourjax.errors import UserError
from hourjax.training.experiment import Experiment, build_experiment

# Pattern of keys -> why they may change.
HARMLESS = {
  "log_every": "what is said, not what is done",
  "watch.*": "what is said, not what is done",
  "read.*": "how far to read ahead; the rows are the same",
  "checkpoint_every": "when to save",
  "keep_checkpoints": "how much to keep",
  "on_save_error": "what to do when saving fails",
  "max_nonfinite": "when to give up",
  "data.max_skipped": "when to give up",
  "mesh.*": "where arrays lie; a checkpoint goes onto any mesh",
  "model.remat": "what is computed twice; the same function",
  # Moved or copied. That the rows are the same is checked by the plan's
  # fingerprint, and the tokenizer against the dataset.
  "data.dataset": "where the data lies",
  "data.media": "where the data lies",
  "data.features": "where the data lies",
  "data.tokenizer": "where the data lies",
}


def refuse_changes(
  old: Mapping[str, Any], new: Experiment, workdir: str | os.PathLike
) -> None:
  """Raises unless a run of `old` may go on as `new`.

  `HARMLESS` keys may differ, and so may batch_rows and accumulate while their
  product, the rows of a step, stays: micro-batches change rounding alone.
  Not even `steps` or `epochs` may grow: the learning rate of every step
  depends on them, and would jump.

  Args:
    old: configuration of the run in `workdir`, as `read_config` gives it.
    new: the configuration asked for.
    workdir: for the message.

  Raises:
    UserError: with "key: old -> new" of every difference.
  """
  found = differences(old, dataclasses.asdict(new))
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


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  """Keys that differ and matter -> (old, new) as text; "(not set)" if absent.

  Keys that an older version did not know count with their defaults.
  """
  # Keys that this version does not know stay, and are listed.
  with contextlib.suppress(UserError, TypeError, ValueError):
    old = dataclasses.asdict(build_experiment(old))
  was, now = _flat(old), _flat(new)
  found = {
    key: (was.get(key, "(not set)"), now.get(key, "(not set)"))
    for key in sorted({**was, **now})
    if was.get(key) != now.get(key) and not _harmless(key)
  }
  if set(found) & {"batch_rows", "accumulate"} and _rows(was) == _rows(now):
    found.pop("batch_rows", None)
    found.pop("accumulate", None)
  return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
  result = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      result |= _flat(value, f"{prefix}{key}.")
    else:
      result[prefix + key] = json.dumps(value)
  return result


def _harmless(key: str) -> bool:
  return any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def _rows(flat: Mapping[str, str]) -> int | None:
  try:
    return int(flat["batch_rows"]) * int(flat["accumulate"])
  except (KeyError, ValueError):
    return None
