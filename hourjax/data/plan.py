"""Which samples share a row: a plan that is a pure function of its inputs."""

import bisect
import functools
import threading
from collections.abc import Sequence

import numpy as np

from hourjax.data.rows import Size

_WINDOW = 256  # samples among which first-fit looks for a place


class RowPlan:
  """Rows of samples, epoch after epoch, by random access.

  Each epoch is a new shuffle, packed first-fit within windows: a sample goes
  into the first open row of its window that has room for it in every
  capacity. Row k is the same whoever asks, so a position in the data is one
  integer.
  """

  def __init__(
    self,
    sizes: Sequence[Size],
    capacity: Size,
    *,
    seed: int,
    shuffle: bool = True,
  ):
    """All sizes must fit the capacity (see `rows.check_fits`)."""
    self._sizes = np.array([size.astuple() for size in sizes]).reshape(
      len(sizes), -1
    )
    self._capacity = np.array(capacity.astuple())
    self._seed, self._shuffle = seed, shuffle
    self._ends: list[int] = []  # rows up to the end of each planned epoch
    self._planning = threading.Lock()  # rows are built in several threads
    self._epoch_rows = functools.lru_cache(maxsize=4)(self._plan_epoch)

  def row(self, k: int) -> tuple[int, tuple[int, ...]]:
    """(epoch, sample indices) of row k."""
    with self._planning:
      while (epoch := bisect.bisect_right(self._ends, k)) == len(self._ends):
        before = self._ends[-1] if self._ends else 0
        self._ends.append(before + len(self._epoch_rows(epoch)))
    first = self._ends[epoch - 1] if epoch else 0
    return epoch, self._epoch_rows(epoch)[k - first]

  def rows_in_epoch(self, epoch: int) -> int:
    return len(self._epoch_rows(epoch))

  def _plan_epoch(self, epoch: int) -> list[tuple[int, ...]]:
    order = np.arange(len(self._sizes))
    if self._shuffle:
      order = np.random.default_rng([self._seed, epoch]).permutation(order)
    rows = []
    for start in range(0, len(order), _WINDOW):
      rows += self._first_fit(order[start : start + _WINDOW])
    return rows

  def _first_fit(self, window) -> list[tuple[int, ...]]:
    rows, free = [], np.zeros((len(window), len(self._capacity)), int)
    for sample in window:
      size = self._sizes[sample]
      fits = np.all(free[: len(rows)] >= size, axis=1)
      place = int(np.argmax(fits)) if fits.any() else len(rows)
      if place == len(rows):
        rows.append([])
        free[place] = self._capacity
      rows[place].append(int(sample))
      free[place] -= size
    return [tuple(row) for row in rows]
