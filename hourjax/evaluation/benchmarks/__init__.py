"""Benchmarks: from their published annotation files to questions.

Each module with a `BENCHMARK` states one benchmark's layouts, prompt, subtitle
rule and everything else on which its score depends. `BENCHMARKS` finds these
modules itself, so that another benchmark is another file.

  loaded = benchmarks.read("videomme", "downloads/Video-MME", subtitles=True)
  loaded.questions, loaded.videos, loaded.benchmark.version
"""

import importlib
import os
import pathlib
import pkgutil
from collections.abc import Iterable, Sequence

from hourjax.errors import UserError
from hourjax.evaluation.benchmarks.benchmark import (
  Benchmark,
  Loaded,
  Row,
  Source,
)
from hourjax.evaluation.benchmarks.folder import (
  Videos,
  archives,
  find_files,
  find_videos,
  may_hold,
  read_table,
  unpack_commands,
  youtube_keys,
)
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut
from hourjax.extraction.video_list import walk_videos


def _discover() -> dict[str, Benchmark]:
  """Returns the BENCHMARK of each module of this package, by its name."""
  found = {}
  for info in pkgutil.iter_modules(__path__, f"{__name__}."):
    benchmark = getattr(importlib.import_module(info.name), "BENCHMARK", None)
    if benchmark is not None:
      found[benchmark.name] = benchmark
  return found


BENCHMARKS: dict[str, Benchmark] = _discover()


def read(
  name: str,
  data: str | os.PathLike,
  *,
  subtitles: bool = False,
  videos: str | os.PathLike | None = None,
  stored: Iterable[str] | None = None,
) -> Loaded:
  """Reads a benchmark from the files of its download.

  Args:
    name: key of BENCHMARKS.
    data: folder of the benchmark, or one annotation file of it.
    subtitles: whether to ask with subtitles, where the benchmark has them.
    videos: folder of the videos, if it is not one of the benchmark's usual
      folders.
    stored: names of videos with stored features. If it is given, questions are
      about these videos where possible, and no folder is listed.

  Raises:
    UserError: there is no such benchmark; annotation files are missing, damaged
      or another benchmark's; no question can be asked; or videos or subtitles
      are still in archives.
  """
  benchmark = _benchmark(name, subtitles)
  root, files, notes = _files(benchmark, pathlib.Path(data))
  folder = (
    pathlib.Path(videos) if videos else find_videos(root, benchmark.videos)
  )
  names = list(walk_videos(folder) if stored is None else stored)
  existing = Videos(names, youtube_keys(folder, names))
  items: list[Question | LeftOut] = []
  for path in files:
    rows = read_table(path)
    _check_rows(benchmark, path, rows)
    items += benchmark.read(Source(path, rows, root, existing, subtitles))
  questions, left_out = _unique(items, benchmark)
  if not questions:
    raise UserError(_none_asked(left_out, benchmark))
  if stored is None:
    folders = {root, folder}
    notes += _packed_note(questions, benchmark, existing, folders, subtitles)
  notes += _subtitles_note(questions, benchmark, root)
  notes += _rows_notes(questions, left_out)
  return Loaded(
    benchmark, tuple(questions), folder, tuple(notes), tuple(left_out)
  )


def _benchmark(name: str, subtitles: bool) -> Benchmark:
  """Returns a benchmark; raises a UserError if it cannot be asked so."""
  if name not in BENCHMARKS:
    raise UserError(
      f"no benchmark {name!r}; choose one of {', '.join(sorted(BENCHMARKS))}"
    )
  benchmark = BENCHMARKS[name]
  if subtitles and not benchmark.subtitles:
    others = [other.name for other in BENCHMARKS.values() if other.subtitles]
    raise UserError(
      f"{benchmark.title} has no subtitles, only {' and '.join(others)} have;"
      " leave --subtitles out"
    )
  return benchmark


def _files(
  benchmark: Benchmark, data: pathlib.Path
) -> tuple[pathlib.Path, list[pathlib.Path], list[str]]:
  """Returns the folder, the annotation files, and notes on missing ones."""
  if data.is_file():
    return _root(benchmark, data), [data], []
  if not data.is_dir():
    raise UserError(f"{data} does not exist; correct --data")
  files, missing = find_files(data, benchmark.annotations)
  if not files:
    raise UserError(_no_files(benchmark, data))
  notes = []
  if missing:
    notes.append(f"Not asked, as the file is missing: {', '.join(missing)}.")
  return data, files, notes


def _root(benchmark: Benchmark, file: pathlib.Path) -> pathlib.Path:
  """Returns the benchmark's folder, above a file that lies as published.

  A file that does not lie so has its own folder.
  """
  for layout in benchmark.annotations:
    for pattern in layout.split():
      # No pattern has more than two folders.
      for root in file.parents[:3]:
        if file in root.glob(pattern):
          return root
  return file.parent


def _no_files(benchmark: Benchmark, data: pathlib.Path) -> str:
  """Returns the message about a folder without the annotation files."""
  for other in BENCHMARKS.values():
    for path in find_files(data, other.annotations)[0][:1]:
      try:
        is_other = _knows(other, read_table(path))
      except UserError:
        continue
      if is_other:
        return _another(benchmark, other, path)
  names = sorted(path.name for path in data.iterdir())
  more = f" and {len(names) - 12} more" if len(names) > 12 else ""
  return (
    f"{data} has no annotation files of {benchmark.title}: looked for"
    f" {', or '.join(benchmark.annotations)}, and it holds"
    f" {', '.join(names[:12]) or 'nothing'}{more}; correct --data"
  )


def _another(benchmark: Benchmark, other: Benchmark, path: pathlib.Path) -> str:
  """Returns the message about another benchmark's file."""
  return (
    f"{path} looks like {other.title}, not like {benchmark.title}; use"
    f" --benchmark={other.name}, or correct --data"
  )


def _knows(benchmark: Benchmark, rows: Sequence[Row | UserError]) -> bool:
  """Returns whether one of the first rows is the benchmark's.

  More than one is tried, since the first may be damaged.
  """
  return any(
    isinstance(row, dict) and benchmark.knows(row) for row in rows[:20]
  )


def _check_rows(
  benchmark: Benchmark, path: pathlib.Path, rows: Sequence[Row | UserError]
) -> None:
  """Raises a UserError if the rows are not the benchmark's."""
  if _knows(benchmark, rows):
    return
  for other in BENCHMARKS.values():
    if _knows(other, rows):
      raise UserError(_another(benchmark, other, path))
  row = next(row for row in rows if isinstance(row, dict))
  wanted = " or ".join(", ".join(sorted(names)) for names in benchmark.columns)
  raise UserError(
    f"{path} is no file of {benchmark.title}: its columns are"
    f" {', '.join(map(str, list(row)[:12]))}, expected {wanted}; correct --data"
  )


def _unique(
  items: Sequence[Question | LeftOut], benchmark: Benchmark
) -> tuple[list[Question], list[LeftOut]]:
  """Returns the questions with unique ids, and what is left out.

  Raises:
    UserError: half of them share ids, as they do if a file is there twice.
  """
  questions: dict[str, Question] = {}
  left_out = []
  copies = []
  for item in items:
    if isinstance(item, LeftOut):
      left_out.append(item)
    elif item.id in questions:
      reason = (
        f"another question of {benchmark.title} has the id {item.id!r}, too"
      )
      copies.append(LeftOut(item.id, item.video, reason))
    else:
      questions[item.id] = item
  if copies and len(copies) >= len(questions):
    raise UserError(
      f"{len(copies)} ids of {benchmark.title} belong to several questions,"
      f" such as {copies[0].id!r}; keep one copy of each"
    )
  return list(questions.values()), left_out + copies


def _none_asked(left_out: Sequence[LeftOut], benchmark: Benchmark) -> str:
  """Returns the message about a benchmark without a question to ask."""
  if len(left_out) == 1:
    return left_out[0].reason
  return (
    f"none of the {len(left_out)} rows of {benchmark.title} can be asked; the"
    f" first: {left_out[0].reason}"
  )


def _rows_notes(
  questions: Sequence[Question], left_out: Sequence[LeftOut]
) -> list[str]:
  """Returns sentences on rows that were published with mistakes."""
  notes = []
  if left_out:
    notes.append(
      f"{len(left_out)} of {len(left_out) + len(questions)} rows cannot be"
      f" asked and are left out; the first, {left_out[0].id}:"
      f" {left_out[0].reason}."
    )
  if wrong := [item.id for item in questions if not item.expected]:
    notes.append(
      f"{len(wrong)} questions have no right option as published, so every"
      f" answer to them is wrong, as in their authors' score; the first:"
      f" {wrong[0]}."
    )
  return notes


def _packed_note(
  questions: Sequence[Question],
  benchmark: Benchmark,
  videos: Videos,
  folders: set[pathlib.Path],
  subtitles: bool,
) -> list[str]:
  """Returns a note on videos that may be in archives.

  Raises:
    UserError: no video is there, but archives are.
  """
  asked = {item.video for item in questions}
  missing = sorted(name for name in asked if not videos.has(name))
  if not missing:
    return []
  found = [
    path
    for path in archives(*folders)
    if (subtitles or "subtitle" not in path.name) and may_hold(path, missing)
  ]
  if not found:
    return []
  names = ", ".join(path.name for path in found[:3])
  more = f" and {len(found) - 3} more" if len(found) > 3 else ""
  message = (
    f"{len(missing)} of the {len(asked)} videos of {benchmark.title} are not"
    f" there; {names}{more} {'lies' if len(found) == 1 else 'lie'} there"
    f" packed; unpack with `{unpack_commands(found)}`"
  )
  if len(missing) == len(asked):
    raise UserError(message)
  return [f"{message}."]


def _subtitles_note(
  questions: list[Question], benchmark: Benchmark, root: pathlib.Path
) -> list[str]:
  """Returns a note on questions whose videos have no subtitles.

  Raises:
    UserError: no video has any.
  """
  missing = sum(q.extra.get("subtitles") == "missing" for q in questions)
  if not missing:
    return []
  if missing == len(questions):
    found = [path for path in archives(root) if "subtitle" in path.name]
    how = f", with `{unpack_commands(found)}`" if found else ""
    raise UserError(
      f"--subtitles, and {root} has none for any of the {missing} questions;"
      f" unpack those of {benchmark.title} there ({benchmark.subtitles}){how},"
      " or leave --subtitles out"
    )
  return [
    f"{missing} of {len(questions)} questions are asked without subtitles:"
    " their videos have no subtitle file."
  ]
