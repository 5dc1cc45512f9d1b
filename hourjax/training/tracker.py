"""Weights & Biases, imported only by a run that asks for it."""

import importlib.util
import os
import pathlib
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from hourjax.errors import UserError


def require_wandb(project: str) -> None:
  """Checks that the package is there, without importing it.

  Raises:
    UserError: it is not.
  """
  if importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"config.watch.wandb is {project!r}, but the package wandb is not"
      " installed; run `pip install -r requirements-wandb.txt`, or leave"
      " config.watch.wandb empty"
    )


class WandbRun:
  """One run at W&B for all starts of a workdir: wandb_id.txt holds its id.

  WANDB_MODE=offline and the other variables of wandb work as ever. W&B takes
  a step once: those that are taken again after a crash keep the values of the
  first time.
  """

  def __init__(
    self,
    project: str,
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
  ):
    """Begins or resumes the run.

    Raises:
      UserError: the package is missing, or W&B refuses, e.g. without login.
    """
    require_wandb(project)
    import wandb

    folder = pathlib.Path(workdir)
    try:
      self._run = wandb.init(
        project=project,
        id=_run_id(folder / "wandb_id.txt"),
        name=folder.absolute().name,
        resume="allow",
        dir=folder,
        config=dict(config),
        # Our own lines go to the terminal as they are.
        settings=wandb.Settings(console="off"),
      )
    except wandb.errors.Error as error:
      raise UserError(
        f"config.watch.wandb is {project!r}, but W&B says: {error}; run `wandb"
        " login` on this machine, or set WANDB_MODE=offline and `wandb sync`"
        " later"
      ) from None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Sends values; after a failure nothing more is sent."""
    self._attempt(lambda: self._run.log(dict(values), step=step))

  def close(self) -> None:
    self._attempt(lambda: self._run.finish())
    self._run = None

  def _attempt(self, call) -> None:
    if self._run is None:
      return
    try:
      call()
    except Exception as error:  # whatever it is, training matters more
      print(f"W&B gets nothing more from here: {error!r}", file=sys.stderr)
      self._run = None


def _run_id(path: pathlib.Path) -> str:
  if path.exists() and (known := path.read_text().strip()):
    return known
  made = uuid.uuid4().hex[:12]
  path.write_text(made + "\n")
  return made
