"""Checkpoints through Orbax: train state, data position and configuration."""

import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from hourjax.errors import UserError
from hourjax.training.step import TrainState


class Checkpoints:
  """Checkpoints of one run, in WORKDIR/checkpoints/STEP."""

  def __init__(self, workdir: str | os.PathLike, *, keep: int = 2):
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    self._folder = folder
    self._manager = ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def latest(self) -> int | None:
    """Step of the newest checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(
    self, state: TrainState, position: int, plan: str, config: dict[str, Any]
  ) -> None:
    """Starts saving; `wait` or `close` ends it.

    Args:
      state: to save.
      position: in the data, of the next step's first row.
      plan: fingerprint of the plan that the position is in.
      config: the run's configuration as plain data.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    about = {
      "position": position,
      "plan": plan,
      "config": config,
      "jax": jax.__version__,
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        about=ocp.args.JsonSave(about),
      ),
    )

  def restore(self, like: TrainState, *, plan: str) -> tuple[TrainState, int]:
    """The newest state and its data position.

    Args:
      like: a state (or its shapes) of the same structure.
      plan: fingerprint of the plan of this run.

    Raises:
      UserError: if there is no checkpoint, it holds another model, or its
        position is one in other data.
    """
    step = self.latest()
    if step is None:
      raise UserError(
        f"{self._folder} holds no checkpoint; train first or correct the"
        " workdir"
      )
    shapes = jax.tree.map(_abstract, like._asdict())
    try:
      saved = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(shapes),
          about=ocp.args.JsonRestore(),
        ),
      )
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"{self._folder}/{step} does not fit this configuration; use the"
        f" model and optimizer it was written with, or another workdir\n{error}"
      ) from None
    about = saved["about"]
    if about["plan"] != plan:
      raise UserError(
        f"{self._folder}/{step} was trained on rows of plan {about['plan']},"
        f" this run's are {plan}: the data, its features, weights, capacities"
        " or seed differ; restore them, or start another workdir with"
        " config.init set to this one"
      )
    return TrainState(**saved["state"]), about["position"]

  def close(self) -> None:
    """Waits for the last save."""
    self._manager.wait_until_finished()
    self._manager.close()


def restore_params(workdir: str | os.PathLike) -> dict[str, jax.Array]:
  """All parameters of a run's newest checkpoint, for evaluation."""
  folder = pathlib.Path(workdir).absolute() / "checkpoints"
  if not folder.exists():
    raise UserError(f"{folder} does not exist; train first")
  with ocp.CheckpointManager(folder) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f"{folder} holds no checkpoint; train first")
    tree = manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore())
    )["state"]
  return {**tree["frozen"], **tree["trained"]}


def checkpoint_name(workdir: str | os.PathLike) -> str:
  """Names the newest checkpoint: its path and the second it was written."""
  folder = pathlib.Path(workdir).absolute() / "checkpoints"
  steps = [int(path.name) for path in folder.glob("[0-9]*") if path.is_dir()]
  if not steps:
    raise UserError(f"{folder} holds no checkpoint; train first")
  newest = folder / str(max(steps))
  return f"{newest} {int(newest.stat().st_mtime)}"


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """The configuration that a run was started with."""
  path = pathlib.Path(workdir) / "config.json"
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(f"{path} does not exist; train first") from None


def _abstract(x):
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return x
