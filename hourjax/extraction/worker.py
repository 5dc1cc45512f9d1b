"""Extraction in one worker process: its videos, its index, its report."""

import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from hourjax import progress
from hourjax.data.media.video import MIN_SHARE
from hourjax.data.records.record import Skipped
from hourjax.data.store.features import FeatureStore
from hourjax.extraction.encoder import Encoder
from hourjax.extraction.streaming import Outcome, StreamingExtractor
from hourjax.extraction.video_list import find_videos, worker_slice
from hourjax.jsonl import JsonlWriter
from hourjax.models.config import ModelConfig

_MAX_THREADS = 64


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
  """Extracts the features of all videos that the store does not hold yet.

  Of the sorted names, worker i of n takes number i, i + n, i + 2n, ... A run
  that is killed loses the videos in work: those that are being decoded, one a
  thread, and those that wait up to two seconds for their batch to fill.

  Args:
    params: parameters by path; those of the tower are used.
    config: configuration of the model.
    videos: folder, searched with its subfolders.
    out: root of the feature store, a folder or URL.
    batch_frames: frames that are encoded at a time, over all devices of this
      process. By default 32 a device.
    threads: videos that are decoded at a time. By default one a core, at most
      64.
    worker: (i, n). By default the process's index in the JAX cluster.
    names: file with one name a line; only these videos are taken.
    min_share: fraction of a damaged video's frames that must be decoded for it
      to be stored, from 0 to 1.

  Returns:
    Videos that failed, with the reason. They are also in the store's
    `failures-<i>.jsonl`, and the next run tries them again. Videos that were
    decoded in part are in that file too, and in the index with the fraction.

  Raises:
    UserError: there are no videos, or the store has another tower's features.
    OSError: the store cannot be written, e.g. the disk is full.
  """
  index, count = worker or (jax.process_index(), jax.process_count())
  with progress.step("looking for videos"):
    own = worker_slice(find_videos(videos, names), index, count)
  store = FeatureStore(out, create=True, worker=index)
  with store.temp_files.locked():
    failures = JsonlWriter(store.storage, f"failures-{index:05d}.jsonl", [])
    failures.open()
    todo = [name for name in own if name not in store]
    if not todo:
      print(f"all {len(own)} videos are in {store.root}")
      return []
    encoder = Encoder(params, config, batch_frames=batch_frames)
    store.claim(encoder.fingerprint, encoder.shape)
    report = _Report(len(own), len(todo), store, failures)
    extractor = StreamingExtractor(
      todo,
      root=videos,
      store=store,
      encoder=encoder,
      on_outcome=report.add,
      threads=threads or min(_MAX_THREADS, os.cpu_count() or 1),
      min_share=min_share,
    )
    report.run(extractor)
    return report.failed


class _Report:
  """Records the outcomes of a run, and reports them while it goes on.

  Attributes:
    failed: videos that failed so far, with the reason.
  """

  def __init__(
    self, videos: int, todo: int, store: FeatureStore, failures: JsonlWriter
  ):
    """Starts a report.

    Args:
      videos: number of this worker's videos.
      todo: number of those that are not stored yet.
      store: the feature store, whose index is written.
      failures: the file of failed and damaged videos.
    """
    self.failed: list[Skipped] = []
    self._shares: dict[str, float] = {}  # of videos that are damaged in part
    self._videos, self._todo = videos, todo
    self._store, self._failures = store, failures
    self._stored, self._video_seconds = 0, 0.0
    self._start = time.monotonic()

  def run(self, extractor: StreamingExtractor) -> None:
    """Runs the extraction, and prints a summary however it ends."""
    self._extractor = extractor
    with progress.bar(self._todo, unit="video", desc="extract") as self._bar:
      try:
        extractor.run()
      finally:
        self._bar.close()
        print(self._summary(), flush=True)
        for name, share in self._shares.items():
          print(f"  read in part {_printable(name)}: {share:.2%} of its frames")
        for item in self.failed:
          print(f"  failed {_printable(item.id)}: {_printable(item.reason)}")

  def add(self, outcome: Outcome) -> None:
    """Enters a stored video into the index, or a failed one's reason."""
    if outcome.stored:
      damaged = (outcome.share,) if outcome.share < 1 else ()
      self._store.record(outcome.name, outcome.stored, *damaged)
      self._stored += 1
      self._video_seconds += outcome.stored.duration
      if outcome.share < 1:
        self._shares[outcome.name] = outcome.share
        self._failures.add(damaged_row(outcome))
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
    before = self._videos - self._todo
    parts = f" {len(self._shares)} read in part," if self._shares else ""
    return (
      f"{before + self._stored} of {self._videos} videos in {self._store.root}"
      f" ({before} were there),{parts} {len(self.failed)} failed;"
      f" {self._hours()} of"
      f" video, {self._extractor.frames} frames, {self._rate()}; the limit was"
      f" {self._limit()}"
    )

  def _hours(self) -> str:
    return f"{self._video_seconds / 3600:.2f} h"

  def _rate(self) -> str:
    spent = max(time.monotonic() - self._start, 1e-9)
    return f"{self._extractor.frames / spent:.0f} frames/s"

  def _limit(self) -> str:
    """Returns the slowest stage, and how long the others waited for it."""
    spent = max(time.monotonic() - self._start, 1e-9)
    waits = {
      "decode": self._extractor.decoding_seconds,
      "encode": self._extractor.encoding_seconds,
      "write": self._extractor.writing_seconds,
    }
    stage = max(waits, key=waits.__getitem__)
    return f"{stage} ({min(1.0, waits[stage] / spent):.0%})"


def damaged_row(outcome: Outcome) -> dict[str, Any]:
  """Returns the row of the failures file for a video that is damaged in part.

  Args:
    outcome: outcome of a video that is stored.
  """
  reason = (
    f"stored, but only {outcome.share:.2%} of its frames could be read; the"
    " nearest frames stand in for the others"
  )
  return {"file": outcome.name, "share": outcome.share, "reason": reason}


def _printable(text: str) -> str:
  """Returns a text that can be printed: names on a disk need not be UTF-8."""
  return text.encode(errors="backslashreplace").decode()
