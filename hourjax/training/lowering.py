"""A run's programs for a mesh, lowered but not compiled."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from hourjax.models.params import param_axes, param_shapes
from hourjax.parallel.mesh import AXES
from hourjax.parallel.rules import param_shardings
from hourjax.training.experiment import Experiment
from hourjax.training.placing import abstract_batch, check_rows
from hourjax.training.state import abstract_state, state_shardings
from hourjax.training.step import Step, Sums

_STEPS = 1000  # of the schedule, which changes nothing of the program


def check_mesh(experiment: Experiment, devices: int, slices: int = 1) -> None:
  """Refuses what cannot be split over so many devices; needs none of them.

  Raises:
    UserError: the mesh does not fill them, or does not divide rows or
      parameters; names both values and what to give instead.
  """
  sizes = experiment.mesh.sizes(devices, slices)
  _check(experiment, AbstractMesh(sizes, AXES))


def _check(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
  check_rows(
    mesh.shape,
    experiment.row_spec,
    experiment.batch_rows,
    experiment.accumulate,
  )
  model = experiment.model
  param_shardings(mesh, param_shapes(model), param_axes(model))


def programs(
  experiment: Experiment, mesh: Mesh
) -> dict[str, jax.stages.Lowered]:
  """The two programs of a train step; no array exists.

  One optimizer step is `experiment.accumulate` times "accumulate" and once
  "update". The devices may be of a topology.

  Raises:
    UserError: rows or parameters cannot be split over the mesh.
  """
  _check(experiment, mesh)
  state, optimizer = abstract_state(experiment, mesh, _STEPS)
  step = Step(experiment.model, optimizer, state_shardings(state))
  whole = state.step.sharding
  sums = Sums(
    jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    state.trained,
  )
  batch = abstract_batch(experiment.row_spec, experiment.batch_rows, mesh)
  with jax.set_mesh(mesh):
    return {
      "accumulate": step.programs["accumulate"].lower(
        sums, state.trained, state.frozen, batch
      ),
      "update": step.programs["update"].lower(state, sums),
    }
