"""Archives that a benchmark's download has not been unpacked from yet."""
# MERGED hourjax.evaluation.benchmarks.folder:
# A benchmark's folder: its annotation files and its videos.

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

# How the archives of a kind are told, and what unpacks one and several of them.
# {path} is the archive, {many} a pattern of all in its folder, {at} its folder.
_KINDS = {
  "*.zip": ("unzip -n {path} -d {at}", "unzip -n {many} -d {at}"),
  "*.tar": (
    "tar -xf {path} -C {at}",
    'for f in {many}; do tar -xf "$f" -C {at}; done',
  ),
}
_KINDS |= {"*.tar.gz": _KINDS["*.tar"], "*.tgz": _KINDS["*.tar"]}
# One archive cut in parts.
_PARTS = {
  "*.tar.[p0-9]*": "cat {many} | tar -x -C {at}",
  "*.tar.gz.[p0-9]*": "cat {many} | tar -xz -C {at}",
  "*.zip.[p0-9]*": "cat {many} > {at}/all.zip && unzip -n {at}/all.zip -d {at}",
}
_DEPTH = 3  # folders below the benchmark's own that archives are looked for in


def archives(*folders: pathlib.Path) -> list[pathlib.Path]:
  """Returns the archives in some folders and little below them, sorted."""
  found: set[pathlib.Path] = set()
  for folder in folders:
    for depth in range(_DEPTH):
      for kind in (*_KINDS, *_PARTS):
        found.update(
          path for path in folder.glob("*/" * depth + kind) if path.is_file()
        )
  return sorted(found)


def commands(paths: Iterable[pathlib.Path]) -> str:
  """Returns what unpacks archives into the folders that they lie in.

  "unzip -n 'downloads/Video-MME/*.zip' -d downloads/Video-MME"
  """
  groups: dict[tuple[pathlib.Path, str], list[pathlib.Path]] = {}
  for path in paths:
    kind = next((kind for kind in _KINDS if path.match(kind)), None)
    many = kind or re.sub(r"[^.-]+$", "*", path.name)  # of its parts alone
    groups.setdefault((path.parent, many), []).append(path)
  return " && ".join(
    _command(folder, many, found) for (folder, many), found in groups.items()
  )


def _command(folder: pathlib.Path, many: str, found: list[pathlib.Path]) -> str:
  at, path = shlex.quote(str(folder)), found[0]
  # The shell reads a pattern, but for unzip, which wants it quoted.
  pattern = (
    shlex.quote(f"{folder}/*.zip") if many == "*.zip" else f"{at}/{many}"
  )
  if many in _KINDS:
    form = _KINDS[many][len(found) > 1]
  else:
    form = next(form for kind, form in _PARTS.items() if path.match(kind))
  return form.format(path=shlex.quote(str(path)), many=pattern, at=at)


def may_hold(path: pathlib.Path, names: Iterable[str]) -> bool:
  """Returns whether an archive may hold one of some files, by their names.

  Only a zip has a list of its files; a tar would have to be read whole.
  """
  if path.suffix != ".zip":
    return True
  try:
    with zipfile.ZipFile(path) as file:
      inside = {pathlib.PurePosixPath(name).stem for name in file.namelist()}
  except (OSError, zipfile.BadZipFile):
    return True
  return any(pathlib.PurePosixPath(name).stem in inside for name in names)


# Folders that hold a part of the videos each, as archives of them unpack.
_PARTS_folder = (
  "video_part_*",
  "videos_chunked_*",
  "video_chunks",
  "videos_chunks",
)
_MOST = 2**30  # bytes of an annotation file


def find_files(
  folder: pathlib.Path, layouts: Sequence[str]
) -> tuple[list[pathlib.Path], list[str]]:
  """The annotation files of the first layout of which there is any.

  Args:
    folder: of the benchmark.
    layouts: patterns with spaces between.

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
  """All rows of a .parquet, .jsonl, .csv or .json file.

  A .json file that holds one object gives it as its only row. A row that is no
  object is given as the UserError that says so.

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
    if isinstance(row, Exception):  # a file that is cut off, most often
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
  """Names of the videos there are, found by name or by id."""

  def __init__(
    self, names: Iterable[str], keys: Mapping[str, str] | None = None
  ):
    """Takes paths relative to the folder of videos, as POSIX.

    Args:
      names: of the videos.
      keys: names by another id of the video; see `youtube_keys`.
    """
    self._keys = keys or {}
    self._names: dict[str, str] = {}
    self._ids: dict[str, str] = {}
    self._bare: dict[str, list[str]] = {}  # in any folder
    for name in sorted(names):
      path = pathlib.PurePosixPath(name)
      self._names[name] = name
      self._ids.setdefault(str(path.with_suffix("")), name)
      self._bare.setdefault(path.stem, []).append(name)

  def name(self, *candidates: str) -> str:
    """The video that a benchmark means.

    Args:
      candidates: paths or ids, the likeliest first. One is found below any
        folder, too, and an extension finds any other of SUFFIXES.

    Returns:
      The first candidate that exists. If none does, the likeliest, with ".mp4"
      if it has no extension, so that it can be reported as missing.

    Raises:
      UserError: a name or id is that of videos in several folders.
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
    """The video at a path from the folder of videos, with any extension."""
    return self._names.get(path) or self._ids.get(_id(path))

  def folders(self) -> set[str]:
    """Names of all folders that hold videos themselves."""
    return {pathlib.PurePosixPath(name).parent.name for name in self._names}

  def has(self, name: str) -> bool:
    """Whether a name that `name` gave is that of a video there is."""
    return name in self._names

  def _anywhere(self, name: str) -> str | None:
    """By the end of a path; by the name rather than by the id alone."""
    tail = _id(name)
    found = self._bare.get(tail.rpartition("/")[2], [])
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
  """A name without its extension; an id may hold a dot of its own."""
  stem, dot, extension = name.rpartition(".")
  return stem if f"{dot}{extension}".lower() in SUFFIXES else name


def find_videos(
  folder: pathlib.Path, candidates: Sequence[str]
) -> pathlib.Path:
  """The folder of a benchmark's videos.

  It is the first of some that holds videos; but the benchmark's own where
  folders of parts or, failing that, any folders at all hold some. If there are
  no videos, it is the first that exists; if none exists, the first.
  """
  parts = [path for pattern in _PARTS_folder for path in folder.glob(pattern)]
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
  """What video2dataset writes beside a video that it has fetched."""

  url: str


_KEY = re.compile(r"(?:[?&]v=|youtu\.be/|/(?:embed|shorts|live|v)/)([\w-]{6,})")


def youtube_key(url: str) -> str | None:
  """The id of a YouTube video in its address; None if there is none."""
  found = _KEY.search(url)
  return found[1] if found else None


def youtube_keys(folder: pathlib.Path, names: Iterable[str]) -> dict[str, str]:
  """Names of videos by their YouTube ids, which the JSON beside them tells.

  video2dataset, which LVBench's authors download with, numbers the videos:
  00000/00000007.mp4, with the address in 00000/00000007.json.
  """
  keys: dict[str, str] = {}
  for name in sorted(names):
    path = folder / name
    beside = path.with_suffix(".json")
    if not path.stem.isdecimal() or not beside.is_file():
      continue
    try:
      told = read_schema(_Sidecar, beside, remedy="fetch the video again")
    except UserError:
      continue  # its video is reported as missing
    if key := youtube_key(told.url):
      keys.setdefault(key, name)
  return keys
