"""Checkpoints of a run: written beside training, verified when restored."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import orbax.checkpoint as ocp
from etils import epath

from hourjax import progress
from hourjax.errors import UserError
from hourjax.parallel import hosts
from hourjax.training import checkpoint_format
from hourjax.training.checkpoint_format import (
  DamagedCheckpoint,
  checkpoint_folder,
  checkpoint_steps,
)
from hourjax.training.faults import best_step


@runtime_checkable
class _State(Protocol):
  """Describes a NamedTuple of pytrees with a field `step`, as `TrainState`.

  A protocol, since `train_state` imports this module to start from a
  checkpoint's parameters.
  """

  @property
  def step(self) -> Any: ...

  def _asdict(self) -> dict[str, Any]: ...


State = TypeVar("State", bound=_State)


class Base(NamedTuple):
  """Holds the frozen model that adapters are added to.

  Checkpoints of adapters do not hold it: it is read anew from `config.init`.

  Attributes:
    params: everything frozen, by path, as `TrainState.frozen`.
    fingerprint: of its weights, however they are stored.
    adapters: what the adapters begin with if `init` is a run of adapters, by
      path; else empty.
  """

  params: dict[str, Any]
  fingerprint: str
  adapters: dict[str, Any]


class Checkpoints:
  """Saves and restores the checkpoints of one run, WORKDIR/checkpoints/STEP.

  All processes of a run make the same calls in the same order.

  Attributes:
    folder: of the checkpoints.
    best: step of a checkpoint that is kept beside the newest ones, or None.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    keep: int = 2,
    on_error: str = "continue",
    base: Base | None = None,
  ):
    """Touches nothing yet.

    Args:
      workdir: of the run; may be a URL that Orbax can write to.
      keep: how many stay on disk; while one is being saved there is one more.
      on_error: "continue" or "stop" when one cannot be saved.
      base: of a run of adapters, which its checkpoints do not hold.
    """
    self._base = base
    self.folder = checkpoint_folder(workdir)
    self.best: int | None = None
    self._keep, self._on_error = keep, on_error
    self._manager: ocp.CheckpointManager | None = None
    # The step being saved, and the error of starting to, if any.
    self._pending: tuple[int, Exception | None] | None = None
    self._failed = ""

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint, None if there is none."""
    return max(checkpoint_steps(self.folder), default=None)

  def save(
    self, state: State, position: int, plan: str, config: dict[str, Any]
  ) -> None:
    """Copies the state and starts to write it; `wait_for_save` ends that.

    Args:
      state: to save.
      position: in the data, of the next step's first row.
      plan: fingerprint of the row plan that the position belongs to.
      config: the run's configuration as plain data.

    Raises:
      UserError: as `wait_for_save`, for the save before this one.
    """
    self.wait_for_save()
    step, tree = int(state.step), self._own(state)
    if step in checkpoint_steps(self.folder):
      return
    manifest = checkpoint_format.make_manifest(
      tree,
      step=step,
      position=position,
      plan=plan,
      config=config,
      base=self._base.fingerprint if self._base else "",
    )
    failure = None
    try:
      self._open().save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(tree), about=ocp.args.JsonSave(manifest)
        ),
      )
    except Exception as error:  # of any library below: full, gone, forbidden
      failure = error
    self._pending = step, failure

  def poll(self) -> None:
    """Ends a save that is complete; cheap, to be called after every step.

    Each process of several writes its own part of a checkpoint, so they wait
    for the save together, before the next one, and this does nothing.
    """
    if self._pending is None or jax.process_count() > 1:
      return
    if self._pending[1] or not self._open().is_saving_in_progress():
      self.wait_for_save()

  def wait_for_save(self) -> None:
    """Waits for the save under way, if any, and reports it if it failed.

    What a failed save left is removed; older checkpoints stay as they are.

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
    failures = hosts.agree(f"{failure!r:.600}" if failure else "")
    if not failures:
      self._failed = ""
      return
    self._discard(step)
    self._failed = (
      f"the checkpoint of step {step} could not be saved in {self.folder}: "
      + "; ".join(failures.values())
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
    """Waits for the run's last save.

    Raises:
      UserError: it failed, so the run must not look as if it had succeeded.
    """
    self.wait_for_save()
    if self._failed:
      raise UserError(f"{self._failed}; make room and start again")

  def restore(self, like: State, *, plan: str) -> tuple[State, int]:
    """Returns the newest undamaged state, and its position in the data.

    Damaged checkpoints that are newer are moved to WORKDIR/damaged, with a
    warning.

    Args:
      like: a state, or ShapeDtypeStructs with shardings, of the same
        structure. The mesh may be another than the one it was saved on.
      plan: fingerprint of this run's row plan.

    Raises:
      UserError: there is no checkpoint, all are damaged (with each one's
        reason), or the newest holds another model or a position in other data.
    """
    tree_like = jax.tree.map(_abstract, self._own(like))
    problems: dict[int, str] = {}
    for step in reversed(checkpoint_steps(self.folder)):
      manifest: dict[str, Any] = {}
      tree, problem = None, ""
      try:
        manifest = checkpoint_format.read_manifest(self.folder, step)
      except DamagedCheckpoint as damage:
        problem = str(damage)
      # Processes agree before each stage, so none waits for one that gave up.
      if not hosts.agree(problem):
        self._check_fit(tree_like, manifest, step, plan)
        try:
          tree = checkpoint_format.read_arrays(self.folder, step, tree_like)
        except DamagedCheckpoint as damage:
          problem = str(damage)
      failures = hosts.agree(problem)
      if not failures:
        try:
          checkpoint_format.verify(tree, manifest)
          _move_damaged(self.folder, problems, step)
          frozen = {"frozen": self._base.params} if self._base else {}
          state = type(like)(**(tree or {}), **frozen)
          return state, manifest["position"]
        except DamagedCheckpoint as damage:
          failures = {0: str(damage)}
      problems[step] = "; ".join(failures.values())
      del tree
    raise UserError(_none_left(self.folder, problems))

  def _own(self, state: State) -> dict[str, Any]:
    """Returns the arrays of a state that a checkpoint holds."""
    tree = state._asdict()
    return {k: v for k, v in tree.items() if not (self._base and k == "frozen")}

  def close(self) -> None:
    """Waits for a save under way and ends Orbax's threads."""
    if self._manager is None:
      return
    manager, self._manager = self._manager, None
    # `wait_for_save` has reported what failed, and an error that ends the run
    # must not be hidden by another one.
    with contextlib.suppress(Exception):
      manager.close()

  def _open(self) -> ocp.CheckpointManager:
    """Returns Orbax's manager; it counts what is on disk when it is made."""
    if self._manager is None:
      checkpoint_format.silence_orbax_errors()
      self._manager = ocp.CheckpointManager(
        self.folder,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=_Kept(self, self._keep),
          create=True,
          cleanup_tmp_directories=True,
        ),
      )
    return self._manager

  def _discard(self, step: int) -> None:
    """Removes what a failed save left."""
    # A manager remembers its failure, and has forgotten what it meant to
    # delete; a new one looks at the disk.
    self.close()
    if hosts.is_primary():
      for path in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        with contextlib.suppress(OSError):
          path.rmtree()
    hosts.agree("")

  def _check_fit(
    self, tree: Any, manifest: Mapping[str, Any], step: int, plan: str
  ) -> None:
    """Raises a UserError if a checkpoint is of another model or other data."""
    wrong = checkpoint_format.shape_differences(tree, manifest)
    if wrong:
      first = "\n  ".join(wrong[:10])
      raise UserError(
        f"{self.folder}/{step} does not fit this configuration; use the model"
        " and optimizer it was written with, or another workdir"
        f" ({len(wrong)} arrays differ):\n  {first}"
      )
    base = self._base.fingerprint if self._base else ""
    if manifest.get("base", "") != base:
      raise UserError(
        f"{self.folder}/{step} holds adapters of the base"
        f" {manifest.get('base')!r}, and config.init has the weights {base!r};"
        " set config.init to the model that they were trained on"
      )
    if manifest["plan"] != plan:
      raise UserError(
        f"{self.folder}/{step} was trained on rows of plan {manifest['plan']},"
        f" this run's are {plan}: the data, its features, weights, capacities"
        " or seed differ; restore them, or start another workdir with"
        " config.init set to this one"
      )


@dataclasses.dataclass
class _Kept:
  """Tells Orbax which checkpoints stay: the newest ones and the best."""

  of: Checkpoints
  newest: int

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> Sequence[bool]:
    """Returns whether each of the checkpoints, oldest first, stays."""
    first = len(checkpoints) - self.newest
    return [
      number >= first or each.step == self.of.best
      for number, each in enumerate(checkpoints)
    ]


class RestoredParams(NamedTuple):
  """Holds the parameters of a checkpoint.

  Attributes:
    params: trained and frozen ones, by path.
    step: that they are of.
    arrays: what the manifest says of each array of the checkpoint: shape,
      dtype and checksum, by path.
  """

  params: dict[str, Any]
  step: int
  arrays: dict[str, Any]


def restore_params(
  workdir: str | os.PathLike,
  sharding: jax.sharding.Sharding | None = None,
  *,
  prefix: str = "",
  each: Callable[[str, jax.Array], Any] = lambda path, value: value,
  step: int | None = None,
  most: int | None = None,
) -> RestoredParams:
  """Returns all parameters of a run's best or newest undamaged checkpoint.

  That is the one with the lowest held-out loss, of a run with `patience`; else,
  or if that is damaged, the newest.

  They are read a gigabyte at a time, or one larger array at a time. With an
  `each` that keeps less of an array, or keeps it elsewhere, no more than that
  gigabyte is held beside what it keeps.

  Args:
    workdir: of the run.
    sharding: of each array; by default whole on this process's first device.
    prefix: start of the paths that are read and verified, e.g. "vision/" for
      the tower alone; all by default.
    each: returns what is kept of a parameter, given its path and its verified
      value. Where a checkpoint turns out to be damaged, it is called anew for
      the parameters of the one before.
    step: of the checkpoint, if not that; no other is taken instead.
    most: bytes that are read at a time, if not a gigabyte.

  Raises:
    UserError: there is no checkpoint, or all are damaged.
  """
  folder = checkpoint_folder(workdir)
  steps = _chosen_steps(workdir, step)
  where = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  problems: dict[int, str] = {}
  for number in reversed(steps):
    try:
      manifest = checkpoint_format.read_manifest(folder, number)
      params = {}
      with progress.step(f"reading the checkpoint {folder}/{number}"):
        for like in checkpoint_format.split_by_size(
          checkpoint_format.abstract_params(manifest, where, prefix), most
        ):
          tree = checkpoint_format.read_arrays(folder, number, like)
          checkpoint_format.verify(tree, manifest)
          for group in tree.values():
            for path in list(group):
              params[path] = each(path, group.pop(path))
    except DamagedCheckpoint as damage:
      problems[number] = str(damage)
      if number != steps[0]:
        print(
          f"WARNING: {folder}/{number} is damaged: {damage}; trying the next"
          " one",
          file=sys.stderr,
          flush=True,
        )
      continue
    return RestoredParams(params, number, manifest["arrays"])
  if step is not None:
    raise UserError(
      f"{folder}/{step} is damaged: {problems[step]}; choose another step, or"
      " bring it back from a copy"
    )
  raise UserError(_none_left(folder, problems))


def _chosen_steps(workdir: str | os.PathLike, step: int | None) -> list[int]:
  """Returns the steps of checkpoints that may be read, first choice last."""
  folder = checkpoint_folder(workdir)
  steps = checkpoint_steps(folder)
  if step is None:
    best = best_step(workdir, steps)
    return sorted(steps, key=lambda number: (number == best, number))
  if step not in steps:
    there = ", ".join(map(str, steps)) or "none"
    raise UserError(
      f"{folder} holds no checkpoint of step {step}, only {there}; choose one"
      " of these (config.keep_checkpoints says how many are kept)"
    )
  return [step]


def _move_damaged(
  folder: epath.Path, problems: Mapping[int, str], instead: int
) -> None:
  """Moves damaged checkpoints to WORKDIR/damaged, where one can look at them.

  Args:
    folder: of the checkpoints.
    problems: what is wrong with each of them, by step.
    instead: step of the checkpoint that is used.
  """
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


def _none_left(folder: epath.Path, problems: Mapping[int, str]) -> str:
  """Returns the message where no checkpoint can be used."""
  if not problems:
    return f"{folder} holds no checkpoint; train first or correct the workdir"
  lines = "\n  ".join(f"{step}: {why}" for step, why in problems.items())
  return (
    f"all {len(problems)} checkpoints of {folder} are damaged; bring one back"
    f" from a copy, or start another workdir:\n  {lines}"
  )


def _abstract(x: Any) -> Any:
  """Returns an array's shape, dtype and sharding."""
  if isinstance(x, jax.Array):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return x
