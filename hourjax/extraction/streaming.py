"""A bounded queue between threads that can be closed and keeps time."""
# MERGED hourjax.inference.streaming:
# Videos to the feature store, frames in flight only.
#
#     decoding threads -> frames -> this thread -> features -> writing thread
#     (a video each)      (bounded)  (batches)      (bounded)  (one file a vide
#
# A batch is filled with frames of whichever videos come, so short videos do no
# waste it. Every stage runs beside the others; bounded channels between them
# hold the memory down. A video that fails on the way ends in an outcome with t
# reason; its frames in a batch are dropped and its file never appears.

import collections
import dataclasses
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hourjax.data.media.frame_rules import extraction_frames
from hourjax.data.media.video import MIN_SHARE, Reading, decode_frames, probe
from hourjax.data.store.array_file import FeatureWriter, Stored
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder


class ClosedError(Exception):
  """The other side has gone."""


class Channel:
  """First in, first out, at most `capacity` items.

  Attributes:
    waited: seconds that `get` has waited for an item.
  """

  def __init__(self, capacity: int):
    self.waited = 0.0
    self._capacity, self._closed = capacity, False
    self._items = collections.deque()
    self._changed = threading.Condition()

  def put(self, item: Any) -> None:
    """Appends once there is room.

    Raises:
      ClosedError: the channel is closed.
    """
    with self._changed:
      self._changed.wait_for(
        lambda: self._closed or len(self._items) < self._capacity
      )
      if self._closed:
        raise ClosedError
      self._items.append(item)
      self._changed.notify_all()

  def get(self, deadline: float | None = None) -> Any:
    """Takes the first item once there is one.

    Raises:
      ClosedError: the channel is closed, whatever it still holds.
      TimeoutError: none came until `deadline` (of `time.monotonic`).
    """
    start = time.monotonic()
    timeout = None if deadline is None else max(0.0, deadline - start)
    with self._changed:
      self._changed.wait_for(lambda: self._closed or self._items, timeout)
      self.waited += time.monotonic() - start
      if self._closed:
        raise ClosedError
      if not self._items:
        raise TimeoutError
      self._changed.notify_all()
      return self._items.popleft()

  def close(self) -> None:
    """Drops what is held and wakes everybody."""
    with self._changed:
      self._closed = True
      self._items.clear()
      self._changed.notify_all()


_CHUNK_BYTES = 4 * 2**20  # of frames handed on at a time
_WAITING_BYTES = 96 * 2**20  # of frames decoded ahead
_BATCHES = 2  # on the devices or waiting to be written
# A finished video waits this many seconds for others to fill its batch.
_PATIENCE = 2.0


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a video ended: stored, or not for a reason.

  Attributes:
    share: of the frames of a stored one, that could be read.
  """

  name: str
  stored: Stored | None
  reason: str = ""
  share: float = 1.0


@dataclasses.dataclass(eq=False)  # told apart by identity
class _Job:
  name: str
  writer: FeatureWriter | None = None
  reason: str = ""
  reading: Reading = dataclasses.field(default_factory=Reading)


@dataclasses.dataclass
class _Batch:
  """Frames of one encoder call, and what is to be done with each run.

  Once a video ends in it, it waits for more frames until `deadline` at most.
  """

  pixels: np.ndarray
  used: int = 0
  deadline: float | None = None
  # (job, first, end) are frames of a video, (job, None, None) is its end.
  parts: list[tuple[_Job, int | None, int | None]] = dataclasses.field(
    default_factory=list
  )


class Stream:
  """One run over a list of videos.

  Attributes:
    frames: encoded and written so far.
    encoding, writing: seconds the writing thread has waited for the devices,
      and has written.
  """

  def __init__(
    self,
    names: Sequence[str],
    *,
    root: str | os.PathLike,
    store: FeatureStore,
    encoder: Encoder,
    done: Callable[[Outcome], None],
    threads: int = 1,
    min_share: float = MIN_SHARE,
  ):
    """Prepares; `run` does it.

    Args:
      names: of the videos, below `root`.
      root: folder of videos.
      store: where arrays go; its index is left to `done`.
      encoder: of frames.
      done: told of every video as it ends, in the writing thread.
      threads: videos decoded at a time.
      min_share: of a video's frames, that must be read for it to be stored.
    """
    self._min_share = min_share
    self.frames, self.encoding, self.writing = 0, 0.0, 0.0
    self._names, self._root = list(names), pathlib.Path(root)
    self._store, self._encoder, self._done = store, encoder, done
    self._threads = max(1, min(threads, len(self._names)))
    size = 3 * encoder.image_size**2
    self._chunk = max(1, min(encoder.batch, _CHUNK_BYTES // size))
    ahead = max(2, _WAITING_BYTES // (self._chunk * size))
    self._decoded, self._encoded = Channel(ahead), Channel(_BATCHES)
    self._jobs = map(_Job, self._names)
    self._open: set[_Job] = set()
    self._lock = threading.Lock()
    self._error: BaseException | None = None

  @property
  def starved(self) -> float:
    """Seconds the encoder has waited for decoded frames."""
    return self._decoded.waited

  def run(self) -> None:
    """Takes every video to its outcome.

    Whatever ends it early, nothing half-written is left in the store.

    Raises:
      OSError: the store cannot be written, e.g. the disk is full.
    """
    threads = [
      threading.Thread(target=self._guard, args=(work,), daemon=True)
      for work in [self._write] + [self._decode] * self._threads
    ]
    try:
      for thread in threads:
        thread.start()
      self._fill_batches()
      threads[0].join()
    except ClosedError:
      pass  # another thread failed; its error is raised below
    finally:
      self._decoded.close()
      self._encoded.close()
      for thread in threads:
        thread.join()
      for job in self._open:
        job.writer.abandon()
    if self._error:
      raise self._error

  def _guard(self, work):
    try:
      work()
    except ClosedError:
      pass
    except BaseException as error:
      self._error = self._error or error
      self._decoded.close()
      self._encoded.close()

  def _decode(self):
    for job in iter(self._next_job, None):
      frames = self._frames(job)
      while not job.reason:
        chunk = next(frames, None)
        if chunk is None:
          break
        self._decoded.put((job, chunk))
      frames.close()
      self._decoded.put((job, None))

  def _next_job(self) -> _Job | None:
    with self._lock:
      return next(self._jobs, None)

  def _frames(self, job: _Job) -> Iterator[np.ndarray]:
    """Chunks of a video; a bad file ends it early and sets the reason."""
    path = self._root / job.name
    try:
      info = probe(path)
      indices, duration = extraction_frames(info.frames, info.fps)
      chunks = decode_frames(
        path,
        indices,
        self._encoder.image_size,
        info=info,
        batch=self._chunk,
        threads=max(1, (os.cpu_count() or 1) // self._threads),
        min_share=self._min_share,
        reading=job.reading,
      )
      first = next(chunks)
    except Exception as error:
      job.reason = _reason(error)
      return
    job.writer = self._store.writer(
      job.name, len(indices), self._encoder.shape, duration
    )
    with self._lock:
      self._open.add(job)
    yield first
    while True:
      try:
        chunk = next(chunks, None)
      except Exception as error:
        job.reason = _reason(error)
        return
      if chunk is None:
        return
      yield chunk

  def _fill_batches(self):
    batch, ended = self._batch(), 0
    while ended < len(self._names):
      try:
        job, chunk = self._decoded.get(batch.deadline)
      except TimeoutError:
        batch = self._dispatch(batch)
        continue
      if chunk is None:
        batch.parts.append((job, None, None))
        batch.deadline = batch.deadline or time.monotonic() + _PATIENCE
        ended += 1
        if not batch.used:
          batch = self._dispatch(batch)
        continue
      while len(chunk):
        count = min(len(chunk), self._encoder.batch - batch.used)
        end = batch.used + count
        batch.pixels[batch.used : end] = chunk[:count]
        batch.parts.append((job, batch.used, end))
        batch.used, chunk = end, chunk[count:]
        if end == self._encoder.batch:
          batch = self._dispatch(batch)
    self._dispatch(batch)
    self._encoded.put(None)

  def _batch(self) -> _Batch:
    side = self._encoder.image_size
    return _Batch(np.zeros((self._encoder.batch, side, side, 3), np.uint8))

  def _dispatch(self, batch: _Batch) -> _Batch:
    """Sends a batch on; the devices work while the next one is filled."""
    if not batch.parts:
      return batch
    features = self._encoder(batch.pixels) if batch.used else None
    self._encoded.put((features, batch.parts))
    return self._batch()

  def _write(self):
    for features, parts in iter(self._encoded.get, None):
      start = time.monotonic()
      host = None if features is None else np.asarray(features)
      waited = time.monotonic()
      self.encoding += waited - start
      for job, first, end in parts:
        if first is None:
          self._finish(job)
        elif not job.reason:
          self._add(job, host[first:end])
      self.writing += time.monotonic() - waited

  def _add(self, job: _Job, features: np.ndarray):
    try:
      job.writer.add(features)
      self.frames += len(features)
    except UserError as error:
      job.reason = str(error)

  def _finish(self, job: _Job):
    with self._lock:
      self._open.discard(job)
    if job.writer and not job.reason:
      try:
        job.writer.finish()
      except UserError as error:
        job.reason = str(error)
    elif job.writer:
      job.writer.abandon()
    stored = None if job.reason else job.writer.stored
    self._done(Outcome(job.name, stored, job.reason, job.reading.share))


def _reason(error: Exception) -> str:
  if isinstance(error, UserError):
    return str(error)
  # A file so odd that the decoder's own checks miss it fails alone.
  return f"decoding fails ({type(error).__name__}: {error}); fetch it again"
