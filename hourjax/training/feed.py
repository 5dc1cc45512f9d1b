"""Batches on the device ahead of use, and what could not be read of them."""

import collections
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from hourjax import schema
from hourjax.batch import Batch
from hourjax.data.dataset import Unread
from hourjax.data.pipeline import Delivered
from hourjax.errors import UserError
from hourjax.training.files import write_whole
from hourjax.training.ledger import read_rows
from hourjax.training.placing import Placing

# A few failures at the start are no share yet.
_ENOUGH_SAMPLES = 1000
_SHOWN = 20


class Feed:
  """Iterates over (micro-batch on the devices, what was delivered).

  While one is computed with, the next one is copied to the devices.

  Attributes:
    waited: seconds that the caller spent waiting for data.
  """

  def __init__(self, delivered: Iterator[Delivered], placing: Placing):
    """Starts reading.

    Args:
      delivered: endless, this host's rows of each micro-batch.
      placing: puts them on the devices.
    """
    self.waited = 0.0
    self._delivered, self._placing = delivered, placing
    self._pool = ThreadPoolExecutor(1)
    self._next: Future = self._pool.submit(self._place)

  def __iter__(self) -> "Feed":
    return self

  def __next__(self) -> tuple[Batch, Delivered]:
    began = time.monotonic()
    batch, delivered = self._next.result()
    self.waited += time.monotonic() - began
    self._next = self._pool.submit(self._place)
    return batch, delivered

  def close(self) -> None:
    """Stops reading; the batch being read is dropped."""
    self._pool.shutdown(wait=True, cancel_futures=True)
    self._delivered.close()

  def _place(self) -> tuple[Batch, Delivered]:
    delivered = next(self._delivered)
    return self._placing(delivered.batch), delivered


class _Line(schema.Schema):
  """What is read back of a line of `UnreadLedger`."""

  step: int
  kind: str


class UnreadLedger:
  """WORKDIR/unread.jsonl: samples that were left out of their rows.

  Every process notes those of its own rows; from the second one on in
  unread-1.jsonl and so on.

  Attributes:
    counts: of failures by kind, since the run began.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start: int,
    max_share: float,
    process: int = 0,
  ):
    """Keeps the lines up to step `start`; later steps are taken again."""
    name = f"unread-{process}.jsonl" if process else "unread.jsonl"
    self._path = pathlib.Path(workdir) / name
    self._max_share = max_share
    self._seen = 0
    self._new: list[Unread] = []
    self.counts: collections.Counter[str] = collections.Counter()
    if self._path.exists():
      lines = read_rows(self._path, {"step": _Line})
      kept = [line for line in lines if line["step"] <= start]
      self.counts.update(line["kind"] for line in kept)
      write_whole(self._path, "".join(json.dumps(x) + "\n" for x in kept))

  def add(self, step: int, delivered: Delivered) -> None:
    """Notes what a step's rows lack.

    Raises:
      UserError: more than the share of the samples seen since the start (but
        at least of 1000) could not be read.
    """
    self._seen += delivered.samples + len(delivered.unread)
    if not delivered.unread:
      return
    with open(self._path, "a") as file:
      for item in delivered.unread:
        line = {"step": step, **dataclasses.asdict(item)}
        file.write(json.dumps(line) + "\n")
    self._new += delivered.unread
    self.counts.update(item.kind for item in delivered.unread)
    if len(self._new) > self._max_share * max(self._seen, _ENOUGH_SAMPLES):
      reasons = "\n  ".join(item.reason for item in self._new[-_SHOWN:])
      raise UserError(
        f"step {step}: {len(self._new)} of {self._seen} samples could not be"
        f" read, more than config.data.max_skipped={self._max_share}; mend"
        f" them or raise it (all are in {self._path}):\n  {reasons}"
      )
