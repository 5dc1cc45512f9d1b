"""A bounded queue between threads that can be closed and keeps time."""

import collections
import threading
import time
from typing import Any


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
