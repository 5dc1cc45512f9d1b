"""A run's programs for a mesh, lowered but not compiled."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hourjax.training.experiment import Experiment
from hourjax.training.placing import Placing, abstract_batch
from hourjax.training.state import abstract_state, state_shardings
from hourjax.training.step import Step, Sums

_STEPS = 1000  # of the schedule, which changes nothing of the program


def programs(
  experiment: Experiment, mesh: Mesh
) -> dict[str, jax.stages.Lowered]:
  """The two programs of a train step; no array exists.

  One optimizer step is `experiment.accumulate` times "accumulate" and once
  "update". The devices may be of a topology.

  Raises:
    UserError: rows or parameters cannot be split over the mesh.
  """
  Placing(mesh, experiment.row_spec, experiment.batch_rows)
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
