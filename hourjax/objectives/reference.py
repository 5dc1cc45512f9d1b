"""The reference model: the weights that a run began with."""

import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from hourjax import progress, schema
from hourjax.atomic_file import write_file
from hourjax.errors import UserError
from hourjax.models.params import narrow_dtype
from hourjax.parallel import hosts
from hourjax.training import checkpoint_format
from hourjax.training.config import Experiment
from hourjax.training.train_state import Params, TrainState, initial_params

_NAME, _ADAPTERS = "reference.json", "reference_adapters.safetensors"


def fingerprint(params: Mapping[str, jax.Array]) -> str:
  """Returns a name of parameters, the same for equal ones.

  Args:
    params: by path, anywhere.
  """
  return checkpoint_format.fingerprint(
    checkpoint_format.checksums(dict(params))
  )


def reference_params(
  experiment: Experiment, state: TrainState, workdir: pathlib.Path
) -> Params:
  """Returns the trained parameters as they were at step 0.

  They are kept in the dtype of the computation. The frozen ones are those of
  the state. A run that goes on reads them again from where it began, adapters
  from the file that it wrote then, and compares them with what it wrote down.

  Args:
    experiment: of the run.
    state: that the run starts or goes on from.
    workdir: of the run.

  Raises:
    UserError: they are no longer those that the run began with.
  """
  path = workdir / _NAME
  if int(state.step) == 0:
    params = state.trained
    if hosts.is_primary():
      write_file(path, json.dumps({"weights": fingerprint(params)}) + "\n")
      if experiment.lora.rank:
        _write_adapters(workdir / _ADAPTERS, params)
  elif experiment.lora.rank:
    params = _read_adapters(workdir / _ADAPTERS, state.trained)
    _check_same(path, fingerprint(params), f"{workdir / _ADAPTERS}")
  else:
    shardings = {
      path: value.sharding
      for path, value in (state.trained | state.frozen).items()
    }
    with progress.step("reading the reference's weights"):
      found = initial_params(experiment, shardings)
    params = {name: found[name] for name in state.trained}
    _check_same(path, fingerprint(params), experiment.init)
  return {
    # A copy even where the dtype is the same: a step reuses the state's memory.
    name: jnp.array(value, narrow_dtype(name, experiment.model), copy=True)
    for name, value in params.items()
  }


def _write_adapters(path: pathlib.Path, params: Params) -> None:
  """Writes the adapters of the reference, a few megabytes."""
  write_file(path, save({name: np.asarray(x) for name, x in params.items()}))


def _read_adapters(path: pathlib.Path, like: Params) -> Params:
  """Reads what `_write_adapters` wrote onto the devices.

  Raises:
    UserError: it is missing or damaged.
  """
  try:
    found = load_file(path)
    return {
      name: jax.device_put(found[name], value.sharding)
      for name, value in like.items()
    }
  except (OSError, KeyError, SafetensorError) as error:
    raise UserError(
      f"{path} cannot be read ({error}); bring it back from a copy, or start"
      " another workdir"
    ) from None


def _check_same(path: pathlib.Path, now: str, init: str) -> None:
  """Raises a UserError if the reference is not the one of the start."""
  known = schema.read_json(path, remedy="start another workdir")
  then = known.get("weights") if isinstance(known, dict) else known
  if then != now:
    raise UserError(
      f"the reference of this run had weights {then} (in {path}), and"
      f" config.init={init!r} has {now} now; put those back, or start another"
      " workdir"
    )
