"""The folder of a run: its configuration, and whether a run may go on in it.

    config.json     the configuration
    plan.json       fingerprint of the row plan, and rows of the first epoch; in
                    batches of samples, also how many rows its steps have
    skipped.json    records of the dataset that cannot be used, and why

The other files of the folder are described where they are written: metrics and
events in `metric_writer`, goodput.jsonl in `throughput`, unread.jsonl in
`data_loader`, nonfinite.jsonl in `faults`, checkpoints/ in `checkpoint`; the
numbers of plan.json in `run_length`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import uuid
from typing import Any

from hourjax import schema
from hourjax.atomic_file import write_file
from hourjax.data.records.record import Skipped
from hourjax.errors import UserError
from hourjax.parallel import hosts
from hourjax.training.checkpoint_format import (
  DamagedCheckpoint,
  checkpoint_folder,
  checkpoint_steps,
  read_manifest,
)
from hourjax.training.config import Experiment, rename_old_keys
from hourjax.training.config_change import check_config_change
from hourjax.training.run_length import EpochCounts


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
