"""Streaming extraction: videos to feature files with few frames in memory.

    decoding threads -> frames    -> this thread -> features -> writing thread
    (one video each)    (bounded)    (batches)      (bounded)   (a file a video)

A batch is filled with frames of whichever videos come, so short videos do not
leave it half empty. All stages run at the same time. The queues between them
are bounded, which bounds the memory: a decoding thread waits while its frames
are not wanted yet. A video that fails on the way has an outcome with the
reason; its frames in a batch are dropped, and its file never appears.
"""

import collections
import dataclasses
import os
import pathlib
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from hourjax.data.media.frame_rules import extraction_frames
from hourjax.data.media.video import MIN_SHARE, Reading, decode_frames, probe
from hourjax.data.store.array_file import FeatureWriter, Stored
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.extraction.encoder import Encoder

_CHUNK_BYTES = 4 * 2**20  # decoded frames that are handed on together
_QUEUE_BYTES = 96 * 2**20  # decoded frames that wait for the encoder
_ENCODED_BATCHES = 2  # on the devices, or waiting to be written
# A finished video waits this many seconds for others to fill its batch.
_BATCH_SECONDS = 2.0


class QueueClosedError(Exception):
  """Signals that the thread at the other end of a queue has ended."""


class BoundedQueue:
  """Passes items between threads, first in first out, a few at a time.

  Unlike `queue.Queue` it can be closed, which wakes all threads that wait, and
  it measures the time for which its reader waits.

  Attributes:
    waited: seconds for which `get` has waited for an item.
  """

  def __init__(self, capacity: int):
    """Makes an empty queue of at most `capacity` items."""
    self.waited = 0.0
    self._capacity, self._closed = capacity, False
    self._items: collections.deque[Any] = collections.deque()
    self._changed = threading.Condition()

  def put(self, item: Any) -> None:
    """Appends an item, once there is room.

    Args:
      item: the item.

    Raises:
      QueueClosedError: the queue is closed.
    """
    with self._changed:
      self._changed.wait_for(
        lambda: self._closed or len(self._items) < self._capacity
      )
      if self._closed:
        raise QueueClosedError
      self._items.append(item)
      self._changed.notify_all()

  def get(self, deadline: float | None = None) -> Any:
    """Takes the first item, once there is one.

    Args:
      deadline: time of `time.monotonic` until which to wait; None is for ever.

    Raises:
      QueueClosedError: the queue is closed, even if it still held items.
      TimeoutError: there was no item until the deadline.
    """
    start = time.monotonic()
    timeout = None if deadline is None else max(0.0, deadline - start)
    with self._changed:
      self._changed.wait_for(lambda: self._closed or self._items, timeout)
      self.waited += time.monotonic() - start
      if self._closed:
        raise QueueClosedError
      if not self._items:
        raise TimeoutError
      self._changed.notify_all()
      return self._items.popleft()

  def close(self) -> None:
    """Drops all items and wakes all threads that wait."""
    with self._changed:
      self._closed = True
      self._items.clear()
      self._changed.notify_all()


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Describes how the extraction of one video ended.

  Attributes:
    name: name of the video.
    stored: what was stored; None if the video failed.
    reason: why it failed.
    share: fraction of its frames that could be decoded, if it was stored.
  """

  name: str
  stored: Stored | None
  reason: str = ""
  share: float = 1.0


@dataclasses.dataclass(eq=False)  # two jobs are never equal
class _Job:
  """Holds the state of one video that is being extracted.

  Attributes:
    name: name of the video.
    writer: writer of its file, once its first frames are decoded.
    reason: why it failed; "" as long as it has not.
    reading: counts the frames that could be decoded.
  """

  name: str
  writer: FeatureWriter | None = None
  reason: str = ""
  reading: Reading = dataclasses.field(default_factory=Reading)


@dataclasses.dataclass
class _Batch:
  """Collects the frames of one encoder call.

  Attributes:
    pixels: the frames.
    used: how many there are so far.
    deadline: when the batch is encoded even if it is not full. It is set when
      a video ends in the batch, so that its file does not wait for long.
    parts: (job, first, end) for frames of a video, (job, None, None) for the
      end of a video.
  """

  pixels: np.ndarray
  used: int = 0
  deadline: float | None = None
  parts: list[tuple[_Job, int | None, int | None]] = dataclasses.field(
    default_factory=list
  )


class StreamingExtractor:
  """Extracts the features of a list of videos, once.

  Attributes:
    frames: number of frames that are encoded and written so far.
    encoding_seconds: time that the writing thread has waited for the devices.
    writing_seconds: time that it has written.
  """

  def __init__(
    self,
    names: Sequence[str],
    *,
    root: str | os.PathLike,
    store: FeatureStore,
    encoder: Encoder,
    on_outcome: Callable[[Outcome], None],
    threads: int = 1,
    min_share: float = MIN_SHARE,
  ):
    """Prepares an extraction; `run` does it.

    Args:
      names: names of the videos, paths below `root`.
      root: folder of the videos.
      store: where features are written. Its index is left to `on_outcome`.
      encoder: the vision tower.
      on_outcome: called with every video as it ends, in the writing thread.
      threads: number of videos that are decoded at a time.
      min_share: fraction of a video's frames that must be decoded for it to be
        stored.
    """
    self._min_share = min_share
    self.frames = 0
    self.encoding_seconds, self.writing_seconds = 0.0, 0.0
    self._names, self._root = list(names), pathlib.Path(root)
    self._store, self._encoder = store, encoder
    self._on_outcome = on_outcome
    self._threads = max(1, min(threads, len(self._names)))
    frame_bytes = 3 * encoder.image_size**2
    self._chunk = max(1, min(encoder.batch, _CHUNK_BYTES // frame_bytes))
    chunks = max(2, _QUEUE_BYTES // (self._chunk * frame_bytes))
    self._decoded = BoundedQueue(chunks)
    self._encoded = BoundedQueue(_ENCODED_BATCHES)
    self._jobs = map(_Job, self._names)
    self._unfinished: set[_Job] = set()
    self._lock = threading.Lock()
    self._error: BaseException | None = None

  @property
  def decoding_seconds(self) -> float:
    """Returns the time that the encoder has waited for decoded frames."""
    return self._decoded.waited

  def run(self) -> None:
    """Takes every video to its outcome.

    However it ends, no file that is written in part is left in the store.

    Raises:
      OSError: the store cannot be written, e.g. the disk is full.
    """
    threads = [
      threading.Thread(target=self._run_stage, args=(stage,), daemon=True)
      for stage in [self._write] + [self._decode] * self._threads
    ]
    try:
      for thread in threads:
        thread.start()
      self._encode()
      threads[0].join()
    except QueueClosedError:
      pass  # another thread failed; its error is raised below
    finally:
      self._decoded.close()
      self._encoded.close()
      for thread in threads:
        thread.join()
      for job in self._unfinished:
        if job.writer:
          job.writer.abandon()
    if self._error:
      raise self._error

  def _run_stage(self, stage: Callable[[], None]) -> None:
    """Runs a stage in its thread; an error ends all other stages."""
    try:
      stage()
    except QueueClosedError:
      pass
    except BaseException as error:
      self._error = self._error or error
      self._decoded.close()
      self._encoded.close()

  def _decode(self) -> None:
    """Decodes one video after the other: the stage of the decoding threads."""
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

  def _frames(self, job: _Job) -> Generator[np.ndarray, None, None]:
    """Yields chunks of frames; a damaged file ends them and sets the reason."""
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
      self._unfinished.add(job)
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

  def _encode(self) -> None:
    """Fills batches with decoded frames and starts the encoder on each."""
    batch, ended = self._empty_batch(), 0
    while ended < len(self._names):
      try:
        job, chunk = self._decoded.get(batch.deadline)
      except TimeoutError:
        batch = self._dispatch(batch)
        continue
      if chunk is None:
        batch.parts.append((job, None, None))
        batch.deadline = batch.deadline or time.monotonic() + _BATCH_SECONDS
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

  def _empty_batch(self) -> _Batch:
    side = self._encoder.image_size
    return _Batch(np.zeros((self._encoder.batch, side, side, 3), np.uint8))

  def _dispatch(self, batch: _Batch) -> _Batch:
    """Starts encoding a batch, and returns an empty one to fill meanwhile."""
    if not batch.parts:
      return batch
    features = self._encoder(batch.pixels) if batch.used else None
    self._encoded.put((features, batch.parts))
    return self._empty_batch()

  def _write(self) -> None:
    """Writes the features of batches: the stage of the writing thread."""
    for features, parts in iter(self._encoded.get, None):
      start = time.monotonic()
      on_host = None if features is None else np.asarray(features)
      copied = time.monotonic()
      self.encoding_seconds += copied - start
      for job, first, end in parts:
        if first is None:
          self._finish(job)
        elif not job.reason and on_host is not None:
          self._add(job, on_host[first:end])
      self.writing_seconds += time.monotonic() - copied

  def _add(self, job: _Job, features: np.ndarray) -> None:
    """Writes features of a video; if they are not finite the video fails."""
    assert job.writer is not None  # `_frames` makes it before its first frame
    try:
      job.writer.add(features)
      self.frames += len(features)
    except UserError as error:
      job.reason = str(error)

  def _finish(self, job: _Job) -> None:
    """Completes or drops the file of a video, and reports the outcome."""
    with self._lock:
      self._unfinished.discard(job)
    writer = job.writer
    if writer and not job.reason:
      try:
        writer.finish()
      except UserError as error:
        job.reason = str(error)
    elif writer:
      writer.abandon()
    stored = writer.stored if writer and not job.reason else None
    self._on_outcome(Outcome(job.name, stored, job.reason, job.reading.share))


def _reason(error: Exception) -> str:
  """Returns why a video cannot be decoded."""
  if isinstance(error, UserError):
    return str(error)
  # The decoder's own checks miss some damage. That fails the one video, not
  # the whole run.
  return f"decoding fails ({type(error).__name__}: {error}); fetch it again"
