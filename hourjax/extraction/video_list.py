"""The list of videos below a folder, and each worker's part of it."""

import collections
import os
import pathlib
import posixpath
from collections.abc import Iterator

from hourjax.data.media import frame_folder
from hourjax.errors import UserError
from hourjax.storage import is_url

SUFFIXES = frozenset(
  {".mp4", ".m4v", ".mov", ".qt", ".mkv", ".mk3d", ".webm", ".avi", ".divx"}
  | {".flv", ".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".gif", ".mxf", ".rmvb"}
  | {".ts", ".m2ts", ".m2t", ".mts", ".tp", ".trp", ".mpg", ".mpeg", ".mpe"}
  | {".vob", ".m1v", ".m2v", ".mpv", ".ogv", ".ogm", ".rm", ".wtv", ".dv"}
)
_NAMED = 8  # file endings, or links, that a note names


def find_videos(
  root: str | os.PathLike, names: str | os.PathLike | None = None
) -> list[str]:
  """Returns the names of the videos below a folder, sorted.

  Names are paths relative to the folder. Files that are left out for their
  ending, and videos that links place outside of the folder, are reported by
  one printed line each.

  Args:
    root: folder, searched with its subfolders; hidden files and folders are
      left out.
    names: file with one name a line. These are taken instead of a search.

  Raises:
    UserError: there is no folder, no video, or a name leads out of the folder.
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
  """Returns the names of one worker: number i, i + n, i + 2n, ...

  Every name belongs to exactly one worker.

  Args:
    names: names of all videos.
    index: number i of the worker.
    count: number n of workers.

  Raises:
    UserError: the index is not below the count.
  """
  if not 0 <= index < count:
    raise UserError(
      f"worker {index} of {count}; the first is 0, the last {count - 1}"
    )
  return names[index::count]


def parse_worker(text: str) -> tuple[int, int]:
  """Parses a worker's index and count: "2/8" becomes (2, 8).

  Args:
    text: value of --worker.

  Raises:
    UserError: the text has another form, or the index is not below the count.
  """
  index, slash, count = text.partition("/")
  numbers = slash and index.isdecimal() and count.isdecimal()
  if not numbers or int(count) < 1:
    raise UserError(f"--worker={text}; write index/count, e.g. --worker=0/8")
  worker_slice([], int(index), int(count))
  return int(index), int(count)


def walk_videos(folder: pathlib.Path) -> Iterator[str]:
  """Yields the paths of all videos below a folder, relative and in POSIX form.

  Real folders are searched before linked ones, and a link to a folder that has
  been searched is left out: so a video that is in the folder itself has the
  path without links. Hidden files and folders are left out.

  Args:
    folder: the folder.
  """
  yield from _Walk(folder).videos()


class _Walk:
  """Searches a folder, and counts what it leaves out."""

  def __init__(self, folder: pathlib.Path):
    """Prepares a search of the folder."""
    self._folder = folder
    self._real = os.path.realpath(folder)
    self._endings: collections.Counter[str] = collections.Counter()
    self._outside: collections.Counter[str] = collections.Counter()
    self._above: list[str] = []  # links to folders that hold this one

  def videos(self) -> Iterator[str]:
    """Yields as `walk_videos` does."""
    seen: set[str] = set()
    waiting = [str(self._folder)]
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
    """Yields lines that tell a user what was left out or linked.

    Args:
      found: number of videos that were found.
    """
    if self._endings:
      total = sum(self._endings.values())
      names = [
        f"{e or 'none'} {n}" for e, n in self._endings.most_common(_NAMED)
      ]
      more = ", ..." if len(self._endings) > _NAMED else ""
      # Nothing tells a folder of frames from a folder of images.
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
    """Returns whether a link may be followed: not to a folder above."""
    target = os.path.realpath(link)
    if os.path.commonpath([target, self._real]) != target:
      return True
    if target != self._real:
      self._above.append(f"{link} -> {target}")
    return False

  def _file(self, path: pathlib.Path, real: str) -> Iterator[str]:
    """Yields a file's name if it is a video.

    Args:
      path: the file.
      real: path of its folder without links.
    """
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
  """Reads the names in a file, one a line."""
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"cannot read the names in {path}: {error}") from None
  # "./a.mp4", as `find` prints it, is the video a.mp4.
  names = [posixpath.normpath(line) for line in lines if line.strip()]
  for name in names:
    if pathlib.PurePath(name).is_absolute() or ".." in name.split("/"):
      raise UserError(
        f"{path} names {name!r}; give paths below the folder of videos"
      )
  return names
