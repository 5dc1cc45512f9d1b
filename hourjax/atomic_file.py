"""Files that hold their old content or their new one, whenever a process dies.

`write_file` and `replace_file` write beside a file and rename, and
`new_folder` does so for a folder that is not there yet. `TempFiles`
names the large files that a process writes for a while before they are moved
into a store, and removes those of processes that were killed.
"""

import contextlib
import fcntl
import hashlib
import io
import itertools
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator

from hourjax.errors import UserError

_PREFIX, _LOCK = ".partial-", "lock"


@contextlib.contextmanager
def replace_file(
  path: str | os.PathLike, *, several_writers: bool = False
) -> Iterator[pathlib.Path]:
  """Gives a path to write to, and renames it to `path` if the block succeeds.

  Readers see the old file or the new one, never a part. If the block fails,
  the old file stays and what was written is deleted. A killed process leaves
  a hidden file `.NAME.partial`, which the next writer overwrites.

  Args:
    path: of the file, in an existing folder.
    several_writers: whether other processes may write the same file at the
      same time. Then each writes under a name of its own, the last one to
      finish wins, and what a killed process leaves is not cleaned up.

  Yields:
    The path to write to, in the same folder; nothing is there yet, or what a
    killed process left.
  """
  path = pathlib.Path(path)
  own = f".{uuid.uuid4().hex}" if several_writers else ""
  partial = path.with_name(f".{path.name}{own}.partial")
  try:
    yield partial
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write_file(
  path: str | os.PathLike, data: str | bytes, *, several_writers: bool = False
) -> None:
  """Writes a file whole or not at all; see `replace_file`.

  Args:
    path: of the file, in an existing folder.
    data: the new content; text is encoded as UTF-8.
    several_writers: whether other processes may write it at the same time.

  Raises:
    OSError: it cannot be written; the old file is still there.
  """
  content = data.encode() if isinstance(data, str) else data
  with replace_file(path, several_writers=several_writers) as partial:
    partial.write_bytes(content)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a folder to fill, and renames it to `path` if the block succeeds.

  If the block fails, nothing is left. A killed process leaves a hidden folder
  `.NAME.partial`, which the next one removes.

  Args:
    path: of the folder, which must not exist, or be empty.

  Yields:
    An empty folder beside it.

  Raises:
    UserError: the folder holds something, or is being written by another
      process.
  """
  path = pathlib.Path(path).absolute()
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise UserError(
      f"{path} exists and is not empty; choose another folder, or remove it"
    )
  partial = path.with_name(f".{path.name}.partial")
  partial.mkdir(parents=True, exist_ok=True)
  try:
    lock = _lock(partial)
  except BlockingIOError:
    raise UserError(
      f"another process is writing {partial}; wait for it, or choose another"
      " folder"
    ) from None
  try:
    for old in partial.iterdir():
      if old.name != _LOCK:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    yield partial
    (partial / _LOCK).unlink()
    partial.rename(path)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  finally:
    lock.close()


class TempFiles:
  """Names temporary files beside the store that they will be moved into.

  Attributes:
    folder: that holds the files of this label.
  """

  def __init__(self, root: str | os.PathLike, label: str):
    """Creates nothing before the first file is named.

    Args:
      root: folder of the store. The files lie on the same file system, so that
        they can be renamed into place. For a URL they go to the machine's
        temporary folder (TMPDIR), which must have room for all videos that
        are being written at a time.
      label: tells the writing processes of one store apart.
    """
    base, text = pathlib.Path(root), os.fspath(root)
    if "://" in text:
      digest = hashlib.sha256(text.encode()).hexdigest()[:12]
      base = pathlib.Path(tempfile.gettempdir()) / f"hourjax-{digest}"
    self._base, self.folder = base, base / f"{_PREFIX}{label}"
    self._numbers = itertools.count()

  def new_path(self) -> pathlib.Path:
    """Returns a path that no other process of this machine uses."""
    self.folder.mkdir(parents=True, exist_ok=True)
    return self.folder / f"{os.getpid()}-{next(self._numbers)}"

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Keeps other processes off this label while the block runs.

    Files that killed processes have left under any label are removed first,
    and those of this label when the block ends.

    Raises:
      UserError: a living process holds the label.
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
        _remove_unlocked(folder)
    try:
      yield
    finally:
      shutil.rmtree(self.folder, ignore_errors=True)
      lock.close()


def _lock(folder: pathlib.Path) -> io.FileIO:
  """Locks a folder; the system releases it when the process ends in any way.

  Raises:
    BlockingIOError: another process holds it.
  """
  file = io.FileIO(folder / _LOCK, "ab")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise
  except OSError:
    # A file system without locks: the labels of living processes must differ.
    pass
  return file


def _empty(folder: pathlib.Path) -> None:
  """Deletes all files of a folder but its lock."""
  for path in folder.iterdir():
    if path.name != _LOCK:
      path.unlink()


def _remove_unlocked(folder: pathlib.Path) -> None:
  """Deletes a folder of temporary files if no living process holds it."""
  with contextlib.suppress(OSError), _lock(folder):
    shutil.rmtree(folder)
