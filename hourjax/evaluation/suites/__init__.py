"""Benchmarks: from their published annotation files to questions.

One file a benchmark states its layouts, prompt, subtitle rule and everything
else that its score depends on; `SUITES` lists them.

  loaded = suites.read("videomme", "downloads/Video-MME", subtitles=True)
  loaded.questions, loaded.videos, loaded.suite.version
"""

import collections
import os
import pathlib
from collections.abc import Iterable

from hourjax.errors import UserError
from hourjax.evaluation.questions import Question
from hourjax.evaluation.suites import (
  longvideobench,
  lvbench,
  mlvu,
  records,
  tempcompass,
  videomme,
)
from hourjax.evaluation.suites.folder import (
  Videos,
  find_files,
  find_videos,
  read_table,
)
from hourjax.evaluation.suites.suite import Loaded, Source, Suite
from hourjax.inference.videos import walk_videos

SUITES: dict[str, Suite] = {
  module.SUITE.name: module.SUITE
  for module in (
    videomme,
    longvideobench,
    lvbench,
    tempcompass,
    mlvu,
    records,
  )
}


def read(
  name: str,
  data: str | os.PathLike,
  *,
  subtitles: bool = False,
  videos: str | os.PathLike | None = None,
  stored: Iterable[str] | None = None,
) -> Loaded:
  """Reads a benchmark as it lies on disk after a download.

  Args:
    name: key of SUITES.
    data: the benchmark's folder, or one annotation file of it.
    subtitles: ask with subtitles, where a benchmark has them.
    videos: folder of the videos, if it is none of those that the benchmark
      has them in.
    stored: names of videos with stored features; if given, a question's video
      is one of them where it can be, and no folder is listed.

  Raises:
    UserError: no such benchmark, no annotation files, those of another
      benchmark, damaged ones, or a question that cannot be asked or scored.
  """
  suite = _suite(name, subtitles)
  root, files, notes = _files(suite, pathlib.Path(data))
  folder = pathlib.Path(videos) if videos else find_videos(root, suite.videos)
  names = Videos(walk_videos(folder) if stored is None else stored)
  questions: list[Question] = []
  for path in files:
    rows = read_table(path)
    _check_rows(suite, path, rows[0])
    questions += suite.read(Source(path, rows, root, names, subtitles))
  _check(questions, suite)
  notes += _without_subtitles(questions, suite, root)
  return Loaded(suite, tuple(questions), folder, tuple(notes))


def _suite(name: str, subtitles: bool) -> Suite:
  if name not in SUITES:
    raise UserError(
      f"no benchmark {name!r}; choose one of {', '.join(sorted(SUITES))}"
    )
  suite = SUITES[name]
  if subtitles and not suite.subtitles:
    having = [other.name for other in SUITES.values() if other.subtitles]
    raise UserError(
      f"{suite.title} has no subtitles, only {' and '.join(having)} have; leave"
      " --subtitles out"
    )
  return suite


def _files(suite: Suite, data: pathlib.Path):
  """The benchmark's folder, its annotation files, and notes on lacking ones."""
  if data.is_file():
    return _root(suite, data), [data], []
  if not data.is_dir():
    raise UserError(f"{data} does not exist; correct --data")
  files, lacking = find_files(data, suite.annotations)
  if not files:
    raise UserError(_nothing(suite, data))
  if lacking:
    shown = ", ".join(lacking)
    return data, files, [f"Not asked, as the file is missing: {shown}."]
  return data, files, []


def _root(suite: Suite, file: pathlib.Path) -> pathlib.Path:
  """The folder below which a file lies as published; else its own folder."""
  for layout in suite.annotations:
    for pattern in layout.split():
      for root in file.parents[:3]:
        if file in root.glob(pattern):
          return root
  return file.parent


def _nothing(suite: Suite, data: pathlib.Path) -> str:
  """What to say of a folder without the benchmark's annotation files."""
  for other in SUITES.values():
    for path in find_files(data, other.annotations)[0][:1]:
      try:
        known = other.knows(read_table(path)[0])
      except UserError:
        continue
      if known:
        return _another(suite, other, path)
  there = sorted(path.name for path in data.iterdir())
  more = f" and {len(there) - 12} more" if len(there) > 12 else ""
  return (
    f"{data} has no annotation files of {suite.title}: looked for"
    f" {', or '.join(suite.annotations)}, and it holds"
    f" {', '.join(there[:12]) or 'nothing'}{more}; correct --data"
  )


def _another(suite: Suite, other: Suite, path: pathlib.Path) -> str:
  return (
    f"{path} looks like {other.title}, not like {suite.title}; use"
    f" --benchmark={other.name}, or correct --data"
  )


def _check_rows(suite: Suite, path: pathlib.Path, row: dict) -> None:
  if suite.knows(row):
    return
  for other in SUITES.values():
    if other.knows(row):
      raise UserError(_another(suite, other, path))
  wanted = " or ".join(", ".join(sorted(names)) for names in suite.columns)
  raise UserError(
    f"{path} is no file of {suite.title}: its columns are"
    f" {', '.join(map(str, list(row)[:12]))}, expected {wanted}; correct --data"
  )


def _check(questions: list[Question], suite: Suite) -> None:
  """Raises if two questions share an id."""
  ids = collections.Counter(item.id for item in questions)
  twice = [name for name, count in ids.items() if count > 1]
  if twice:
    raise UserError(
      f"{len(twice)} ids of {suite.title} belong to several questions, such as"
      f" {twice[0]!r}; keep one copy of each"
    )


def _without_subtitles(
  questions: list[Question], suite: Suite, root: pathlib.Path
) -> list[str]:
  missing = sum(q.extra.get("subtitles") == "missing" for q in questions)
  if not missing:
    return []
  if missing == len(questions):
    raise UserError(
      f"--subtitles, and {root} has none for any of the {missing} questions;"
      f" unpack those of {suite.title} there ({suite.subtitles}), or leave"
      " --subtitles out"
    )
  return [
    f"{missing} of {len(questions)} questions are asked without subtitles:"
    " their videos have no subtitle file."
  ]
