"""The smallest change that makes a step fit, tried out on the compiler."""

import dataclasses
from collections.abc import Callable, Iterator

from hourjax.errors import UserError
from hourjax.planning.compiled_step import compile_step
from hourjax.planning.plan import Plan, evaluate
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Workload
from hourjax.training.config import Experiment


@dataclasses.dataclass(frozen=True)
class Change:
  """Something to set differently.

  Attributes:
    flags: as they are written on the command line.
    experiment, topology: with the change.
  """

  flags: tuple[str, ...]
  experiment: Experiment
  topology: Topology


def remedy(
  plan: Plan, say: Callable[[str], None] = print
) -> tuple[Change, Plan] | None:
  """The first change, from small to large, with which a plan fits.

  Changes are tried alone, then together, then with ever more chips; each is
  compiled.

  Args:
    plan: one that does not fit.
    say: is told what is being tried.
  """
  for change in changes(plan.experiment, plan.topology):
    say(f"does not fit; trying {' '.join(change.flags)}")
    found = _compiled(change, plan)
    if found is not None and found.fits:
      return change, found
  return None


def _compiled(change: Change, plan: Plan) -> Plan | None:
  workload: Workload = plan.workload
  try:
    compiled = compile_step(change.experiment, change.topology, workload)
  except UserError:  # it cannot be split so
    return None
  return evaluate(
    change.experiment, change.topology, workload, compiled, plan.price
  )


def changes(experiment: Experiment, topology: Topology) -> Iterator[Change]:
  """Changes to try in turn: what costs the least time comes first."""
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
  """Half the rows in a micro-batch and twice as many of these."""
  experiment = change.experiment
  data, fsdp, _, _ = experiment.mesh.sizes(change.topology.devices)
  rows = experiment.batch_rows // 2
  if experiment.batch_rows % 2 or not rows or rows % (data * fsdp):
    return None
  return _set(change, batch_rows=rows, accumulate=2 * experiment.accumulate)


def full_remat(change: Change) -> Change | None:
  """Nothing kept but the input of each layer."""
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
  """The first moment in bfloat16."""
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
  """Rows over twice as many devices, and half as many at once."""
  experiment = change.experiment
  data, fsdp, seq, tensor = experiment.mesh.sizes(change.topology.devices)
  if fsdp % 2 or experiment.batch_rows % 2:
    return None
  mesh = dataclasses.replace(
    experiment.mesh, data=data, fsdp=fsdp // 2, seq=2 * seq, tensor=tensor
  )
  changed = _set(
    change,
    batch_rows=experiment.batch_rows // 2,
    accumulate=2 * experiment.accumulate,
  )
  flags = (f"config.mesh.fsdp={mesh.fsdp}", f"config.mesh.seq={mesh.seq}")
  return Change(
    _flags(changed, *flags),
    dataclasses.replace(changed.experiment, mesh=mesh),
    change.topology,
  )


def more_chips(change: Change) -> Change | None:
  """Twice the slice; parameters are split over twice as many devices."""
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
  changed = _set(change, batch_rows=rows, accumulate=accumulate)
  flags = (f"config.mesh.fsdp={mesh.fsdp}", f"topology={topology.name}")
  return Change(
    _flags(changed, *flags),
    dataclasses.replace(changed.experiment, mesh=mesh),
    topology,
  )


def _set(change: Change, **values: int) -> Change:
  return Change(
    _flags(change, *(f"config.{k}={v}" for k, v in values.items())),
    dataclasses.replace(change.experiment, **values),
    change.topology,
  )


def _flags(change: Change, *new: str) -> tuple[str, ...]:
  """The flags with new ones, which take the place of those of one name."""
  names = {flag.partition("=")[0] for flag in new}
  kept = (
    flag
    for flag in change.flags
    if flag.removeprefix("--").partition("=")[0] not in names
  )
  return (*kept, *(f"--{flag}" for flag in new))
