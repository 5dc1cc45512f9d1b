"""Which videos a process extracts."""

import os
import pathlib
from collections.abc import Iterator

from hourjax.data.store.storage import is_url
from hourjax.errors import UserError

SUFFIXES = frozenset(
  {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
  | {".flv", ".wmv", ".ts", ".mpg", ".mpeg", ".3gp"}
)


def find_videos(
  root: str | os.PathLike, names: str | os.PathLike | None = None
) -> list[str]:
  """Names of the videos below a folder, sorted; they are relative paths.

  Args:
    root: folder, searched with its subfolders; hidden files and folders are
      left out.
    names: file with one name a line, which are taken instead of a search.

  Raises:
    UserError: no folder, no videos, or a name that leads out of the folder.
  """
  folder = pathlib.Path(root)
  if is_url(root) or not folder.is_dir():
    raise UserError(
      f"{root} is not a folder on this machine; copy or mount the videos, and"
      " correct the folder"
    )
  found = _listed(names) if names else list(walk_videos(folder))
  if not found:
    raise UserError(
      f"{names or root} holds no video ({', '.join(sorted(SUFFIXES))});"
      " correct it"
    )
  return sorted(set(found))


def worker_slice(names: list[str], index: int, count: int) -> list[str]:
  """The names of worker `index` of `count`; all workers' are all names.

  Raises:
    UserError: no such worker.
  """
  if not 0 <= index < count:
    raise UserError(
      f"worker {index} of {count}; the first is 0, the last {count - 1}"
    )
  return names[index::count]


def parse_worker(text: str) -> tuple[int, int]:
  """ "2/8" to (2, 8).

  Raises:
    UserError: not of that form, or no such worker.
  """
  index, slash, count = text.partition("/")
  numbers = slash and index.isdecimal() and count.isdecimal()
  if not numbers or int(count) < 1:
    raise UserError(f"--worker={text}; write index/count, e.g. --worker=0/8")
  worker_slice([], int(index), int(count))
  return int(index), int(count)


def walk_videos(folder: pathlib.Path) -> Iterator[str]:
  """Yields the paths of all videos below a folder, relative to it, as POSIX.

  Each under its own path first: a link to a folder already seen is passed
  over. Hidden files and folders are left out.
  """
  seen, waiting = set(), [str(folder)]
  while waiting:
    for here, folders, files in os.walk(waiting.pop(0)):
      if os.path.realpath(here) in seen:
        folders.clear()
        continue
      seen.add(os.path.realpath(here))
      folders[:] = sorted(name for name in folders if name[0] != ".")
      paths = (os.path.join(here, name) for name in folders)
      waiting += [path for path in paths if os.path.islink(path)]
      for name in files:
        if pathlib.Path(name).suffix.lower() in SUFFIXES and name[0] != ".":
          yield pathlib.Path(here, name).relative_to(folder).as_posix()


def _listed(path: str | os.PathLike) -> list[str]:
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"cannot read the names in {path}: {error}") from None
  names = [line for line in lines if line.strip()]
  for name in names:
    if pathlib.PurePath(name).is_absolute() or ".." in name.split("/"):
      raise UserError(
        f"{path} names {name!r}; give paths below the folder of videos"
      )
  return names
