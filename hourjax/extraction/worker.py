"""Videos to stored tower features: one process's share, with its ledger."""

import os
import time
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array

from hourjax import progress
from hourjax.data.media.video import MIN_SHARE
from hourjax.data.records.record import Skipped
from hourjax.data.store.features import FeatureStore
from hourjax.extraction.encoder import Encoder
from hourjax.extraction.streaming import Outcome, Stream
from hourjax.extraction.video_list import find_videos, worker_slice
from hourjax.jsonl import JsonlWriter
from hourjax.models.config import ModelConfig

_MOST_THREADS = 64


def extract_videos(
  params: Mapping[str, Array | np.ndarray],
  config: ModelConfig,
  *,
  videos: str | os.PathLike,
  out: str | os.PathLike,
  batch_frames: int | None = None,
  threads: int | None = None,
  worker: tuple[int, int] | None = None,
  names: str | os.PathLike | None = None,
  min_share: float = MIN_SHARE,
) -> list[Skipped]:
  """Encodes every video of a folder that the store does not hold yet.

  Of the sorted names, process i of n takes i, i + n, ... A killed run loses
  the videos in hand: those being decoded, one a thread, or waiting up to two
  seconds for their batch to fill.

  Args:
    params: of the model; only the tower is used.
    config: of the model.
    videos: folder, searched with its subfolders.
    out: root of the feature store, a folder or URL.
    batch_frames: frames encoded at a time over all devices of this process;
      32 a device if not given.
    threads: videos decoded at a time; one a core if not given, 64 at most.
    worker: (i, n); as in the JAX cluster if not given.
    names: file with one name a line; only these are taken.
    min_share: of a damaged video's frames, that must be read for it to be
      stored, from 0 to 1.

  Returns:
    Videos that could not be read, with the reason; they are also in the
    store's `failures-<i>.jsonl`, and are tried again by the next run. Those
    that were read in part are there too, and with their share in the index.

  Raises:
    UserError: no videos, or a store of another tower.
    OSError: the store cannot be written, e.g. the disk is full.
  """
  index, count = worker or (jax.process_index(), jax.process_count())
  with progress.step("looking for videos"):
    share = worker_slice(find_videos(videos, names), index, count)
  store = FeatureStore(out, create=True, worker=index)
  with store.temp_files.locked():
    failures = JsonlWriter(store.storage, f"failures-{index:05d}.jsonl", [])
    failures.open()
    todo = [name for name in share if name not in store]
    if not todo:
      print(f"all {len(share)} videos are in {store.root}")
      return []
    encoder = Encoder(params, config, batch_frames=batch_frames)
    store.claim(encoder.fingerprint, encoder.shape)
    report = _Report(len(share), len(todo), store, failures)
    stream = Stream(
      todo,
      root=videos,
      store=store,
      encoder=encoder,
      done=report.done,
      threads=threads or min(_MOST_THREADS, os.cpu_count() or 1),
      min_share=min_share,
    )
    report.watch(stream)
    return report.failed


class _Report:
  """Index, ledger, bar and last words of one run."""

  def __init__(
    self, share: int, todo: int, store: FeatureStore, failures: JsonlWriter
  ):
    self.failed: list[Skipped] = []
    self._parts: dict[str, float] = {}  # videos read in part, their shares
    self._share, self._todo = share, todo
    self._store, self._failures = store, failures
    self._stored, self._seconds = 0, 0.0
    self._start = time.monotonic()

  def watch(self, stream: Stream) -> None:
    """Runs the stream; however it ends, says how far it came."""
    self._stream = stream
    with progress.bar(self._todo, unit="video", desc="extract") as self._bar:
      try:
        stream.run()
      finally:
        self._bar.close()
        print(self._summary(), flush=True)
        for name, share in self._parts.items():
          print(f"  read in part {_printable(name)}: {share:.2%} of its frames")
        for item in self.failed:
          print(f"  failed {_printable(item.id)}: {_printable(item.reason)}")

  def done(self, outcome: Outcome) -> None:
    """Makes a stored video count, or enters the reason into the ledger."""
    if outcome.stored:
      part = (outcome.share,) if outcome.share < 1 else ()
      self._store.record(outcome.name, outcome.stored, *part)
      self._stored += 1
      self._seconds += outcome.stored.duration
      if outcome.share < 1:
        self._parts[outcome.name] = outcome.share
        self._failures.add(part_row(outcome))
    else:
      self._failures.add({"file": outcome.name, "reason": outcome.reason})
      self.failed.append(Skipped(outcome.name, outcome.reason))
    self._bar.set_postfix_str(
      f"{self._hours()}, {self._rate()}, limit {self._limit()},"
      f" failed {len(self.failed)}",
      refresh=False,
    )
    self._bar.update()

  def _summary(self) -> str:
    there = self._share - self._todo
    parts = f" {len(self._parts)} read in part," if self._parts else ""
    return (
      f"{there + self._stored} of {self._share} videos in {self._store.root}"
      f" ({there} were there),{parts} {len(self.failed)} failed;"
      f" {self._hours()} of"
      f" video, {self._stream.frames} frames, {self._rate()}; the limit was"
      f" {self._limit()}"
    )

  def _hours(self) -> str:
    return f"{self._seconds / 3600:.2f} h"

  def _rate(self) -> str:
    spent = max(time.monotonic() - self._start, 1e-9)
    return f"{self._stream.frames / spent:.0f} frames/s"

  def _limit(self) -> str:
    """The stage that others waited for, and their share of the time."""
    spent = max(time.monotonic() - self._start, 1e-9)
    waits = {
      "decode": self._stream.starved,
      "encode": self._stream.encoding,
      "write": self._stream.writing,
    }
    stage = max(waits, key=waits.__getitem__)
    return f"{stage} ({min(1.0, waits[stage] / spent):.0%})"


def part_row(outcome: Outcome) -> dict:
  """The ledger's line of a stored video of which some frames are damaged."""
  reason = (
    f"stored, but only {outcome.share:.2%} of its frames could be read; the"
    " nearest pictures stand in for the others"
  )
  return {"file": outcome.name, "share": outcome.share, "reason": reason}


def _printable(text: str) -> str:
  # Names on a disk need not be UTF-8.
  return text.encode(errors="backslashreplace").decode()
