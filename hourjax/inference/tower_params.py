"""Which tower extracts: a folder's, or the one that training starts from."""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from hourjax.errors import UserError
from hourjax.inference.encoder import TOWER
from hourjax.models.params import init_params, param_shapes
from hourjax.training.experiment import Experiment
from hourjax.weights.tower import load_tower


def tower_params(
  experiment: Experiment, folder: str | None = None
) -> dict[str, np.ndarray]:
  """The tower's parameters by path, on the host.

  Args:
    experiment: its model and, without `folder`, its `init` and `seed`.
    folder: a published SigLIP folder, an Hour-LLaVA checkpoint or the workdir
      of a training run.

  Raises:
    UserError: the folder holds no tower, or another one than the model's.
  """
  config = experiment.model
  folder = folder or experiment.init
  if not folder:
    drawn = init_params(config, experiment.seed, below=TOWER)
    return jax.tree.map(np.asarray, drawn)
  shapes = {
    path: shape
    for path, shape in param_shapes(config).items()
    if path.startswith(TOWER)
  }
  if not (pathlib.Path(folder) / "checkpoints").is_dir():
    return load_tower(folder, config, shapes)
  params = _restore(pathlib.Path(folder))
  wrong = {
    path
    for path in shapes.keys() | params.keys()
    if path not in params
    or tuple(params[path].shape) != tuple(shapes.get(path, ()))
  }
  if wrong:
    raise UserError(
      f"{folder} does not fit config.model: {', '.join(sorted(wrong))} are"
      " missing or of another shape; use the configuration it was trained with"
    )
  return params


def _restore(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The tower in a run's newest checkpoint; nothing else is read."""
  folder = (workdir / "checkpoints").absolute()
  with ocp.CheckpointManager(
    folder, item_handlers={"state": ocp.PyTreeCheckpointHandler()}
  ) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f"{folder} holds no checkpoint; train first")
    tree = manager.item_metadata(step)["state"].tree
    wanted = {}
    for group in ("frozen", "trained"):
      found = {
        path: jax.ShapeDtypeStruct(value.shape, np.float32)
        for path, value in (tree.get(group) or {}).items()
        if path.startswith(TOWER)
      }
      if found:
        wanted[group] = found
    if not wanted:
      return {}
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.float32)
    state = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          item=wanted,
          restore_args=jax.tree.map(lambda _: as_numpy, wanted),
          partial_restore=True,
        )
      ),
    )["state"]
  return {p: value for group in state.values() for p, value in group.items()}
