"""A benchmark's folder: its annotation files and its videos."""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from hourjax.data.prepare.tables import read_rows
from hourjax.errors import UserError
from hourjax.inference.videos import SUFFIXES, walk_videos


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

  A .json file that holds one object gives it as its only row.

  Raises:
    UserError: the file cannot be read, is damaged, or holds no rows.
  """
  rows = _read_json(path) if path.suffix == ".json" else list(read_rows(path))
  for number, row in enumerate(rows, start=1):
    if not isinstance(row, dict):
      raise UserError(
        f"{path}: row {number} is damaged ({_problem(row)}); fetch the file"
        " again",
        kind="damaged",
      )
  if not rows:
    raise UserError(f"{path} holds no rows; fetch it again", kind="damaged")
  return rows


def _problem(row: Any) -> str:
  return str(row) if isinstance(row, Exception) else type(row).__name__


def _read_json(path: pathlib.Path) -> list[Any]:
  try:
    data = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{path} is damaged ({error}); fetch it again", kind="damaged"
    ) from error
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  return data if isinstance(data, list) else [data]


class Videos:
  """Names of the videos there are, found by name or by id."""

  def __init__(self, names: Iterable[str]):
    """Takes paths relative to the folder of videos, as POSIX."""
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
      candidates: paths or ids, the likeliest first. A bare name or id finds
        one in any folder, and an extension any other of SUFFIXES.

    Returns:
      The first candidate that exists. If none does, the likeliest, with ".mp4"
      if it has no extension, so that it can be reported as missing.

    Raises:
      UserError: a bare name or id is that of videos in several folders.
    """
    for candidate in candidates:
      if found := self.at(candidate) or self._anywhere(candidate):
        return found
    first = candidates[0]
    return f"{first}.mp4" if _id(first) == first else first

  def at(self, path: str) -> str | None:
    """The video at a path from the folder of videos, with any extension."""
    return self._names.get(path) or self._ids.get(_id(path))

  def folders(self) -> set[str]:
    """Names of all folders that hold videos themselves."""
    return {pathlib.PurePosixPath(name).parent.name for name in self._names}

  def _anywhere(self, name: str) -> str | None:
    """By a bare name or id; by the name rather than by the id alone."""
    found = self._bare.get(_id(name), [])
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
  """The first of some folders, or the folder itself, that holds videos.

  If none does, the first that exists; if none exists, the first.
  """
  folders = [folder / name for name in candidates]
  for path in folders:
    if next(walk_videos(path), None):
      return path
  if any(path.suffix.lower() in SUFFIXES for path in folder.glob("*")):
    return folder
  return next((path for path in folders if path.is_dir()), folders[0])
