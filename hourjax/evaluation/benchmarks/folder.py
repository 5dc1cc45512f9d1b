"""A benchmark's download: annotation files, videos, archives still packed."""

import os
import pathlib
import re
import shlex
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hourjax.data.prepare.question_tables import read_rows
from hourjax.errors import UserError
from hourjax.extraction.video_list import SUFFIXES, walk_videos
from hourjax.schema import Schema, read_json, read_schema, shorten

# --- Archives ----------------------------------------------------------------

# Pattern of archives -> commands that unpack one and several of them. {path} is
# the archive, {many} a pattern of all in its folder, {at} its folder.
_KINDS = {
  "*.zip": ("unzip -n {path} -d {at}", "unzip -n {many} -d {at}"),
  "*.tar": (
    "tar -xf {path} -C {at}",
    'for f in {many}; do tar -xf "$f" -C {at}; done',
  ),
}
_KINDS |= {"*.tar.gz": _KINDS["*.tar"], "*.tgz": _KINDS["*.tar"]}
# Pattern of the parts of an archive that was cut -> command.
_PARTS = {
  "*.tar.[p0-9]*": "cat {many} | tar -x -C {at}",
  "*.tar.gz.[p0-9]*": "cat {many} | tar -xz -C {at}",
  "*.zip.[p0-9]*": "cat {many} > {at}/all.zip && unzip -n {at}/all.zip -d {at}",
}
_DEPTH = 3  # levels of folders in which archives are looked for


def archives(*folders: pathlib.Path) -> list[pathlib.Path]:
  """Returns the archives in some folders and up to two levels below, sorted.

  Args:
    *folders: the folders.
  """
  found: set[pathlib.Path] = set()
  for folder in folders:
    for depth in range(_DEPTH):
      for kind in (*_KINDS, *_PARTS):
        found.update(
          path for path in folder.glob("*/" * depth + kind) if path.is_file()
        )
  return sorted(found)


def unpack_commands(paths: Iterable[pathlib.Path]) -> str:
  """Returns the commands that unpack archives into their own folders.

  "unzip -n 'downloads/Video-MME/*.zip' -d downloads/Video-MME"

  Args:
    paths: the archives.
  """
  groups: dict[tuple[pathlib.Path, str], list[pathlib.Path]] = {}
  for path in paths:
    kind = next((kind for kind in _KINDS if path.match(kind)), None)
    # A part has a pattern of its own archive: "v.tar.part-aa" ->
    # "v.tar.part-*".
    many = kind or re.sub(r"[^.-]+$", "*", path.name)
    groups.setdefault((path.parent, many), []).append(path)
  return " && ".join(
    _command(folder, many, found) for (folder, many), found in groups.items()
  )


def _command(folder: pathlib.Path, many: str, found: list[pathlib.Path]) -> str:
  """Returns the command that unpacks archives of one pattern in a folder."""
  at, path = shlex.quote(str(folder)), found[0]
  # The shell expands a pattern, except for unzip, which expands it itself and
  # would take the further files of an expanded one for members to unpack.
  pattern = (
    shlex.quote(f"{folder}/*.zip") if many == "*.zip" else f"{at}/{many}"
  )
  if many in _KINDS:
    form = _KINDS[many][len(found) > 1]
  else:
    form = next(form for kind, form in _PARTS.items() if path.match(kind))
  return form.format(path=shlex.quote(str(path)), many=pattern, at=at)


def may_hold(path: pathlib.Path, names: Iterable[str]) -> bool:
  """Returns whether an archive may hold one of some files.

  Only a zip has a list of its files. A tar would have to be read whole, so it
  may always hold them.

  Args:
    path: the archive.
    names: names of the files.
  """
  if path.suffix != ".zip":
    return True
  try:
    with zipfile.ZipFile(path) as file:
      inside = {pathlib.PurePosixPath(name).stem for name in file.namelist()}
  except (OSError, zipfile.BadZipFile):
    return True
  return any(pathlib.PurePosixPath(name).stem in inside for name in names)


# --- Annotation files and videos ---------------------------------------------

# Folders that archives of a part of the videos each unpack to.
_PART_FOLDERS = (
  "video_part_*",
  "videos_chunked_*",
  "video_chunks",
  "videos_chunks",
)
_MOST = 2**30  # bytes of an annotation file


def find_files(
  folder: pathlib.Path, layouts: Sequence[str]
) -> tuple[list[pathlib.Path], list[str]]:
  """Returns the annotation files of the first layout that has any.

  Args:
    folder: folder of the benchmark.
    layouts: patterns separated by spaces.

  Returns:
    The files, in the patterns' order, and the patterns without a file.
  """
  for layout in layouts:
    found = {
      pattern: sorted(p for p in folder.glob(pattern) if p.is_file())
      for pattern in layout.split()
    }
    if files := [path for paths in found.values() for path in paths]:
      return files, [pattern for pattern, paths in found.items() if not paths]
  return [], []


def read_table(path: pathlib.Path) -> list[Any]:
  """Reads all rows of a .parquet, .jsonl, .csv or .json file.

  A .json file that holds one object has that object as its only row. A row that
  is not an object is returned as the UserError that says so.

  Args:
    path: the file.

  Raises:
    UserError: the file cannot be read, is damaged, or holds no rows.
  """
  if path.suffix == ".json":
    data = read_json(path, remedy="fetch it again", most=_MOST)
    rows = data if isinstance(data, list) else [data]
  else:
    rows = list(read_rows(path))
  for number, row in enumerate(rows):
    where = f"{path}: row {number + 1} is"
    # The reader yields an error for a row that it cannot parse, in most cases
    # because the file was cut off.
    if isinstance(row, Exception):
      raise UserError(
        f"{where} damaged ({row}); fetch the file again", kind="damaged"
      )
    if not isinstance(row, dict):
      rows[number] = UserError(
        f"{where} {shorten(row)}, expected an object; repair or drop it"
      )
  if not any(isinstance(row, dict) for row in rows):
    reason = str(rows[0]) if rows else f"{path} holds no rows; fetch it again"
    raise UserError(reason, kind="damaged")
  return rows


class Videos:
  """Holds the names of existing videos, and finds them by name or id."""

  def __init__(
    self, names: Iterable[str], keys: Mapping[str, str] | None = None
  ):
    """Indexes the names.

    Args:
      names: paths of the videos relative to their folder, with "/".
      keys: another id of a video -> its name; see `youtube_keys`.
    """
    self._keys = keys or {}
    self._names: dict[str, str] = {}
    self._ids: dict[str, str] = {}
    self._stems: dict[str, list[str]] = {}
    for name in sorted(names):
      path = pathlib.PurePosixPath(name)
      self._names[name] = name
      self._ids.setdefault(str(path.with_suffix("")), name)
      self._stems.setdefault(path.stem, []).append(name)

  def name(self, *candidates: str) -> str:
    """Returns the name of the video that a benchmark means.

    Args:
      *candidates: paths or ids, the likeliest first. Each is also found below
        any folder, and with any other extension of SUFFIXES.

    Returns:
      The first candidate that exists. If none does, the likeliest one, with
      ".mp4" if it has no extension, so that it can be reported as missing.

    Raises:
      UserError: videos in several folders have the name or id.
    """
    for candidate in candidates:
      if found := self.at(candidate) or self._anywhere(candidate):
        return found
    for candidate in candidates:
      if found := self._keys.get(_id(candidate)):
        return found
    first = candidates[0]
    return f"{first}.mp4" if _id(first) == first else first

  def at(self, path: str) -> str | None:
    """Returns the video at a path, with any extension; None if there is none.

    Args:
      path: path relative to the folder of videos.
    """
    return self._names.get(path) or self._ids.get(_id(path))

  def folders(self) -> set[str]:
    """Returns the names of all folders that directly hold videos."""
    return {pathlib.PurePosixPath(name).parent.name for name in self._names}

  def has(self, name: str) -> bool:
    """Returns whether a name that `name` returned is an existing video's.

    Args:
      name: the name.
    """
    return name in self._names

  def _anywhere(self, name: str) -> str | None:
    """Returns the video whose path ends in a name; None if there is none.

    A video with the same extension is preferred to one with another.
    """
    tail = _id(name)
    found = self._stems.get(tail.rpartition("/")[2], [])
    found = [path for path in found if f"/{_id(path)}".endswith(f"/{tail}")]
    found = [path for path in found if path.endswith(f"/{name}")] or found
    if len({os.path.dirname(path) for path in found}) > 1:
      raise UserError(
        f"the video {name} is asked about, and there are"
        f" {' and '.join(found)}; leave one in the folder of videos, or give"
        " the right folder as --videos"
      )
    return found[0] if found else None


def _id(name: str) -> str:
  """Returns a name without its extension, if that is a video's.

  An id may contain a dot of its own.
  """
  stem, dot, extension = name.rpartition(".")
  return stem if f"{dot}{extension}".lower() in SUFFIXES else name


def find_videos(
  folder: pathlib.Path, candidates: Sequence[str]
) -> pathlib.Path:
  """Returns the folder of a benchmark's videos.

  That is the benchmark's own folder if folders of unpacked parts in it hold
  videos; else the first candidate that holds videos; else the benchmark's own
  folder, if any folder in it holds videos. If there are no videos, it is the
  first candidate that exists, or else the first one.

  Args:
    folder: folder of the benchmark.
    candidates: names of folders in it, the likeliest first.
  """
  parts = [path for pattern in _PART_FOLDERS for path in folder.glob(pattern)]
  if any(next(walk_videos(path), None) for path in parts):
    return folder
  folders = [folder / name for name in candidates]
  for path in folders:
    if next(walk_videos(path), None):
      return path
  if next(walk_videos(folder), None):
    return folder
  return next((path for path in folders if path.is_dir()), folders[0])


class _Sidecar(Schema):
  """Describes the JSON file that video2dataset writes beside a video."""

  url: str


_KEY = re.compile(r"(?:[?&]v=|youtu\.be/|/(?:embed|shorts|live|v)/)([\w-]{6,})")


def youtube_key(url: str) -> str | None:
  """Returns the id of a YouTube video in its address; None if there is none.

  Args:
    url: the address.
  """
  match = _KEY.search(url)
  return match[1] if match else None


def youtube_keys(folder: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
  """Returns YouTube id -> name of the video, from the JSON beside videos.

  video2dataset, with which LVBench's authors download, numbers the videos:
  00000/00000007.mp4, with the address in 00000/00000007.json.

  Args:
    folder: folder of the videos.
    names: names of the videos in it.
  """
  keys: dict[str, str] = {}
  for name in sorted(names):
    path = folder / name
    beside = path.with_suffix(".json")
    if not path.stem.isdecimal() or not beside.is_file():
      continue
    try:
      sidecar = read_schema(_Sidecar, beside, remedy="fetch the video again")
    except UserError:
      # Without its address the video is not found, and reported as missing.
      continue
    if key := youtube_key(sidecar.url):
      keys.setdefault(key, name)
  return keys
