"""Temporary files of a run, removed by the next one if it was killed."""
# MERGED hourjax.training.files:
# Small files of a workdir that must survive a kill at any moment.

import contextlib
import fcntl
import hashlib
import io
import itertools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from hourjax.data.store.storage import is_url
from hourjax.errors import UserError

_PREFIX, _LOCK = ".partial-", "lock"


class Scratch:
  """Names for temporary files beside the store that they will go to."""

  def __init__(self, root: str | os.PathLike, label: str):
    """Nothing is created before the first file.

    Args:
      root: folder of the store, whose file system the files share so that
        they can be renamed into place; for a URL they go to the machine's
        temporary folder (TMPDIR), which must hold the videos in hand.
      label: tells writers of one store apart.
    """
    base = pathlib.Path(root)
    if is_url(root):
      digest = hashlib.sha256(os.fspath(root).encode()).hexdigest()[:12]
      base = pathlib.Path(tempfile.gettempdir()) / f"hourjax-{digest}"
    self._base, self.folder = base, base / f"{_PREFIX}{label}"
    self._numbers = itertools.count()

  def file(self) -> pathlib.Path:
    """A path that no other file of this machine's processes has."""
    self.folder.mkdir(parents=True, exist_ok=True)
    return self.folder / f"{os.getpid()}-{next(self._numbers)}"

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """Keeps others off this label, and removes what dead runs have left.

    Raises:
      UserError: if a living process holds the label.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    try:
      lock = _lock(self.folder)
    except BlockingIOError:
      raise UserError(
        f"another extraction is writing into {self.folder}; wait for it, or"
        " give each process its own --worker=i/n"
      ) from None
    _empty(self.folder)
    for folder in self._base.glob(f"{_PREFIX}*"):
      if folder != self.folder:
        _remove_dead(folder)
    try:
      yield
    finally:
      shutil.rmtree(self.folder, ignore_errors=True)
      lock.close()


def _lock(folder: pathlib.Path) -> io.FileIO:
  """The folder's lock, open; it ends with the process, however that ends."""
  file = io.FileIO(folder / _LOCK, "ab")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise
  except OSError:
    pass  # a file system without locks: labels must differ by themselves
  return file


def _empty(folder: pathlib.Path) -> None:
  for path in folder.iterdir():
    if path.name != _LOCK:
      path.unlink()


def _remove_dead(folder: pathlib.Path) -> None:
  with contextlib.suppress(OSError), _lock(folder):
    shutil.rmtree(folder)


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file so that it holds the old text or the new, never half."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    partial.write_text(text)
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
