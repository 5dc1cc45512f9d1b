"""Compiles a real train step with the real TPU compiler.

  python -m tests.training.compile_for_tpu configs/demo.py:stage=3 v5e:1x1

prints, as JSON, how often the compiled step calls each attention kernel, and
its memory in bytes.
"""

import collections
import dataclasses
import importlib.util
import json
import re
import sys

from jax.experimental import topologies

from hourjax.parallel.mesh import make_mesh
from hourjax.training.config import build_experiment
from hourjax.training.train_step import lower_programs


def main(config: str, topology: str) -> None:
  """Prints what the step holds."""
  path, _, argument = config.partition(":")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  experiment = build_experiment(module.get_config(argument).to_dict())
  topology = topologies.get_topology_desc(
    platform="tpu",
    topology_name=topology,
    chips_per_host_bounds=(1, 1, 1),
  )
  mesh = make_mesh(experiment.mesh, topology.devices[:1])
  # So that a test can see what is not computed again.
  model = dataclasses.replace(experiment.model, remat="full")
  experiment = dataclasses.replace(experiment, model=model)
  compiled = lower_programs(experiment, mesh)["accumulate"].compile()
  memory = compiled.memory_analysis()
  calls = re.findall(r"%(attention_\w+?)(?:\.\d+)? = ", compiled.as_text())
  print(
    json.dumps(
      {
        "calls": collections.Counter(calls),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
      }
    )
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
