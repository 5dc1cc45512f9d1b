"""Facts about videos, each found once: duration and pictures in the file."""

import concurrent.futures
import pathlib
from typing import NamedTuple

from hourjax.data import video
from hourjax.data.records import media_problem
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError

THREADS = 8  # reading headers is waiting for the disk


class VideoFact(NamedTuple):
  """What is known of a video.

  Attributes:
    duration: in seconds, None where it is not known.
    pictures: in the file, 0 where they are not known.
    problem: (kind, reason) why its records must be left out, or None.
  """

  duration: float | None = None
  pictures: int = 0
  problem: tuple[str, str] | None = None


class Videos:
  """Looks videos up in the feature store, or else in their files.

  Attributes:
    unstored: names asked for that the feature store does not have.
  """

  def __init__(self, media: pathlib.Path | None, store: FeatureStore | None):
    """Opens nothing yet.

    Args:
      media: folder whose files are read, or None to read none.
      store: where durations come from first, or None.
    """
    self._media, self._store = media, store
    self._facts: dict[str, VideoFact | concurrent.futures.Future] = {}
    self._pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    self.unstored: set[str] = set()

  def request(self, name: str) -> None:
    """Starts to find out; `fact` waits for it."""
    if name in self._facts:
      return
    if self._store is not None and name in self._store:
      self._facts[name] = VideoFact(self._store.stored(name).duration)
      return
    if self._store is not None:
      self.unstored.add(name)
    if self._media is None:
      self._facts[name] = VideoFact()
    else:
      self._facts[name] = self._pool.submit(_probe, self._media, name)

  def fact(self, name: str) -> VideoFact:
    """What is known of a video that was requested."""
    found = self._facts[name]
    if isinstance(found, concurrent.futures.Future):
      found = self._facts[name] = found.result()
    return found

  def close(self) -> None:
    self._pool.shutdown(cancel_futures=True)


def _probe(media: pathlib.Path, name: str) -> VideoFact:
  problem = media_problem(media, name)
  if problem:
    return VideoFact(problem=("missing file", problem))
  try:
    info = video.probe(media / name)
    video.check_whole(media / name, info)
  except UserError as error:
    return VideoFact(problem=("unreadable video", str(error)))
  return VideoFact(info.duration, info.frames)
