"""A training step on the devices at hand: drawn, compiled, timed and traced.

The programs are those of training. Parameters are drawn, and rows generated in
the sizes of the stage's data, so nothing has to be there but the devices.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from hourjax.batch import Batch
from hourjax.benchmarks import step_profile
from hourjax.benchmarks.step_profile import Times
from hourjax.data import synthetic
from hourjax.models.flops import Work
from hourjax.parallel.mesh import make_mesh
from hourjax.planning import hlo
from hourjax.planning.workload import Workload, make_workload
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.config import Experiment
from hourjax.training.train_state import (
  TrainState,
  abstract_state,
  fresh_state,
  state_shardings,
)
from hourjax.training.train_step import TrainStep, check_mesh, lower_programs

_TRACED = 2  # steps in the trace
_STEPS = 1000  # of the learning-rate schedule, which costs the same at any
# Without graphs of kernels, of which a trace has no names.
_NO_GRAPHS: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": ""}
_IN_KEY = "jax_compilation_cache_include_metadata_in_key"


class Prepared(NamedTuple):
  """Holds a step that is ready to run.

  Attributes:
    experiment: what is measured.
    workload: the rows of one step.
    mesh: the devices.
    step: the step, compiled.
    programs: its compiled programs.
    state: drawn.
    batches: the micro-batches of one step, on the devices.
  """

  experiment: Experiment
  workload: Workload
  mesh: Mesh
  step: TrainStep
  programs: dict[str, jax.stages.Compiled]
  state: TrainState
  batches: list[Batch]


def prepare(experiment: Experiment) -> Prepared:
  """Draws and compiles all that a step needs.

  Args:
    experiment: what to measure.

  Raises:
    UserError: the mesh does not suit the devices, or no row holds a sample.
  """
  experiment = dataclasses.replace(
    experiment, batch_samples=0, drop_last=False, init=""
  )
  devices = jax.devices()
  check_mesh(experiment, len(devices))
  workload, drawn, numbers = _rows(experiment)
  mesh = make_mesh(experiment.mesh, devices)
  like, optimizer = abstract_state(experiment, mesh, _STEPS)
  options = dict(_NO_GRAPHS) if devices[0].platform == "gpu" else None
  with _scopes_in_cache():
    programs = {
      name: lowered.compile(compiler_options=options)
      for name, lowered in lower_programs(experiment, mesh).items()
    }
  step = TrainStep(experiment.model, optimizer, state_shardings(like))
  step.programs.update(programs)
  place = BatchSharding(mesh, experiment.row_spec, experiment.batch_rows)
  batches = []
  for first in range(0, len(numbers), experiment.batch_rows):
    rows = synthetic.build_rows(
      drawn,
      [numbers[first + row] for row in place.local_rows],
      experiment.row_spec,
      experiment.sample_options,
      experiment.model.decoder.vocab,
    )
    batches.append(place(rows))
  state = fresh_state(experiment, like, optimizer)
  return Prepared(experiment, workload, mesh, step, programs, state, batches)


@contextlib.contextmanager
def _scopes_in_cache() -> Iterator[None]:
  """Lets the cache of compiled programs tell programs apart by their scopes.

  By default it does not, and a program out of it has the names of whichever
  was compiled first.
  """
  before = jax.config.values[_IN_KEY]
  jax.config.update(_IN_KEY, True)
  try:
    yield
  finally:
    jax.config.update(_IN_KEY, before)


def _rows(
  experiment: Experiment,
) -> tuple[Workload, synthetic.DrawnRows, list[int]]:
  """Draws a stage's rows, and chooses those of one step among them.

  They are spread evenly over all rows by the work that these are, so that few
  rows stand for many.

  Returns:
    The workload of the chosen rows, all drawn rows, and which of them are
    chosen.
  """
  every = make_workload(experiment)
  assert every.drawn is not None  # it is a stage's
  count, drawn = experiment.step_rows, len(every.useful)
  place = (np.arange(count) + 0.5) * drawn / count
  # The heaviest and the lightest rows would stand in different shards else.
  place = np.random.default_rng(experiment.seed).permutation(place)
  numbers = np.argsort(every.useful, kind="stable")[place.astype(int)]
  chosen = dataclasses.replace(
    every,
    work=Work(*(np.broadcast_to(x, drawn)[numbers] for x in every.work)),
    useful=every.useful[numbers],
    seconds=every.seconds[numbers],
    sizes=every.sizes[numbers],
  )
  return chosen, every.drawn, numbers.tolist()


def timed(made: Prepared, steps: int) -> tuple[TrainState, float]:
  """Takes a step to warm up, and then those that are timed.

  Args:
    made: the step.
    steps: how many are timed.

  Returns:
    The state after them, and the seconds of one.
  """
  state, _ = made.step(made.state, made.batches)
  jax.block_until_ready(state)
  began = time.perf_counter()
  for _ in range(steps):
    state, _ = made.step(state, made.batches)
  jax.block_until_ready(state)
  return state, (time.perf_counter() - began) / steps


def traced(made: Prepared, state: TrainState, folder: pathlib.Path) -> Times:
  """Traces steps, and returns the times of one.

  Args:
    made: the step.
    state: that it takes.
    folder: where the trace is written.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(folder, profiler_options=options):
    for _ in range(_TRACED):
      state, _ = made.step(state, made.batches)
    jax.block_until_ready(state)
  labels = dict(
    step_profile.label_program(
      hlo.program_text(program), "update" if name == "update" else ""
    )
    for name, program in made.programs.items()
  )
  times = step_profile.add_up(step_profile.read_trace(folder), labels)
  return Times(
    {label: x / _TRACED for label, x in times.work.items()},
    times.collectives / _TRACED,
    times.idle / _TRACED,
  )
