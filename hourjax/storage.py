"""Bytes under a root: a folder, or a URL that TensorStore's KvStore opens.

Both kinds write whole objects atomically and read byte ranges straight into
buffers. Keys are relative, with "/" between folders.
"""

import collections
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
import tensorstore as ts

from hourjax.atomic_file import write_file
from hourjax.errors import UserError

# Ranges asked for at a time: 1.5 MB each gave 4 GB/s, one of 531 MB 0.54.
_IN_FLIGHT = 32
_MOST_BYTES = 2**30  # of what is read whole: an index of 10 million videos
_READ_SECONDS, _WRITE_SECONDS = 60, 900
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Part = tuple[int, np.ndarray]  # offset in bytes, contiguous uint8 [n] to fill


class Folder:
  """Objects as files below a folder."""

  def __init__(self, root: str | os.PathLike):
    self.root = pathlib.Path(root)

  def location(self, key: str) -> pathlib.Path:
    """Path of an object, for messages."""
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
    """A whole object; OSError where there is none, or none that is meant."""
    with open(self.location(key), "rb", opener=_open_at_once) as file:
      size = os.fstat(file.fileno()).st_size
      if size > _MOST_BYTES:
        raise OSError(f"{size} bytes, at most {_MOST_BYTES} are meant")
      return file.read(_MOST_BYTES)

  def read_parts(self, key: str, parts: Iterable[Part]) -> Iterator[None]:
    """Fills one part after the other and yields after each.

    `preadv` and not a memory map: as fast with fresh buffers, and a file that
    is cut while it is read gives an error instead of SIGBUS.

    Raises:
      OSError: missing, unreadable, or ends before a part does.
    """
    path = self.location(key)
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
      for offset, out in parts:
        done = 0
        while done < len(out):
          count = os.preadv(file.fileno(), [out[done:]], offset + done)
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
  """Opens for reading; a pipe without a writer would be waited for."""
  try:
    return os.open(path, flags | os.O_NONBLOCK)
  except ValueError as error:  # a name with a NUL, or that is no text
    raise OSError(f"a name that no file has ({error})") from None


class Bucket:
  """Objects in a key-value store, e.g. gs://bucket/folder."""

  def __init__(self, url: str):
    """Parses the URL; nothing is asked of the server yet.

    Raises:
      UserError: if TensorStore does not know such a URL.
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
    """URL of an object, for messages."""
    return f"{self.root}/{key}"

  def list(self, prefix: str) -> list[str]:
    """Keys right below the root that start with `prefix`, sorted."""
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    found = self._wait(self._store.list(ts.KvStore.KeyRange(prefix, end)))
    names = [key.decode() for key in found]
    return sorted(name for name in names if "/" not in name)

  def read(self, key: str) -> bytes:
    """A whole object; OSError where there is none."""
    return self._value(self._store.read(key), "its end")

  def read_parts(self, key: str, parts: Iterable[Part]) -> Iterator[None]:
    """Fills the parts, many at a time, and yields after each, in order.

    Raises:
      OSError: missing, or ends before a part does.
      UserError: the server does not answer or refuses.
    """
    flying = collections.deque()
    for offset, out in parts:
      span = slice(offset, offset + len(out))
      flying.append((self._store.read(key, byte_range=span), span.stop, out))
      if len(flying) == _IN_FLIGHT:
        yield self._fill(*flying.popleft())
    while flying:
      yield self._fill(*flying.popleft())

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

  def _fill(self, future, end, out) -> None:
    out[:] = np.frombuffer(self._value(future, f"byte {end}"), np.uint8)

  def _value(self, future, end) -> bytes:
    try:
      result = self._wait(future)
    except _OutOfRange:
      raise OSError(f"it ends before {end}") from None
    if result.state != "value":
      raise FileNotFoundError("no such object")
    return result.value

  def _wait(self, future, seconds=None):
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
  """A range past the end of an object."""


@functools.cache
def _context() -> ts.Context:
  # One context: memory:// stores live in it, and connections are shared.
  return ts.Context()


def is_url(root: str | os.PathLike) -> bool:
  """Whether `root` is a URL; anything else is a folder."""
  return bool(_URL.match(os.fspath(root)))


def open_storage(root: str | os.PathLike) -> Folder | Bucket:
  """The storage of a folder or URL.

  Raises:
    UserError: for a URL that TensorStore cannot open.
  """
  return Bucket(os.fspath(root)) if is_url(root) else Folder(root)
