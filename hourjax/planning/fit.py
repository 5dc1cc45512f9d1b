"""The smallest change with which a step fits, tried out on the compiler."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from hourjax.errors import UserError
from hourjax.planning.compiler.compiled_step import LIMIT, compile_step
from hourjax.planning.plan import Plan, evaluate
from hourjax.planning.topology import Topology
from hourjax.training.config import Experiment


@dataclasses.dataclass(frozen=True)
class Change:
  """Describes options that are set differently.

  Attributes:
    flags: the options as they are written on the command line.
    experiment: the experiment with the change.
    topology: the topology with the change.
  """

  flags: tuple[str, ...]
  experiment: Experiment
  topology: Topology


def remedy(
  plan: Plan, log: Callable[[str], None] = print, limit: float = LIMIT
) -> tuple[Change, Plan] | None:
  """Finds the first change, from small to large, with which a plan fits.

  Changes are tried alone, then together, then with ever more chips; each is
  compiled.

  Args:
    plan: a plan that does not fit.
    log: called with a line about each change that is tried.
    limit: seconds that the compiler may take for each change.

  Returns:
    The change and the plan with it, or None if no change helps.
  """
  for change in changes(plan.experiment, plan.topology):
    log(f"does not fit; trying {' '.join(change.flags)}")
    try:
      compiled = compile_step(
        change.experiment, change.topology, plan.workload, limit=limit
      )
    except UserError as error:
      log(f"  left out: {error}")
      continue
    found = evaluate(
      change.experiment, change.topology, plan.workload, compiled, plan.price
    )
    if found.fits:
      return change, found
  return None


def changes(experiment: Experiment, topology: Topology) -> Iterator[Change]:
  """Yields changes to try in turn: what costs the least time comes first.

  Args:
    experiment: an experiment that does not fit.
    topology: the topology that it does not fit.
  """
  start = Change((), experiment, topology)
  single = (fewer_rows, full_remat, short_moments, longer_seq)
  for step in single:
    changed = step(start)
    if changed is not None:
      yield changed
  together = start
  for step in single:
    together = step(together) or together
  if len(together.flags) > 2:
    yield together
  larger = more_chips(together)
  while larger is not None:
    yield larger
    larger = more_chips(larger)


def fewer_rows(change: Change) -> Change | None:
  """Halves the rows of a micro-batch and doubles the micro-batches.

  In batches of samples there are as many micro-batches as these then take.

  Returns:
    The change with these options too, or None if it is not possible.
  """
  experiment = change.experiment
  data, fsdp, _, _ = experiment.mesh.sizes(change.topology.devices)
  rows = experiment.batch_rows // 2
  if experiment.batch_rows % 2 or not rows or rows % (data * fsdp):
    return None
  return _set_rows(change, rows, 2 * experiment.accumulate)


def full_remat(change: Change) -> Change | None:
  """Keeps nothing for the backward pass but the input of each layer.

  Returns:
    The change with this option too, or None if it is set already.
  """
  model = change.experiment.model
  if model.remat == "full":
    return None
  return Change(
    _flags(change, "config.model.remat=full"),
    dataclasses.replace(
      change.experiment, model=dataclasses.replace(model, remat="full")
    ),
    change.topology,
  )


def short_moments(change: Change) -> Change | None:
  """Stores the optimizer's first moment in bfloat16.

  Returns:
    The change with this option too, or None if it is set already.
  """
  optimizer = change.experiment.optimizer
  if optimizer.mu_dtype == "bfloat16":
    return None
  return Change(
    _flags(change, "config.optimizer.mu_dtype=bfloat16"),
    dataclasses.replace(
      change.experiment,
      optimizer=dataclasses.replace(optimizer, mu_dtype="bfloat16"),
    ),
    change.topology,
  )


def longer_seq(change: Change) -> Change | None:
  """Splits each row over twice as many devices, with half as many rows.

  Returns:
    The change with these options too, or None if it is not possible.
  """
  experiment = change.experiment
  data, fsdp, seq, tensor = experiment.mesh.sizes(change.topology.devices)
  if fsdp % 2 or experiment.batch_rows % 2:
    return None
  mesh = dataclasses.replace(
    experiment.mesh, data=data, fsdp=fsdp // 2, seq=2 * seq, tensor=tensor
  )
  changed = _set_rows(
    change, experiment.batch_rows // 2, 2 * experiment.accumulate
  )
  flags = (f"config.mesh.fsdp={mesh.fsdp}", f"config.mesh.seq={mesh.seq}")
  return Change(
    _flags(changed, *flags),
    dataclasses.replace(changed.experiment, mesh=mesh),
    change.topology,
  )


def more_chips(change: Change) -> Change | None:
  """Doubles the slice, and splits parameters over twice as many devices.

  Returns:
    The change with these options too, or None if there is no larger slice.
  """
  topology = change.topology.doubled()
  if topology is None:
    return None
  experiment = change.experiment
  data, fsdp, seq, tensor = experiment.mesh.sizes(change.topology.devices)
  mesh = dataclasses.replace(
    experiment.mesh, data=data, fsdp=2 * fsdp, seq=seq, tensor=tensor
  )
  rows = experiment.batch_rows
  accumulate = experiment.accumulate
  if rows % (2 * data * fsdp):  # a row for each of the new groups
    rows, accumulate = 2 * rows, max(1, accumulate // 2)
  if experiment.batch_samples and rows > experiment.batch_samples:
    return None
  changed = _set_rows(change, rows, accumulate)
  flags = (f"config.mesh.fsdp={mesh.fsdp}", f"topology={topology.name}")
  return Change(
    _flags(changed, *flags),
    dataclasses.replace(changed.experiment, mesh=mesh),
    topology,
  )


def _set_rows(change: Change, rows: int, accumulate: int) -> Change:
  """Returns the change with other micro-batches."""
  if change.experiment.batch_samples:
    return _set(change, batch_rows=rows)
  return _set(change, batch_rows=rows, accumulate=accumulate)


def _set(change: Change, **values: Any) -> Change:
  """Returns the change with fields of the experiment set as well."""
  return Change(
    _flags(change, *(f"config.{k}={v}" for k, v in values.items())),
    dataclasses.replace(change.experiment, **values),
    change.topology,
  )


def _flags(change: Change, *new: str) -> tuple[str, ...]:
  """Returns a change's flags with new ones, which replace the old by name."""
  names = {flag.partition("=")[0] for flag in new}
  kept = (
    flag
    for flag in change.flags
    if flag.removeprefix("--").partition("=")[0] not in names
  )
  return (*kept, *(f"--{flag}" for flag in new))
