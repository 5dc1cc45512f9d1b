"""Experiments on pods, and answers of the compiler that were not compiled."""

import dataclasses

from configs import hourllava
from hourjax.parallel.mesh import MeshConfig
from hourjax.planning import search
from hourjax.planning.compiler.compiled_step import Compiled
from hourjax.planning.plan import Plan, evaluate
from hourjax.planning.topology import Topology, parse_topology
from hourjax.planning.workload import make_workload
from hourjax.training.config import Experiment, build_experiment


def experiment(size="3b", stage=3, mesh=None, frames=0, **values) -> Experiment:
  """A configuration of the published sizes.

  Short videos of stage 3 are extracted too, unless there is room for `frames`.
  """
  videos = "pixels" if frames else "features"
  name = f"size={size},stage={stage},videos={videos}"
  config = hourllava.get_config(name).to_dict()
  if stage == 3:
    config["stream_rows"]["short"]["frames"] = frames
    config["rows"]["frames"] = frames
  found = build_experiment(config)
  mesh = MeshConfig(**mesh) if mesh else found.mesh
  return dataclasses.replace(found, mesh=mesh, **values)


def in_rows(found: Experiment, accumulate: int) -> Experiment:
  """The same with steps of `accumulate` micro-batches, full of samples."""
  return dataclasses.replace(
    found, batch_samples=0, drop_last=False, accumulate=accumulate
  )


def plan_by_formulas(
  found: Experiment, topology: Topology | str, data="", price=1.0, **changes
) -> Plan:
  """A plan whose programs are `search.formulas`; `changes` of their kinds."""
  if isinstance(topology, str):
    topology = parse_topology(topology)
  counted = search.count_parameters(found)
  answer = search.formulas(found, topology, counted)
  for name, value in changes.items():
    answer["programs"]["accumulate"][name] = value
  workload = make_workload(found, data)
  return evaluate(found, topology, workload, Compiled(answer), price)
