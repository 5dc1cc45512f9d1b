"""The folder of a run: whose it is, and the small files that tell about it."""

import contextlib
import dataclasses
import json
import pathlib
import uuid
from typing import Any

import pydantic

from hourjax import schema
from hourjax.atomic_file import write_whole
from hourjax.data.records.record import Skipped
from hourjax.data.row_plan import RowPlan
from hourjax.errors import UserError
from hourjax.parallel import hosts
from hourjax.training.checkpoint import saved_config
from hourjax.training.config import Experiment, refuse_changes


def check_workdir(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Makes sure that a run may start or go on here; writes nothing lasting.

  Raises:
    UserError: it holds another configuration's run (see `changes`), or the
      processes do not see the same folder.
  """
  with hosts.together():
    old = saved_config(workdir)
    if old is not None:
      refuse_changes(old, experiment, workdir)
  _check_shared(workdir)


def epoch_rows(plan: RowPlan, workdir: pathlib.Path) -> dict[str, Any]:
  """Rows in the first epoch: {"plan": fingerprint, "rows": number}.

  Counting them packs the whole epoch, seconds for a million samples; a run
  that goes on finds the number in its plan.json.
  """
  path, fingerprint = workdir / "plan.json", plan.fingerprint()
  with contextlib.suppress(UserError):  # counted anew
    known = schema.read_schema(_Counted, path, remedy="")
    if known.plan == fingerprint:
      return known.model_dump()
  return {"plan": fingerprint, "rows": plan.rows_in_epoch(0)}


class _Counted(schema.Schema):
  """plan.json."""

  plan: str
  rows: int = pydantic.Field(gt=0)


def write_about(
  experiment: Experiment,
  rows: dict[str, Any],
  skipped: list[Skipped],
  workdir: pathlib.Path,
) -> None:
  """Writes config.json, plan.json and skipped.json, each whole.

  Raises:
    UserError: the folder cannot be written to.
  """
  files = {
    "plan.json": json.dumps(rows),
    "config.json": json.dumps(dataclasses.asdict(experiment), indent=2),
    "skipped.json": json.dumps(
      [dataclasses.asdict(item) for item in skipped], indent=2
    ),
  }
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
      write_whole(workdir / name, text + "\n")
  except OSError as error:
    raise UserError(
      f"{workdir} cannot be written to ({error}); make room, or choose another"
      " --workdir"
    ) from None


def _check_shared(workdir: pathlib.Path) -> None:
  """A checkpoint is written by all processes, into one folder."""
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
