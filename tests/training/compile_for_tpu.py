"""Compiles a real train step with the real TPU compiler.

  python -m tests.training.compile_for_tpu configs/demo.py:stage=1 v5e:1x1

prints, as JSON, how often the compiled step calls each attention kernel, and
its memory in bytes.
"""

import collections
import dataclasses
import importlib.util
import json
import re
import sys

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hourjax.data import rows
from hourjax.models.params import param_shapes
from hourjax.training.experiment import build_experiment
from hourjax.training.optimizer import make_optimizer, split_params
from hourjax.training.step import TrainState, jit_train_step


def main(config: str, topology: str) -> None:
  """Prints what the step holds."""
  path, _, argument = config.partition(":")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  experiment = build_experiment(module.get_config(argument).to_dict())
  mesh = Mesh(
    np.array(
      topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        chips_per_host_bounds=(1, 1, 1),
      ).devices[:1]
    ),
    ("data",),
  )
  with jax.set_mesh(mesh):
    compiled = _lower(experiment, mesh).compile()
  memory = compiled.memory_analysis()
  calls = re.findall(
    r"%((?:attention|splash)_\w+?)(?:\.\d+)? = ", compiled.as_text()
  )
  print(
    json.dumps(
      {
        "calls": collections.Counter(calls),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
      }
    )
  )


def _lower(experiment, mesh):
  def state(params):
    trained, frozen = split_params(params, experiment.optimizer)
    optimizer = make_optimizer(experiment.optimizer, 10, trained)
    return TrainState(
      jax.numpy.zeros((), np.int32), trained, frozen, optimizer.init(trained)
    )

  params = {
    name: jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in param_shapes(experiment.model).items()
  }
  trained, _ = split_params(params, experiment.optimizer)
  optimizer = make_optimizer(experiment.optimizer, 10, trained)
  row = rows.empty_rows(experiment.row_spec, 1)
  accumulate, batch = experiment.accumulate, experiment.batch_rows
  batches = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (accumulate, batch, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
    ),
    row,
  )
  replicated = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    (jax.eval_shape(state, params), batches),
  )
  # So that a test can see what is not computed again.
  config = dataclasses.replace(experiment.model, remat="full")
  return jit_train_step(config, optimizer).lower(*arguments)


if __name__ == "__main__":
  main(*sys.argv[1:])
