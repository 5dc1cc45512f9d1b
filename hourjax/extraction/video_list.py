"""Which videos a process extracts."""

import collections
import os
import pathlib
from collections.abc import Iterator

from hourjax.data.media import frame_folder
from hourjax.data.store.storage import is_url
from hourjax.errors import UserError

SUFFIXES = frozenset(
  {".mp4", ".m4v", ".mov", ".qt", ".mkv", ".mk3d", ".webm", ".avi", ".divx"}
  | {".flv", ".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".gif", ".mxf", ".rmvb"}
  | {".ts", ".m2ts", ".m2t", ".mts", ".tp", ".trp", ".mpg", ".mpeg", ".mpe"}
  | {".vob", ".m1v", ".m2v", ".mpv", ".ogv", ".ogm", ".rm", ".wtv", ".dv"}
)
_NAMED = 8  # endings, or links, that are told by name


def find_videos(
  root: str | os.PathLike, names: str | os.PathLike | None = None
) -> list[str]:
  """Names of the videos below a folder, sorted; they are relative paths.

  Args:
    root: folder, searched with its subfolders; hidden files and folders are
      left out.
    names: file with one name a line, which are taken instead of a search.

  What a search leaves out for its ending, and what it finds outside of the
  folder by links, is printed.

  Raises:
    UserError: no folder, no videos, or a name that leads out of the folder.
  """
  if not os.fspath(root):
    raise UserError("the folder of videos is empty text; give a folder")
  folder = pathlib.Path(root)
  if is_url(root) or not folder.is_dir():
    raise UserError(
      f"{root} is not a folder on this machine; copy or mount the videos, and"
      " correct the folder"
    )
  walk = _Walk(folder)
  found = _listed(names) if names else list(walk.videos())
  for line in walk.notes(len(found)):
    print(line, flush=True)
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
  yield from _Walk(folder).videos()


class _Walk:
  """A search below a folder, and what it passed by."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._real = os.path.realpath(folder)
    self._endings: collections.Counter[str] = collections.Counter()
    self._outside: collections.Counter[str] = collections.Counter()
    self._above: list[str] = []  # links to folders that hold this one

  def videos(self) -> Iterator[str]:
    """Yields as `walk_videos` does."""
    seen, waiting = set(), [str(self._folder)]
    while waiting:
      for here, folders, files in os.walk(waiting.pop(0)):
        real = os.path.realpath(here)
        if real in seen:
          folders.clear()
          continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        paths = (os.path.join(here, name) for name in folders)
        waiting += [p for p in paths if os.path.islink(p) and self._below(p)]
        for name in files:
          if name[0] != ".":
            yield from self._file(pathlib.Path(here, name), real)

  def notes(self, found: int) -> Iterator[str]:
    """Yields what a user should know of the search."""
    if self._endings:
      total = sum(self._endings.values())
      names = [
        f"{e or 'none'} {n}" for e, n in self._endings.most_common(_NAMED)
      ]
      more = ", ..." if len(self._endings) > _NAMED else ""
      # A folder of frames cannot be told from one of images.
      frames = frame_folder.ENDINGS.intersection(self._endings)
      hint = "; name folders of frames with --names" if frames else ""
      yield (
        f"left out for their endings: {total} files"
        f" ({', '.join(names)}{more}){hint}"
      )
    if self._outside:
      total = sum(self._outside.values())
      links = ", ".join(list(self._outside)[:_NAMED])
      more = ", ..." if len(self._outside) > _NAMED else ""
      yield (
        f"{total} of {found} videos lie outside of {self._folder}, behind"
        f" links: {links}{more}"
      )
    if self._above:
      yield (
        f"{len(self._above)} links to folders that hold {self._folder} itself"
        f" are not followed, e.g. {self._above[0]}"
      )

  def _below(self, link: str) -> bool:
    """Whether a link may be followed: not to a folder above."""
    target = os.path.realpath(link)
    if os.path.commonpath([target, self._real]) != target:
      return True
    if target != self._real:
      self._above.append(f"{link} -> {target}")
    return False

  def _file(self, path: pathlib.Path, real: str) -> Iterator[str]:
    name = path.relative_to(self._folder).as_posix()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
      self._endings[suffix] += 1
      return
    target = os.path.realpath(path) if path.is_symlink() else real
    if os.path.commonpath([target, self._real]) != self._real:
      link = next((up for up in [path, *path.parents] if up.is_symlink()), path)
      self._outside[f"{link} -> {os.path.realpath(link)}"] += 1
    yield name


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
