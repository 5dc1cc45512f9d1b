"""The capacities of rows that suit the samples of a dataset.

Linear layers compute whole rows, so what a row is not filled with is lost; and
an empty row of a step's last micro-batch costs as much as another in all but
attention. In batches of samples a stream's steps are about as large (see
`data.packing`), so that rows can be made to suit: n micro-batches of a
step, just filled.

For each number of micro-batches the capacities are those that a step's samples
take, and 3 to 15 % more. The best of them are then changed, one capacity at a
time, as long as an epoch becomes shorter by the formulas of `search`.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hourjax import progress
from hourjax.data.rows import Size
from hourjax.errors import UserError
from hourjax.planning import search
from hourjax.planning.compiler.compiled_step import Compiled
from hourjax.planning.plan import Plan, evaluate
from hourjax.planning.topology import Topology
from hourjax.planning.workload import Samples, fitting, pack, take_samples
from hourjax.training.config import Experiment
from hourjax.training.train_step import check_mesh

# Share of a stream's samples that its rows may be too small for, beside those
# that `config.rows` does not hold.
LEFT_OUT = 0.001
_MOST = 12  # micro-batches of a step that are tried
# Share of the capacities that is left free while they are chosen: steps differ,
# and one row too many costs as much as a whole micro-batch.
_ROOM = 0.02
_SAMPLES = 4096  # of a stream that are packed, again and again
_CHECKED = 8  # of the best capacities with which all samples are packed
_BEST = 3  # of these whose capacities are then changed
_FILLS = (0.97, 0.94, 0.91, 0.87)  # of the capacities that are tried first
# Tiles come many at a time, and cost less than what a row is mostly made of.
_TILES = (0.9, 0.55)
_AT_TILES = Size.names().index("tiles")
_FACTORS = (0.97, 1.03, 0.9, 1.1)
_SWEEPS = 3
# Capacities are multiples of these: `seq` devices share tokens, features are
# whole frames, and an image is blended from 81 x 81 patches.
_UNITS = Size(
  features=64, frames=1, tiles=1, blends=81, memory=128, queries=128,
  decoder=128,
)  # fmt: skip


class Fitted(NamedTuple):
  """Holds the capacities that were found for a stream.

  Attributes:
    size: of its rows.
    plan: the stream's plan by formulas, with them.
    before: the same with the capacities that were given.
    left_out: share of its samples that no row holds.
  """

  size: Size
  plan: Plan
  before: Plan
  left_out: float


def fit_rows(
  experiment: Experiment, topology: Topology, samples: Samples
) -> dict[str, Fitted]:
  """Finds capacities of rows for each stream of the samples.

  Args:
    experiment: with the mesh, the rows of a micro-batch and the samples of a
      step.
    topology: what runs it.
    samples: of a stage or a dataset.

  Returns:
    By stream, as in `Experiment.row_specs`.

  Raises:
    UserError: the mesh does not suit the devices, or nothing fits a device.
  """
  check_mesh(experiment, topology.devices, topology.slices)
  counted = search.count_parameters(experiment)
  found = {}
  for stream in pack(experiment, samples).streams:
    with progress.step(f"finding rows of {stream or 'all samples'}"):
      fit = _StreamFit(experiment, topology, samples, stream, counted)
      found[stream] = fit.best()
  return found


def _line(plan: Plan) -> str:
  """Returns what a stream's rows cost, in words."""
  found = plan.estimate
  if found is None or not math.isfinite(_days_of(plan)):
    return "does not fit"
  return (
    f"{found.days:.3f} days, MFU {found.mfu:.1%} ({found.rows:.1f} rows in"
    f" {found.micro_batches:.2f} micro-batches a step, {found.empty:.0%} empty)"
  )


class _StreamFit:
  """Judges capacities of one stream's rows."""

  def __init__(
    self,
    experiment: Experiment,
    topology: Topology,
    samples: Samples,
    stream: str,
    counted: dict[str, float],
  ):
    """Takes the arguments of `fit_rows`, and a stream.

    Args:
      experiment: see `fit_rows`.
      topology: see `fit_rows`.
      samples: see `fit_rows`.
      stream: a name in `experiment.row_specs`.
      counted: what `search.count_parameters` returns.
    """
    self._experiment, self._topology = experiment, topology
    self._stream, self._counted = stream, counted
    own = experiment.rows_by_stream
    names = samples.columns.streams
    of_stream = [i for i, name in enumerate(names)
                 if (name if name in own else "") == stream]  # fmt: skip
    members = samples.members[
      np.isin(samples.columns.stream[samples.members], of_stream)
    ]
    # Those that the largest rows hold, whatever the stream's are now.
    within = samples.sizes[members] <= np.array(experiment.rows.astuple())
    good = within.all(axis=1) & ~np.isin(members, list(samples.problems))
    self._sizes = samples.sizes[members[good]]
    if not len(self._sizes):
      raise UserError(
        f"--fit_rows={samples.name}: config.rows holds no sample of stream"
        f" {stream!r}; raise its capacities"
      )
    # As if the stage or dataset were this stream, and as if it were a few of
    # them.
    total = samples.total * len(members) / len(samples.members)
    self._all = samples._replace(members=members, total=total)
    few = np.random.default_rng(0).permutation(len(members))[:_SAMPLES]
    self._few = self._all._replace(members=np.sort(members[few]))
    self._judged: dict[Size, float] = {}

  def best(self) -> Fitted:
    """Returns the best capacities.

    Raises:
      UserError: none fits a device.
    """
    for size in (self._own(), *self._first()):
      self._days(size)
    for size in self._ranked()[:_BEST]:
      if math.isfinite(self._judged[size]):
        self._change(size)
    # What suits a few of the samples need not suit all, above all where their
    # rows just fill the micro-batches.
    sizes = [self._own(), *self._ranked()[:_CHECKED]]
    plans = [self._plan(size, self._all) for size in sizes]
    days, at = min((_days_of(plan), i) for i, plan in enumerate(plans))
    if not math.isfinite(days):
      raise UserError(
        f"--fit_rows={self._all.name}: rows that hold the samples of stream"
        f" {self._stream!r} fit no device of {self._topology.name}; take a"
        " larger slice, or a mesh with more seq"
      )
    good = fitting(plans[at].experiment, self._all)
    return Fitted(sizes[at], plans[at], plans[0], float(1 - good.mean()))

  def _ranked(self) -> list[Size]:
    """Returns the capacities that were judged, the best first."""
    return sorted(self._judged, key=self._judged.__getitem__)

  def _own(self) -> Size:
    """Returns the capacities that are given."""
    experiment = self._experiment
    return experiment.rows_by_stream.get(self._stream, experiment.rows)

  def _least(self) -> np.ndarray:
    """Returns the capacities that nearly all samples need."""
    share = 1 - LEFT_OUT / 4
    return np.quantile(self._sizes, share, axis=0, method="higher")

  def _first(self) -> Iterator[Size]:
    """Yields capacities for every number of micro-batches of a step."""
    experiment, least = self._experiment, self._least()
    mean, each = self._sizes.mean(axis=0), experiment.batch_rows
    for count in range(1, _MOST + 1):
      if experiment.batch_samples:
        samples = experiment.batch_samples / (count * each)
        if samples < 1:
          return
      else:
        samples = 2.0**count / 2
      for fill in _FILLS:
        wanted = samples * mean / fill
        for share in _TILES:
          wanted[_AT_TILES] = samples * mean[_AT_TILES] / share
          yield _size(np.maximum(least, wanted))

  def _change(self, size: Size) -> None:
    """Changes one capacity after the other as long as that helps."""
    least, days = self._least(), self._judged[size]
    for _ in range(_SWEEPS):
      start = days
      # The capacities that cost the most are the last ones.
      for place in reversed(range(len(least))):
        for factor in _FACTORS:
          values = np.array(size.astuple(), np.float64)
          values[place] = max(least[place], values[place] * factor)
          other = _size(values)
          if self._days(other) < days:
            days, size = self._judged[other], other
      if days == start:
        return

  def _days(self, size: Size) -> float:
    """Returns the days of an epoch of the stream, judged by a few samples."""
    if size not in self._judged:
      self._judged[size] = _days_of(self._plan(size, self._few, _ROOM))
    return self._judged[size]

  def _plan(self, size: Size, samples: Samples, room: float = 0.0) -> Plan:
    """Returns the stream's plan by formulas.

    Args:
      size: capacities of its rows.
      samples: of the stream.
      room: share of the capacities that is left free.
    """
    tight = np.maximum((1 - room) * np.array(size.astuple()), self._least())
    tight = np.minimum(tight.astype(int), size.astuple()).tolist()
    workload = pack(self._with(Size(*tight)), samples, self._stream)
    experiment = self._with(size)
    answer = search.formulas(
      experiment, self._topology, self._counted, [self._stream]
    )
    return evaluate(
      experiment, self._topology, workload, Compiled(answer), None
    )

  def _with(self, size: Size) -> Experiment:
    """Returns the experiment with these capacities of the stream's rows."""
    experiment = self._experiment
    if not self._stream:
      return dataclasses.replace(experiment, rows=size)
    rows = experiment.stream_rows | {self._stream: size}
    return dataclasses.replace(experiment, stream_rows=rows)


def _size(values: Iterable[float]) -> Size:
  """Returns capacities, rounded up to their units."""
  return Size(
    *(
      math.ceil(value / unit) * unit
      for value, unit in zip(values, _UNITS.astuple())
    )
  )


def propose(
  experiment: Experiment,
  topologies: Sequence[Topology],
  name: str,
  as_json: bool = False,
) -> str:
  """Returns a page with the capacities for a stage's or a dataset's samples.

  Args:
    experiment: see `fit_rows`.
    topologies: one of them.
    name: of the stage, or the dataset's folder.
    as_json: whether to return one JSON object in place of the page.

  Raises:
    UserError: see `fit_rows`; or there are several topologies.
  """
  if len(topologies) > 1:
    raise UserError("--fit_rows: --topology names several slices; give one")
  with progress.step("measuring samples"):
    samples = take_samples(experiment, name, "--fit_rows")
  found = fit_rows(experiment, topologies[0], samples)
  if as_json:
    data = {
      stream: {
        "rows": dataclasses.asdict(each.size),
        "left_out": each.left_out,
        "days": [
          days if math.isfinite(days) else None
          for days in (_days_of(each.before), _days_of(each.plan))
        ],
      }
      for stream, each in found.items()
    }
    return json.dumps(data)
  lines = [samples.note, ""]
  for stream, each in found.items():
    key = f"config.stream_rows.{stream}" if stream else "config.rows"
    lines += [
      f"{key}: {each.left_out:.2%} of its samples are left out",
      f"  now      {_line(each.before)}",
      f"  with it  {_line(each.plan)}",
      f"  {' '.join(flags(stream, each.size))}",
    ]
  return "\n".join(lines)


def _days_of(plan: Plan) -> float:
  """Returns the days of an epoch of a stream; infinite if it does not fit."""
  memory, found = plan.memory, plan.estimate
  if memory is None or found is None:
    return math.inf
  fits = memory.total <= search.ROOM * memory.limit
  return found.days if fits else math.inf


def flags(stream: str, size: Size) -> list[str]:
  """Returns the options that give training the capacities of a stream."""
  key = f"stream_rows.{stream}" if stream else "rows"
  return [
    f"--config.{key}.{name}={value}"
    for name, value in zip(Size.names(), size.astuple())
  ]
