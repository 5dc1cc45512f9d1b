"""Archives that a benchmark's download has not been unpacked from yet."""

import pathlib
import re
import shlex
import zipfile
from collections.abc import Iterable

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
