"""Which samples share a row: a plan that is a pure function of its inputs.

An epoch becomes rows in three steps, each a function of (seed, epoch):

    shuffle   samples of each stream; those that share a memory stay together
    cut       into windows of about WINDOW samples, which are shuffled
    pack      a window, see `balance`

Only the window that a row is in is packed, so any row is found without those
before it, and a run goes on at a position that is one integer.

With `PlanOptions.batch_samples` = n a window is an optimizer step: exactly n
samples of one stream, in as many rows as they need, dealt so that steps are
about as large (`balance`). The last window of a stream in an epoch has what is
left, or is left out (`drop_last`). The rows of a step come in descending order
of their work: devices wait for one another in every micro-batch, and so the
rows of a micro-batch are about the same work.
"""

import dataclasses
import functools
import hashlib
import itertools
import threading
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64

from hourjax.data.packing.balance import (
  deal,
  even_out,
  fill_rows,
  first_fit,
  permute_groups,
  scarcest,
  whole_numbers,
)
from hourjax.data.rows import Size
from hourjax.errors import UserError

# position = epoch * EPOCH + window * WINDOW + row in the window. A window of
# at most WINDOW items has at most WINDOW rows. Where a window is a step of n
# samples, the smallest power of ten that is at least n stands for WINDOW.
EPOCH = 10**10
VERSION = 1  # changes with the rows that the same input gives
WINDOW = 1000  # at most so many groups of samples are packed together

_NONE: Mapping[int, Size] = types.MappingProxyType({})
Group = tuple[int, ...]  # samples that share one memory
Row = tuple[Group, ...]


@dataclasses.dataclass(frozen=True)
class PlanOptions:
  """Describes how samples become rows.

  Attributes:
    seed: of every shuffle.
    shuffle: False keeps the order of the samples (evaluation).
    share: samples of one video that may share its memory in a row.
    batch_samples: samples of an optimizer step, all of one stream; 0 lets a
      step be any number of rows.
    drop_last: whether the samples of a stream that are left over at the end of
      an epoch are left out, where they are fewer than `batch_samples`. As
      streams are shuffled anew, they are others in each epoch.
  """

  seed: int = 0
  shuffle: bool = True
  share: int = 1
  batch_samples: int = 0
  drop_last: bool = False


class RowPlan:
  """Gives rows of samples, epoch after epoch, by random access.

  The windows of all streams follow in random order, and each is packed. A
  position is one integer: row 3 of window 12 of epoch 2 is 20,000,012,003. To
  find a row, its epoch is shuffled and its window is packed, no other one.
  """

  def __init__(
    self,
    sizes: Int64[np.ndarray, "N 7"],
    capacity: Size,
    options: PlanOptions = PlanOptions(),
    *,
    stream_capacity: Mapping[int, Size] = _NONE,
    work: Float[np.ndarray, "N"] | None = None,
    members: Int[np.ndarray, "n"] | None = None,
    memory: Int[np.ndarray, "N"] | None = None,
    stream: Int[np.ndarray, "N"] | None = None,
    weight: Float[np.ndarray, "N"] | None = None,
  ):
    """Takes what the plan is a function of; plans nothing yet.

    Args:
      sizes: of all samples, each within the capacity; columns as `Size`.
      capacity: of a row.
      options: how samples become rows.
      stream_capacity: of rows of streams with another one, by their number.
      work: of each sample, in any unit, beside what every row costs. With
        `batch_samples` it orders the rows of a step; None for random order.
      members: the samples to use; all if None.
      memory: samples of the same number >= 0 read the same memory.
      stream: samples of different streams never share a row.
      weight: how often each sample is taken in an epoch; one of weight 0.25 is
        taken in one epoch of four.

    Raises:
      UserError: there is no sample to plan with, or every stream has fewer
        than a step takes and they are to be left out.
    """
    count = len(sizes)
    self._sizes, self._capacity = sizes, capacity
    self._stream_capacity = dict(stream_capacity)
    self._options = options
    self._work = None if work is None else whole_numbers(work)
    if members is None:
      members = np.arange(count)
    self._memory = np.full(count, -1) if memory is None else memory
    self._stream = np.zeros(count, int) if stream is None else stream
    self._weight = np.ones(count) if weight is None else weight
    self._members = members[self._weight[members] > 0]
    due = float(self._weight[self._members].sum())
    if due < 1:
      raise UserError(
        f"none of {count} samples can be used, or an epoch takes less than one"
        f" (the weights of {len(self._members)} add up to {due:.3g}); see why"
        " they were skipped, or raise config.data.weights"
      )
    self._planning = threading.RLock()  # rows are built in several threads
    self._epoch_order = functools.lru_cache(maxsize=2)(self._shuffle_epoch)
    self._pack = functools.lru_cache(maxsize=8)(self._pack_window)
    # (epoch, window) -> number of rows, which is all that `advance` needs.
    self._counts: dict[tuple[int, int], int] = {}
    batch = options.batch_samples
    self._stride = 10 ** len(str(batch - 1)) if batch else WINDOW
    if batch and options.drop_last and not self.steps_in_epoch(0):
      there = self.samples_by_stream(0).values()
      raise UserError(
        f"config.batch_samples={batch} is more than any stream has in an epoch"
        f" ({', '.join(map(str, there))} samples), and config.drop_last leaves"
        " smaller batches out, so that nothing is left; lower"
        " config.batch_samples or set config.drop_last=False"
      )

  @property
  def ordered_by_work(self) -> bool:
    """Returns whether the rows of a step are in descending order of work."""
    return bool(self._options.batch_samples) and self._work is not None

  @property
  def dealt(self) -> bool:
    """Returns whether samples are dealt to steps, see `balance`."""
    options = self._options
    return options.batch_samples > 0 and options.shuffle and options.share == 1

  def row(self, position: int) -> tuple[int, Row]:
    """Returns the epoch of a position and its row, groups of sample indices.

    Raises:
      IndexError: there is no row at this position.
    """
    epoch, window, row = self._split(position)
    rows = self._rows(epoch, window)
    if row >= len(rows):
      raise IndexError(
        f"position {position}: row {row} of {len(rows)} in window {window}"
      )
    return epoch, rows[row]

  def capacity(self, position: int) -> Size:
    """Returns the capacity of the row at a position."""
    epoch, window, _ = self._split(position)
    order = self._epoch_order(epoch)
    if not len(order.samples):
      return self._capacity
    first = order.starts[order.windows[window][0]]
    return self._capacity_of(int(self._stream[order.samples[first]]))

  def advance(self, position: int, rows: int) -> int:
    """Returns the position `rows` rows later.

    If window 0 has 5 rows, 4 rows after position 3 is row 2 of window 1: 1002.
    """
    epoch, window, row = self._split(position)
    row += rows
    while row >= (count := self._count(epoch, window)):
      row -= count
      window += 1
      if window == self._windows(epoch):
        epoch, window = epoch + 1, 0
    return epoch * EPOCH + window * self._stride + row

  def take(self, position: int, rows: int) -> tuple[list[int], int]:
    """Returns the positions of the next rows, and the position after them.

    With `batch_samples` no row of another step is taken: of a step of 5 rows,
    the next 4 from position 0 on are 0 to 3, and then 4 alone.

    Args:
      position: of the first row.
      rows: how many are wanted.
    """
    first = self.advance(position, 0)
    if not self._options.batch_samples:
      return (
        [self.advance(first, row) for row in range(rows)],
        self.advance(first, rows),
      )
    epoch, window, row = self._split(first)
    rows = min(rows, self._count(epoch, window) - row)
    return list(range(first, first + rows)), self.advance(first, rows)

  def begins_step(self, position: int) -> bool:
    """Returns whether a step of `batch_samples` samples begins at a position.

    Args:
      position: as `advance` or `take` returned it.
    """
    return position % self._stride == 0

  def rows_in_epoch(self, epoch: int) -> int:
    """Counts an epoch's rows, packing all of it (seconds for 1M samples)."""
    return sum(self.rows_by_window(epoch))

  def rows_by_window(self, epoch: int) -> list[int]:
    """Counts the rows of each window of an epoch, which packs all of it.

    With `batch_samples` these are the rows of each step.
    """
    windows = range(self._windows(epoch))
    return [self._count(epoch, window) for window in windows]

  def samples_by_stream(self, epoch: int) -> dict[int, int]:
    """Counts the samples that an epoch takes of each stream; packs nothing."""
    streams = self._stream[self._members]
    return {
      stream: int(
        self._times(epoch, self._members[streams == stream], stream).sum()
      )
      for stream in np.unique(streams).tolist()
    }

  def steps_in_epoch(self, epoch: int) -> int:
    """Counts the steps of `batch_samples` samples of an epoch; packs nothing.

    Whole batches of each stream, and without `drop_last` what is left of each.
    """
    return sum(map(self._cuts, self.samples_by_stream(epoch).values()))

  def fingerprint(self) -> str:
    """Returns 16 hexadecimal digits, the same for plans of the same rows."""
    capacity = np.array(self._capacity.astuple())
    parts = [self._sizes, capacity, self._members, self._memory,
             self._stream, self._weight]  # fmt: skip
    for stream, size in sorted(self._stream_capacity.items()):
      parts.append(np.array((stream, *size.astuple())))
    options = self._options
    # Written as before there were batches of samples: runs of then go on.
    text = (
      f"{VERSION} PlanOptions(seed={options.seed}, shuffle={options.shuffle},"
      f" share={options.share})"
    )
    if options.batch_samples:
      text += f" {options.batch_samples} {options.drop_last}"
      if self._work is not None:
        parts.append(self._work)
      text += " dealt" * self.dealt
    whole = hashlib.sha256(text.encode())
    for part in parts:
      whole.update(np.ascontiguousarray(part, np.float64).data)
    return whole.hexdigest()[:16]

  def epoch_rows(self, epoch: int) -> list[Row]:
    """Returns all rows of an epoch in order."""
    return [
      row
      for window in range(self._windows(epoch))
      for row in self._rows(epoch, window)
    ]

  def _windows(self, epoch: int) -> int:
    """Returns the number of windows of an epoch."""
    with self._planning:
      return len(self._epoch_order(epoch).windows)

  def _rows(self, epoch: int, window: int) -> list[Row]:
    """Returns the rows of a window, from the cache if they are there."""
    with self._planning:
      if window >= (count := self._windows(epoch)):
        raise IndexError(
          f"window {window} of {count} in epoch {epoch}: the position is one of"
          " another plan"
        )
      rows = self._pack(epoch, window)
      self._counts[epoch, window] = len(rows)
      return rows

  def _count(self, epoch: int, window: int) -> int:
    """Returns the number of rows of a window."""
    if (epoch, window) not in self._counts:
      self._rows(epoch, window)
    return self._counts[epoch, window]

  def _shuffle_epoch(self, epoch: int) -> "_EpochOrder":
    """Shuffles an epoch and cuts it into windows."""
    samples, starts, windows = [], [], []
    taken, groups = 0, 0
    for stream in np.unique(self._stream[self._members]).tolist():
      part, first = self._shuffle_stream(epoch, stream)
      samples.append(part)
      starts.append(first + taken)
      ends = groups + self._borders(first, len(part))
      windows += zip(ends[:-1].tolist(), ends[1:].tolist())
      taken, groups = taken + len(part), groups + len(first)
    if self._options.shuffle:
      order = self._rng(epoch, "windows").permutation(len(windows))
      windows = [windows[i] for i in order.tolist()]
    return _EpochOrder(
      np.concatenate(samples),
      np.append(np.concatenate(starts), taken),
      # One empty window if no sample is due in this epoch, which happens where
      # every weight is below 1.
      windows or [(0, 0)],
    )

  def _borders(
    self, starts: Int64[np.ndarray, "g"], samples: int
  ) -> Int64[np.ndarray, "w"]:
    """Returns the borders of a stream's windows, as numbers of groups.

    Windows of rows are alike, since a short last one would pack badly: 2,500
    groups become 833, 833 and 834.

    Args:
      starts: the number of the sample that each group begins with.
      samples: of the stream in this epoch.
    """
    if batch := self._options.batch_samples:
      return np.searchsorted(starts, batch * np.arange(self._cuts(samples) + 1))
    cuts = -(-len(starts) // WINDOW)
    return len(starts) * np.arange(cuts + 1) // max(cuts, 1)

  def _cuts(self, samples: int) -> int:
    """Returns how many steps the samples of a stream make."""
    whole, left = divmod(samples, self._options.batch_samples)
    return whole + (left > 0 and not self._options.drop_last)

  def _shuffle_stream(
    self, epoch: int, stream: int
  ) -> tuple[Int64[np.ndarray, "m"], Int64[np.ndarray, "g"]]:
    """Returns one stream's samples, shuffled, and where each group starts."""
    members = self._members[self._stream[self._members] == stream]
    taken = np.repeat(members, self._times(epoch, members, stream))
    rng = self._rng(epoch, "samples", stream)
    if self._options.shuffle:
      taken = rng.permutation(taken)
    if self._options.share == 1:
      if self.dealt:
        size = scarcest(
          self._sizes[taken], np.array(self._capacity_of(stream).astuple())
        )
        taken = taken[deal(size, self._options.batch_samples)]
      return taken, np.arange(len(taken))
    taken, starts = self._share(taken, self._capacity_of(stream))
    if self._options.shuffle:
      taken, starts = permute_groups(taken, starts, rng)
    if batch := self._options.batch_samples:
      # A group that lies in two steps becomes two.
      starts = np.union1d(starts, np.arange(0, len(taken), batch))
    return taken, starts

  def _times(self, epoch: int, members: np.ndarray, stream: int) -> np.ndarray:
    """Returns how often each member is taken in an epoch.

    A sample of weight w is taken floor(w (e + 1) + u) - floor(w e + u) times in
    epoch e. The u of samples of one weight are spread evenly over [0, 1), so
    that every epoch takes the same part and all have their turn. For w = 2.5:

        u = 0      2 3 2 3     floors 0 2 5 7 10
        u = 0.5    3 2 3 2     floors 0 3 5 8 10
    """
    weight = self._weight[members]
    rng, u = self._rng(0, "turns", stream), np.empty(len(members))
    for value in np.unique(weight):
      alike = np.flatnonzero(weight == value)
      u[alike] = rng.permutation(len(alike)) / len(alike)
    # 1e-9: a sum that is a whole number must not fall below it by rounding.
    due = [np.floor(weight * e + u + 1e-9) for e in (epoch, epoch + 1)]
    return (due[1] - due[0]).astype(int)

  def _capacity_of(self, stream: int) -> Size:
    """Returns the capacity of the rows of a stream."""
    return self._stream_capacity.get(stream, self._capacity)

  def _share(
    self, taken: np.ndarray, capacity: Size
  ) -> tuple[np.ndarray, np.ndarray]:
    """Groups at most `share` samples of one video that fit a row together.

    Samples a0 b0 a1 a2 of videos a and b, two of which may share, become
    a0 a1 | a2 | b0: groups start at 0, 2 and 3.

    Args:
      taken: samples of one stream.
      capacity: of its rows.

    Returns:
      Samples in their new order, and where each group starts.
    """
    video = self._memory[taken]
    order = np.argsort(video, kind="stable")
    taken, video = taken[order], video[order]
    # Only queries and decoder positions, the last two sizes, add up where a
    # memory is shared.
    text = np.array((capacity.queries, capacity.decoder))
    most = text // np.maximum(self._sizes[taken, -2:], 1)
    most = np.clip(most.min(axis=1), 1, self._options.share)
    most[video < 0] = 1
    first = np.flatnonzero(np.diff(video, prepend=-2))  # of each video
    lengths = np.diff(first, append=len(video))
    # All groups of a video are as small as its largest conversation demands.
    most = np.repeat(np.minimum.reduceat(most, first), lengths)
    place = np.arange(len(video)) - np.repeat(first, lengths)
    return taken, np.flatnonzero(place % most == 0)

  def _pack_window(self, epoch: int, window: int) -> list[Row]:
    """Packs one window, and puts its rows in order."""
    groups, sizes = self._window(epoch, window)
    stream = int(self._stream[groups[0][0]]) if groups else 0
    capacity = np.array(self._capacity_of(stream).astuple())
    if self.dealt:
      numbers = fill_rows(sizes, capacity)
      if self._work is not None:
        work = np.array([self._work[list(group)].sum() for group in groups])
        numbers = even_out(numbers, sizes, capacity, work)
    else:
      order = range(len(groups))
      if self._options.shuffle:  # the largest first
        size = scarcest(sizes, capacity)
        order = np.argsort(-size, kind="stable").tolist()
      numbers = first_fit(sizes, capacity, order)
    rows = [[groups[i] for i in row] for row in numbers]
    if self._options.shuffle:
      mixed = self._rng(epoch, "rows", window).permutation(len(rows))
      rows = [rows[i] for i in mixed.tolist()]
    if self._work is not None and self.ordered_by_work:
      work = [self._work[[i for g in row for i in g]].sum() for row in rows]
      rows = [rows[i] for i in np.argsort(-np.array(work), kind="stable")]
    return [tuple(row) for row in rows]

  def _window(
    self, epoch: int, window: int
  ) -> tuple[list[Group], Int64[np.ndarray, "g 7"]]:
    """Returns the groups of a window, and what each takes of a row."""
    order = self._epoch_order(epoch)
    start, end = order.windows[window]
    ends = order.starts[start : end + 1].tolist()
    groups = [
      tuple(order.samples[a:b].tolist()) for a, b in itertools.pairwise(ends)
    ]
    # The memory of the first sample, and the text of all.
    sizes = self._sizes[[group[0] for group in groups]]
    for i, group in enumerate(groups):
      if len(group) > 1:
        sizes[i, -2:] = self._sizes[list(group), -2:].sum(axis=0)
    return groups, sizes

  def _split(self, position: int) -> tuple[int, int, int]:
    """Splits a position into (epoch, window, row)."""
    epoch, rest = divmod(position, EPOCH)
    return epoch, *divmod(rest, self._stride)

  def _rng(
    self, epoch: int, purpose: str, part: int = 0
  ) -> np.random.Generator:
    """Returns a random generator for one purpose."""
    code = ("samples", "windows", "rows", "turns").index(purpose)
    return np.random.default_rng([self._options.seed, epoch, code, part])


class _EpochOrder(NamedTuple):
  """Holds one epoch before packing.

  Attributes:
    samples: of all streams, group after group.
    starts: where each group starts in `samples`, and last the number of
      samples.
    windows: of each window the first group, and the group after its last.
  """

  samples: np.ndarray
  starts: np.ndarray
  windows: list[tuple[int, int]]
