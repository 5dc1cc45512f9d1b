"""The reference model: the weights that a run began with."""

import hashlib
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hourjax import progress, schema
from hourjax.atomic_file import write_file
from hourjax.errors import UserError
from hourjax.models.params import narrow_dtype
from hourjax.parallel import hosts
from hourjax.training.config import Experiment
from hourjax.training.train_state import Params, TrainState, initial_params

_NAME = "reference.json"


@jax.jit
def _sums(params: Params) -> Params:
  """Returns a sum of each array that any changed bit or place changes."""

  def total(value: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
    index = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
    # Whole numbers, so that the order of the sum makes no difference.
    return (bits * (2 * index + 1)).sum(dtype=jnp.uint32)

  return {path: total(value) for path, value in params.items()}


def fingerprint(params: Mapping[str, jax.Array]) -> str:
  """Returns 16 hexadecimal digits, the same for equal parameters.

  Args:
    params: by path, anywhere.
  """
  sums = jax.device_get(_sums(dict(params)))
  text = json.dumps({path: int(sums[path]) for path in sorted(sums)})
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def reference_params(
  experiment: Experiment, state: TrainState, workdir: pathlib.Path
) -> Params:
  """Returns the trained parameters as they were at step 0.

  They are kept in the dtype of the computation. The frozen ones are those of
  the state. A run that goes on reads them again from where it began, and
  compares them with what it wrote down then.

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
