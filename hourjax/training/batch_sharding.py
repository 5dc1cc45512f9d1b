"""How the arrays of a micro-batch are split over hosts and devices."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hourjax.batch import Batch
from hourjax.data.rows import RowSpec, batch_capacity, empty_rows
from hourjax.data.sequence_sharding import (
  check_sequence_sharding,
  features_part,
  sequence_sharding_order,
)
from hourjax.errors import UserError
from hourjax.parallel.rules import RULES, spec

# Field of a batch -> logical axis of its second dimension, beside the rows of
# its first. The fields that are not named are indexed by all devices that share
# a row, so each of these has them whole.
_SPLIT = {
  "features": "memory",
  "memory_source": "memory",
  "memory_position": "memory",
  "memory_segment": "memory",
  "query_position": "queries",
  "query_segment": "queries",
  "query_reads": "queries",
  "decoder_position": "positions",
  "decoder_segment": "positions",
}


def batch_shardings(mesh: Mesh) -> Batch:
  """Returns the sharding of each array of a micro-batch."""
  return Batch(
    *(
      NamedSharding(mesh, spec("rows", *filter(None, [_SPLIT.get(name)])))
      for name in Batch._fields
    )
  )


def abstract_batch(rows: RowSpec, count: int, mesh: Mesh) -> Batch:
  """Returns shapes, dtypes and shardings of a micro-batch of `count` rows."""
  one = empty_rows(rows, 1)
  return Batch(
    *(
      jax.ShapeDtypeStruct(
        (count, *array.shape[1:]), array.dtype, sharding=sharding
      )
      for array, sharding in zip(one, batch_shardings(mesh))
    )
  )


def check_rows(
  sizes: Mapping[str, int],
  rows: RowSpec,
  count: int,
  accumulate: int = 1,
  samples: int = 0,
) -> None:
  """Checks that a mesh can share rows, from numbers alone.

  Args:
    sizes: number of devices along each axis of the mesh.
    rows: capacities.
    count: rows of a micro-batch, on all hosts together.
    accumulate: micro-batches in a step.
    samples: in a step, which takes as many micro-batches as they need; 0 if a
      step is `accumulate` micro-batches.

  Raises:
    UserError: the rows cannot be split; names both values and what to give
      instead.
  """
  groups = _devices(sizes, "rows")
  if samples and samples < groups:
    raise UserError(
      f"config.batch_samples={samples} cannot be split over {groups} groups of"
      f" devices (data={sizes['data']} x fsdp={sizes['fsdp']}), which take a"
      " row each; make config.mesh.seq or tensor larger and fsdp smaller, use"
      f" at most {samples} groups, or raise config.batch_samples"
    )
  if count % groups and samples:
    most = samples // groups * groups
    fitting = min(max(1, round(count / groups)) * groups, most)
    raise UserError(
      f"config.batch_rows={count} cannot be split over {groups} groups of"
      f" devices (data={sizes['data']} x fsdp={sizes['fsdp']}); give"
      f" --config.batch_rows={fitting} (the config.batch_samples={samples} of"
      " a step take as many micro-batches as they need), or make"
      " config.mesh.seq or tensor larger and fsdp smaller"
    )
  if count % groups:
    fitting = max(1, round(count / groups)) * groups
    times = max(1, round(count * accumulate / fitting))
    raise UserError(
      f"config.batch_rows={count} cannot be split over {groups} groups of"
      f" devices (data={sizes['data']} x fsdp={sizes['fsdp']}); give"
      f" --config.batch_rows={fitting} --config.accumulate={times}"
      f" ({fitting * times} rows a step instead of {count * accumulate}), or"
      " make config.mesh.seq or tensor larger and fsdp smaller"
    )
  check_sequence_sharding(rows, _devices(sizes, "memory"))


class BatchSharding:
  """Puts this host's rows of micro-batches onto its devices.

  Attributes:
    local_rows: the rows of a micro-batch that this host's devices hold, wholly
      or in part, ascending.
  """

  local_rows: list[int]

  def __init__(self, mesh: Mesh, rows: RowSpec, count: int):
    """Checks that the rows can be split.

    Args:
      mesh: with the axes of `parallel.mesh`.
      rows: of the micro-batches; these may have other capacities, too.
      count: rows of a micro-batch, on all hosts together.

    Raises:
      UserError: the rows cannot be split over the mesh; names both values.
    """
    check_rows(mesh.shape, rows, count)
    self._sharing = _devices(mesh.shape, "memory")
    self._rows, self._count = rows, count
    self._shardings = batch_shardings(mesh)
    places = self._shardings.target.addressable_devices_indices_map((count,))
    self.local_rows = sorted(
      {row for (place,) in places.values() for row in range(count)[place]}
    )

  def __call__(self, batch: Batch) -> Batch:
    """Returns a micro-batch on the devices, sharded over all hosts.

    Args:
      batch: numpy arrays of the rows `local_rows`.
    """
    # Streams may have rows of other capacities.
    rows = dataclasses.replace(self._rows, capacity=batch_capacity(batch))
    ordered = sequence_sharding_order(batch, rows, self._sharing)
    return Batch(*map(self._placed, Batch._fields, ordered, self._shardings))

  def as_targets(self, array: np.ndarray) -> jax.Array:
    """Returns numbers of all targets on the devices, split as these are.

    Args:
      array: [rows, L] of the rows `local_rows`.
    """
    return self._placed("target", array, self._shardings.target)

  def _placed(
    self, name: str, array: np.ndarray, sharding: NamedSharding
  ) -> jax.Array:
    """Returns one array of a micro-batch on the devices."""
    shape = (self._count, *array.shape[1:])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      """Returns what one device holds; features are cut out only here."""
      assert index is not None  # only of an array that has no dimension
      own = array[self._local(index[0])]
      if name != "features" or not own.size:
        return own[(slice(None), *index[1:])]
      devices = self._sharing
      number = (index[1].start or 0) * devices // shape[1]
      return features_part(own, self._rows.frame_tokens, devices, number)

    return jax.make_array_from_callback(shape, sharding, part)

  def _local(self, rows: slice) -> slice:
    """Returns which of this host's rows are `rows` of the micro-batch."""
    wanted = range(self._count)[rows]
    first = self.local_rows.index(wanted[0])
    return slice(first, first + len(wanted))


def _devices(sizes: Mapping[str, int], axis: str) -> int:
  """Returns the number of devices that a logical axis is split over."""
  return math.prod(sizes[name] for name in RULES[axis])
