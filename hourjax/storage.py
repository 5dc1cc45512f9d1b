"""Storage of bytes in a folder, or under a URL that TensorStore opens.

Both kinds write whole objects atomically, and read byte ranges directly into
buffers. Keys are relative to the root, with "/" between folders.
"""

import collections
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from hourjax.atomic_file import write_file
from hourjax.errors import UserError

# Ranges requested at a time. Measured: 4 GB/s with ranges of 1.5 MB each, and
# 0.54 GB/s with a single range of 531 MB.
_IN_FLIGHT = 32
_MOST_BYTES = 2**30  # of an object read whole: an index of 10 million videos
_READ_SECONDS, _WRITE_SECONDS = 60, 900
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Part = tuple[int, np.ndarray]  # offset in bytes, contiguous uint8 [n] to fill


class Folder:
  """Stores objects as files below a folder."""

  def __init__(self, root: str | os.PathLike) -> None:
    self.root = pathlib.Path(root)

  def location(self, key: str) -> pathlib.Path:
    """Returns the path of an object, for messages."""
    return self.root / key

  def list(self, prefix: str) -> list[str]:
    """Keys right below the root that start with `prefix`, sorted."""
    if not os.path.isdir(self.root):  # also False for a name of no file
      return []
    return sorted(
      entry.name
      for entry in os.scandir(self.root)
      if entry.name.startswith(prefix) and entry.is_file()
    )

  def read(self, key: str) -> bytes:
    """Reads a whole object.

    Raises:
      OSError: it is missing, unreadable, or larger than 1 GiB.
    """
    with open(self.location(key), "rb", opener=_open_at_once) as file:
      size = os.fstat(file.fileno()).st_size
      if size > _MOST_BYTES:
        raise OSError(f"{size} bytes, at most {_MOST_BYTES} are meant")
      return file.read(_MOST_BYTES)

  def read_parts(self, key: str, parts: Iterable[Part]) -> Iterator[None]:
    """Fills one part after the other and yields after each.

    Files are read with `preadv` and not with a memory map. It is as fast with
    fresh buffers, and a file that is truncated while it is read gives an error
    instead of SIGBUS.

    Raises:
      OSError: the object is missing, unreadable, or ends before a part does.
    """
    path = self.location(key)
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
      for offset, out in parts:
        done = 0
        while done < len(out):
          count = os.preadv(file.fileno(), [out.data[done:]], offset + done)
          if not count:
            raise OSError(f"it ends before byte {offset + len(out)}")
          done += count
        yield

  def write(self, key: str, data: bytes) -> None:
    """Writes an object; readers see the old one or the new one."""
    path = self.location(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data)

  def put_file(self, file: pathlib.Path, key: str) -> None:
    """Moves a file of the same file system into place."""
    path = self.location(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.rename(path)


def _open_at_once(path: str, flags: int) -> int:
  """Opens for reading, without waiting for the writer of a pipe."""
  try:
    return os.open(path, flags | os.O_NONBLOCK)
  except ValueError as error:  # a name with a NUL, or that is no text
    raise OSError(f"a name that no file has ({error})") from None


class Bucket:
  """Stores objects in a key-value store, such as gs://bucket/folder."""

  def __init__(self, url: str):
    """Parses the URL, without a request to the server.

    Raises:
      UserError: TensorStore does not know such a URL.
    """
    self.root = url.rstrip("/") if not url.endswith("://") else url
    try:
      store = ts.KvStore.open(self.root + "/", context=_context())
      self._store = store.result(timeout=_READ_SECONDS)
    except (ValueError, OSError) as error:
      raise UserError(
        f"{url} is no URL that TensorStore opens ({error}); give a folder,"
        " gs://bucket/folder or file:///folder"
      ) from None

  def location(self, key: str) -> str:
    """Returns the URL of an object, for messages."""
    return f"{self.root}/{key}"

  def list(self, prefix: str) -> list[str]:
    """Keys right below the root that start with `prefix`, sorted."""
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    found = self._wait(self._store.list(ts.KvStore.KeyRange(prefix, end)))
    names = [key.decode() for key in found]
    return sorted(name for name in names if "/" not in name)

  def read(self, key: str) -> bytes:
    """Reads a whole object.

    Raises:
      OSError: it is missing.
      UserError: the server does not respond, or refuses.
    """
    return self._value(self._store.read(key), "its end")

  def read_parts(self, key: str, parts: Iterable[Part]) -> Iterator[None]:
    """Fills the parts, many at a time, and yields after each, in order.

    Raises:
      OSError: the object is missing, or ends before a part does.
      UserError: the server does not respond, or refuses.
    """
    pending: collections.deque[tuple[ts.Future, int, np.ndarray]]
    pending = collections.deque()
    for offset, out in parts:
      span = slice(offset, offset + len(out))
      pending.append((self._store.read(key, byte_range=span), span.stop, out))
      if len(pending) == _IN_FLIGHT:
        yield self._fill(*pending.popleft())
    while pending:
      yield self._fill(*pending.popleft())

  def write(self, key: str, data: bytes) -> None:
    """Writes an object; readers see the old one or the new one."""
    self._wait(self._store.write(key, data), _WRITE_SECONDS)

  def put_file(self, file: pathlib.Path, key: str) -> None:
    """Uploads a file and deletes it here.

    TensorStore takes an object whole and copies it: this needs three times
    the file's size in memory, 1.6 GB for an hour of video.

    Raises:
      UserError: the name is not UTF-8, or the server refuses.
    """
    try:
      key.encode()
    except UnicodeEncodeError:
      raise UserError(
        f"{key!r} is not UTF-8, as names in a bucket are; rename the video"
      ) from None
    self.write(key, file.read_bytes())
    file.unlink()

  def _fill(self, future: ts.Future, end: int, out: np.ndarray) -> None:
    """Copies the result of a request for the bytes up to `end`."""
    out[:] = np.frombuffer(self._value(future, f"byte {end}"), np.uint8)

  def _value(self, future: ts.Future, end: str) -> bytes:
    """Returns the bytes of a request; `end` describes their end in messages."""
    try:
      result = self._wait(future)
    except _OutOfRange:
      raise OSError(f"it ends before {end}") from None
    if result.state != "value":
      raise FileNotFoundError("no such object")
    return result.value

  def _wait(self, future: ts.Future, seconds: int | None = None) -> Any:
    """Returns the result of a request, or raises a UserError without one."""
    seconds = seconds or _READ_SECONDS
    try:
      return future.result(timeout=seconds)
    except TimeoutError:
      reason = f"no answer within {seconds} s"
    except (ValueError, OSError, RuntimeError) as error:
      if "OUT_OF_RANGE" in str(error):
        raise _OutOfRange from None
      reason = str(error)
    raise UserError(
      f"{self.root}: {reason}; check the network, the bucket's name and the"
      " credentials (`gcloud auth application-default login`, or the service"
      " account of the machine)",
      kind="unreachable",
    )


class _OutOfRange(Exception):
  """Reports a range past the end of an object."""


@functools.cache
def _context() -> ts.Context:
  """Returns the TensorStore context of this process."""
  # One context: memory:// stores live in it, and connections are shared.
  return ts.Context()


def is_url(root: str | os.PathLike) -> bool:
  """Returns whether `root` is a URL; anything else is a folder."""
  return bool(_URL.match(os.fspath(root)))


def open_storage(root: str | os.PathLike) -> Folder | Bucket:
  """Opens the storage of a folder or URL.

  Raises:
    UserError: TensorStore cannot open the URL.
  """
  return Bucket(os.fspath(root)) if is_url(root) else Folder(root)
