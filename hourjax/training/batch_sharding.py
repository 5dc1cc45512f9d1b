"""Micro-batches from hosts to the devices of a mesh."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hourjax.batch import Batch
from hourjax.data.rows import RowSpec, empty_rows
from hourjax.data.sequence_sharding import (
  check_sequence_sharding,
  deal,
  features_part,
)
from hourjax.errors import UserError
from hourjax.parallel.rules import RULES, spec

# Beside its rows. What is looked up elsewhere, by all devices that share the
# row, is not split.
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
  """How each array of a micro-batch is split."""
  return Batch(
    *(
      NamedSharding(mesh, spec("rows", *filter(None, [_SPLIT.get(name)])))
      for name in Batch._fields
    )
  )


def abstract_batch(rows: RowSpec, count: int, mesh: Mesh) -> Batch:
  """Shapes, dtypes and shardings of a micro-batch of `count` rows."""
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
  sizes: Mapping[str, int], rows: RowSpec, count: int, accumulate: int = 1
) -> None:
  """Refuses rows that a mesh cannot share.

  The one check of `train` and of `plan`, which needs no devices.

  Args:
    sizes: of the mesh, by axis.
    rows: capacities.
    count: rows of a micro-batch, on all hosts together.
    accumulate: micro-batches in a step.

  Raises:
    UserError: they cannot be split; names both values and what to give instead.
  """
  groups = _devices(sizes, "rows")
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


class Placing:
  """Puts this host's rows of micro-batches on its devices.

  Attributes:
    mine: numbers of the rows of a micro-batch that this host's devices hold,
      wholly or in part, ascending.
  """

  mine: list[int]

  def __init__(self, mesh: Mesh, rows: RowSpec, count: int):
    """Checks that the rows can be split.

    Args:
      mesh: with the axes of `parallel.mesh`.
      rows: capacities.
      count: rows of a micro-batch, on all hosts together.

    Raises:
      UserError: they cannot be split over the mesh; names both values.
    """
    check_rows(mesh.shape, rows, count)
    self._sharing = _devices(mesh.shape, "memory")
    self._rows, self._count = rows, count
    self._shardings = batch_shardings(mesh)
    places = self._shardings.target.addressable_devices_indices_map((count,))
    self.mine = sorted(
      {row for (place,) in places.values() for row in range(count)[place]}
    )

  def __call__(self, batch: Batch) -> Batch:
    """Arrays on the devices, from numpy arrays of the rows `mine`."""
    dealt = deal(batch, self._rows, self._sharing)
    return Batch(*map(self._placed, Batch._fields, dealt, self._shardings))

  def _placed(self, name, array: np.ndarray, sharding):
    shape = (self._count, *array.shape[1:])

    def part(index):
      own = array[self._local(index[0])]
      if name != "features" or not own.size:
        return own[(slice(None), *index[1:])]
      devices = self._sharing
      number = (index[1].start or 0) * devices // shape[1]
      return features_part(own, self._rows.frame_tokens, devices, number)

    return jax.make_array_from_callback(shape, sharding, part)

  def _local(self, rows: slice) -> slice:
    """Rows of the micro-batch to rows of this host."""
    wanted = range(self._count)[rows]
    first = self.mine.index(wanted[0])
    return slice(first, first + len(wanted))


def _devices(sizes: Mapping[str, int], axis: str) -> int:
  return math.prod(sizes[name] for name in RULES[axis])
