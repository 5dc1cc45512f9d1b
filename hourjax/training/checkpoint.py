"""Checkpoints through Orbax: saved beside training, verified when restored."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from hourjax import progress, schema
from hourjax.errors import UserError
from hourjax.parallel import hosts
from hourjax.training import checkpoint_format
from hourjax.training.checkpoint_format import quiet_orbax
from hourjax.training.train_step import TrainState


class Checkpoints:
  """Checkpoints of one run, in WORKDIR/checkpoints/STEP.

  All processes of a run make the same calls in the same order.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    keep: int = 2,
    on_error: str = "continue",
  ):
    """Touches nothing yet.

    Args:
      workdir: of the run; may be a URL that Orbax can write to.
      keep: how many stay on disk. While one is saved there is one more.
      on_error: "continue" or "stop" when one cannot be saved.
    """
    self.folder = checkpoint_format.folder_of(workdir)
    self._keep, self._on_error = keep, on_error
    self._manager: ocp.CheckpointManager | None = None
    self._pending: tuple[int, Exception | None] | None = None
    self._failed = ""

  def latest(self) -> int | None:
    """Step of the newest checkpoint, None if there is none."""
    return max(checkpoint_format.saved_steps(self.folder), default=None)

  def save(
    self, state: TrainState, position: int, plan: str, config: dict[str, Any]
  ) -> None:
    """Copies the state and starts writing it; `settle` ends that.

    Args:
      state: to save.
      position: in the data, of the next step's first row.
      plan: fingerprint of the plan that the position is in.
      config: the run's configuration as plain data.

    Raises:
      UserError: as `settle`, for the save before this one.
    """
    self.settle()
    step, tree = int(state.step), state._asdict()
    if step in checkpoint_format.saved_steps(self.folder):
      return
    about = checkpoint_format.describe(
      tree, step=step, position=position, plan=plan, config=config
    )
    failure = None
    try:
      self._open().save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(tree), about=ocp.args.JsonSave(about)
        ),
      )
    except Exception as error:  # of any library below: full, gone, forbidden
      failure = error
    self._pending = step, failure

  def poll(self) -> None:
    """Settles a save that has ended by itself; cheap, for every step.

    Of several processes each has its own part of a save, so they settle it
    together, before the next one.
    """
    if self._pending is None or jax.process_count() > 1:
      return
    if self._pending[1] or not self._open().is_saving_in_progress():
      self.settle()

  def settle(self) -> None:
    """Waits for the save under way, if any, and says so if it failed.

    What a failed one left is removed; older checkpoints stay as they are.

    Raises:
      UserError: it failed and `on_error` is "stop".
    """
    if self._pending is None:
      return
    (step, failure), self._pending = self._pending, None
    if failure is None:
      try:
        self._open().wait_until_finished()
      except Exception as error:
        failure = error
    told = hosts.agree(f"{failure!r:.600}" if failure else "")
    if not told:
      self._failed = ""
      return
    self._discard(step)
    self._failed = (
      f"the checkpoint of step {step} could not be saved in {self.folder}: "
      + "; ".join(told.values())
      + f"; the newest is that of step {self.latest()}"
    )
    if self._on_error == "stop":
      raise UserError(
        f"{self._failed}; make room and start again"
        " (config.on_save_error=continue would go on without it)"
      )
    if hosts.is_primary():
      print(
        f"WARNING: {self._failed}; training goes on"
        " (config.on_save_error=stop would end it)",
        file=sys.stderr,
        flush=True,
      )

  def finish(self) -> None:
    """Settles the run's last save.

    Raises:
      UserError: it failed; a run does not end well without it.
    """
    self.settle()
    if self._failed:
      raise UserError(f"{self._failed}; make room and start again")

  def restore(self, like: TrainState, *, plan: str) -> tuple[TrainState, int]:
    """The newest sound state and its data position.

    Damaged checkpoints that are newer are moved to WORKDIR/damaged, loudly.

    Args:
      like: a state, or ShapeDtypeStructs with shardings, of the same
        structure. The mesh may be another than the checkpoint's.
      plan: fingerprint of the plan of this run.

    Raises:
      UserError: there is none, all are damaged (with each one's reason), or
        it holds another model or a position in other data.
    """
    like = jax.tree.map(_abstract, like)
    problems: dict[int, str] = {}
    for step in reversed(checkpoint_format.saved_steps(self.folder)):
      about, tree, problem = None, None, ""
      try:
        about = checkpoint_format.read_about(self.folder, step)
      except checkpoint_format.Damaged as damage:
        problem = str(damage)
      if not hosts.agree(problem):
        self._check_fit(like, about, step, plan)
        try:
          tree = checkpoint_format.read_arrays(
            self.folder, step, like._asdict()
          )
        except checkpoint_format.Damaged as damage:
          problem = str(damage)
      told = hosts.agree(problem)
      if not told:
        try:
          checkpoint_format.verify(tree, about)
          _set_aside(self.folder, problems, step)
          return TrainState(**tree), about["position"]
        except checkpoint_format.Damaged as damage:
          told = {0: str(damage)}
      problems[step] = "; ".join(told.values())
      del tree
    raise UserError(_none_left(self.folder, problems))

  def close(self) -> None:
    """Waits for a save under way and ends Orbax's threads."""
    if self._manager is None:
      return
    manager, self._manager = self._manager, None
    # Closing comes last: what failed was said by `settle`, and an error that
    # ends the run must not be hidden by another one.
    with contextlib.suppress(Exception):
      manager.close()

  def _open(self) -> ocp.CheckpointManager:
    """Orbax's manager; it counts what is on disk when it is made."""
    if self._manager is None:
      quiet_orbax()
      self._manager = ocp.CheckpointManager(
        self.folder,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=self._keep,
          create=True,
          cleanup_tmp_directories=True,
        ),
      )
    return self._manager

  def _discard(self, step: int) -> None:
    # A manager remembers its failure, and has forgotten what it meant to
    # delete; a new one looks at the disk.
    self.close()
    if hosts.is_primary():
      for path in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        with contextlib.suppress(OSError):
          path.rmtree()
    hosts.agree("")

  def _check_fit(self, like, about, step, plan):
    wrong = checkpoint_format.misfits(like._asdict(), about)
    if wrong:
      shown = "\n  ".join(wrong[:10])
      raise UserError(
        f"{self.folder}/{step} does not fit this configuration; use the model"
        " and optimizer it was written with, or another workdir"
        f" ({len(wrong)} arrays differ):\n  {shown}"
      )
    if about["plan"] != plan:
      raise UserError(
        f"{self.folder}/{step} was trained on rows of plan {about['plan']},"
        f" this run's are {plan}: the data, its features, weights, capacities"
        " or seed differ; restore them, or start another workdir with"
        " config.init set to this one"
      )


class SavedParams(NamedTuple):
  """Parameters of a checkpoint.

  Attributes:
    params: by path, trained and frozen ones.
    step: that they are of.
    arrays: what the checkpoint tells of each array in it (`saved.describe`).
  """

  params: dict[str, jax.Array]
  step: int
  arrays: dict[str, Any]


def restore_params(
  workdir: str | os.PathLike,
  sharding: jax.sharding.Sharding | None = None,
  *,
  each: Callable[[str, jax.Array], Any] = lambda path, value: value,
) -> SavedParams:
  """All parameters of a run's newest sound checkpoint.

  They are read a gigabyte at a time (but an array at once), so that with an
  `each` that keeps less, or elsewhere, only that is held.

  Args:
    workdir: of the run.
    sharding: of each; whole on this process's first device by default.
    each: what becomes of a parameter, given its path and its verified value.
  """
  folder = checkpoint_format.folder_of(workdir)
  where = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  problems: dict[int, str] = {}
  for step in reversed(checkpoint_format.saved_steps(folder)):
    try:
      about = checkpoint_format.read_about(folder, step)
      params = {}
      with progress.step(f"reading the checkpoint {folder}/{step}"):
        for like in checkpoint_format.in_parts(
          checkpoint_format.abstract_params(about, where)
        ):
          tree = checkpoint_format.read_arrays(folder, step, like)
          checkpoint_format.verify(tree, about)
          for group in tree.values():
            for path in list(group):
              params[path] = each(path, group.pop(path))
    except checkpoint_format.Damaged as damage:
      problems[step] = str(damage)
      print(
        f"WARNING: {folder}/{step} is damaged: {damage}; trying the one before",
        file=sys.stderr,
        flush=True,
      )
      continue
    return SavedParams(params, step, about["arrays"])
  raise UserError(_none_left(folder, problems))


def saved_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """The configuration that the run in a workdir has; None if there is none.

  From config.json, or where that cannot be read, the newest checkpoint.
  """
  with contextlib.suppress(UserError):
    return read_config(workdir)
  folder = checkpoint_format.folder_of(workdir)
  for step in reversed(checkpoint_format.saved_steps(folder)):
    with contextlib.suppress(checkpoint_format.Damaged):
      return checkpoint_format.read_about(folder, step)["config"]
  return None


def checkpoint_name(workdir: str | os.PathLike) -> str:
  """Names the newest checkpoint: its path and the second it was written."""
  folder = checkpoint_format.folder_of(workdir)
  steps = checkpoint_format.saved_steps(folder)
  if not steps:
    raise UserError(f"{folder} holds no checkpoint; train first")
  newest = folder / str(max(steps))
  return f"{newest} {int(newest.stat().mtime)}"


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """The configuration that a run was started with."""
  path = pathlib.Path(workdir) / "config.json"
  config = schema.read_json(path, remedy="train first, or correct the folder")
  if not isinstance(config, dict):
    raise UserError(
      f"{path} is {schema.shorten(config)}, not the configuration of a run;"
      " train first, or correct the folder"
    )
  return config


def _set_aside(
  folder: epath.Path, problems: dict[int, str], instead: int
) -> None:
  """Moves damaged checkpoints out of the way, where they can be looked at."""
  if hosts.is_primary():
    for step, reason in problems.items():
      aside = folder.parent / "damaged"
      aside.mkdir(parents=True, exist_ok=True)
      names = {path.name for path in aside.iterdir()}
      number = 1
      while (name := f"{step}-{number}") in names:
        number += 1
      (folder / str(step)).rename(aside / name)
      print(
        f"WARNING: {folder}/{step} is damaged and now in {aside}/{name}:"
        f" {reason}; training goes on from step {instead}",
        file=sys.stderr,
        flush=True,
      )
  hosts.agree("")


def _none_left(folder: epath.Path, problems: dict[int, str]) -> str:
  if not problems:
    return f"{folder} holds no checkpoint; train first or correct the workdir"
  lines = "\n  ".join(f"{step}: {why}" for step, why in problems.items())
  return (
    f"all {len(problems)} checkpoints of {folder} are damaged; bring one back"
    f" from a copy, or start another workdir:\n  {lines}"
  )


def _abstract(x):
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return x
