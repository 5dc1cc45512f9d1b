"""Benchmarks: from their published annotation files to questions.

One file a benchmark states its layouts, prompt, subtitle rule and everything
else that its score depends on; `BENCHMARKS` lists them.

  loaded = benchmarks.read("videomme", "downloads/Video-MME", subtitles=True)
  loaded.questions, loaded.videos, loaded.benchmark.version
"""

import os
import pathlib
from collections.abc import Iterable, Sequence

from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import folder as packed
from hourjax.evaluation.benchmarks import (
  longvideobench,
  lvbench,
  mlvu,
  records,
  tempcompass,
  videomme,
)
from hourjax.evaluation.benchmarks.benchmark import (
  Benchmark,
  Loaded,
  Row,
  Source,
)
from hourjax.evaluation.benchmarks.folder import (
  Videos,
  find_files,
  find_videos,
  read_table,
  youtube_keys,
)
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut
from hourjax.extraction.video_list import walk_videos

BENCHMARKS: dict[str, Benchmark] = {
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
    name: key of BENCHMARKS.
    data: the benchmark's folder, or one annotation file of it.
    subtitles: ask with subtitles, where a benchmark has them.
    videos: folder of the videos, if it is none of those that the benchmark
      has them in.
    stored: names of videos with stored features; if given, a question's video
      is one of them where it can be, and no folder is listed.

  Raises:
    UserError: no such benchmark, no annotation files, those of another
      benchmark or damaged ones, no question that can be asked, or videos or
      subtitles that are still packed.
  """
  benchmark = _suite(name, subtitles)
  root, files, notes = _files(benchmark, pathlib.Path(data))
  folder = (
    pathlib.Path(videos) if videos else find_videos(root, benchmark.videos)
  )
  names = list(walk_videos(folder) if stored is None else stored)
  there = Videos(names, youtube_keys(folder, names))
  made: list[Question | LeftOut] = []
  for path in files:
    rows = read_table(path)
    _check_rows(benchmark, path, rows)
    made += benchmark.read(Source(path, rows, root, there, subtitles))
  questions, left_out = _unique(made, benchmark)
  if not questions:
    raise UserError(_none_asked(left_out, benchmark))
  if stored is None:
    lie = {root, folder}
    notes += _packed(questions, benchmark, there, lie, subtitles)
  notes += _without_subtitles(questions, benchmark, root)
  notes += _told(questions, left_out)
  return Loaded(
    benchmark, tuple(questions), folder, tuple(notes), tuple(left_out)
  )


def _suite(name: str, subtitles: bool) -> Benchmark:
  if name not in BENCHMARKS:
    raise UserError(
      f"no benchmark {name!r}; choose one of {', '.join(sorted(BENCHMARKS))}"
    )
  benchmark = BENCHMARKS[name]
  if subtitles and not benchmark.subtitles:
    having = [other.name for other in BENCHMARKS.values() if other.subtitles]
    raise UserError(
      f"{benchmark.title} has no subtitles, only {' and '.join(having)} have; leave"
      " --subtitles out"
    )
  return benchmark


def _files(benchmark: Benchmark, data: pathlib.Path):
  """The benchmark's folder, its annotation files, and notes on lacking ones."""
  if data.is_file():
    return _root(benchmark, data), [data], []
  if not data.is_dir():
    raise UserError(f"{data} does not exist; correct --data")
  files, lacking = find_files(data, benchmark.annotations)
  if not files:
    raise UserError(_nothing(benchmark, data))
  if lacking:
    shown = ", ".join(lacking)
    return data, files, [f"Not asked, as the file is missing: {shown}."]
  return data, files, []


def _root(benchmark: Benchmark, file: pathlib.Path) -> pathlib.Path:
  """The folder below which a file lies as published; else its own folder."""
  for layout in benchmark.annotations:
    for pattern in layout.split():
      for root in file.parents[:3]:
        if file in root.glob(pattern):
          return root
  return file.parent


def _nothing(benchmark: Benchmark, data: pathlib.Path) -> str:
  """What to say of a folder without the benchmark's annotation files."""
  for other in BENCHMARKS.values():
    for path in find_files(data, other.annotations)[0][:1]:
      try:
        known = _known(other, read_table(path))
      except UserError:
        continue
      if known:
        return _another(benchmark, other, path)
  there = sorted(path.name for path in data.iterdir())
  more = f" and {len(there) - 12} more" if len(there) > 12 else ""
  return (
    f"{data} has no annotation files of {benchmark.title}: looked for"
    f" {', or '.join(benchmark.annotations)}, and it holds"
    f" {', '.join(there[:12]) or 'nothing'}{more}; correct --data"
  )


def _another(benchmark: Benchmark, other: Benchmark, path: pathlib.Path) -> str:
  return (
    f"{path} looks like {other.title}, not like {benchmark.title}; use"
    f" --benchmark={other.name}, or correct --data"
  )


def _known(benchmark: Benchmark, rows: Sequence[Row | UserError]) -> bool:
  """Whether one of the first rows is the benchmark's; the first may be bad."""
  return any(
    isinstance(row, dict) and benchmark.knows(row) for row in rows[:20]
  )


def _check_rows(
  benchmark: Benchmark, path: pathlib.Path, rows: Sequence[Row | UserError]
) -> None:
  if _known(benchmark, rows):
    return
  for other in BENCHMARKS.values():
    if _known(other, rows):
      raise UserError(_another(benchmark, other, path))
  row = next(row for row in rows if isinstance(row, dict))
  wanted = " or ".join(", ".join(sorted(names)) for names in benchmark.columns)
  raise UserError(
    f"{path} is no file of {benchmark.title}: its columns are"
    f" {', '.join(map(str, list(row)[:12]))}, expected {wanted}; correct --data"
  )


def _unique(
  made: Sequence[Question | LeftOut], benchmark: Benchmark
) -> tuple[list[Question], list[LeftOut]]:
  """The questions with an id of their own, and what is left out.

  Raises:
    UserError: half of them share ids, as where a file is there twice.
  """
  questions: dict[str, Question] = {}
  left_out = []
  copies = []
  for item in made:
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
      f"{len(copies)} ids of {benchmark.title} belong to several questions, such as"
      f" {copies[0].id!r}; keep one copy of each"
    )
  return list(questions.values()), left_out + copies


def _none_asked(left_out: Sequence[LeftOut], benchmark: Benchmark) -> str:
  if len(left_out) == 1:
    return left_out[0].reason
  return (
    f"none of the {len(left_out)} rows of {benchmark.title} can be asked; the"
    f" first: {left_out[0].reason}"
  )


def _told(
  questions: Sequence[Question], left_out: Sequence[LeftOut]
) -> list[str]:
  """Sentences on rows as they should not have been published."""
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


def _packed(
  questions: Sequence[Question],
  benchmark: Benchmark,
  videos: Videos,
  folders: set[pathlib.Path],
  subtitles: bool,
) -> list[str]:
  """A note on videos that may be in archives.

  Raises:
    UserError: none of the videos is there, but archives are.
  """
  asked = {item.video for item in questions}
  missing = sorted(name for name in asked if not videos.has(name))
  if not missing:
    return []
  found = [
    path
    for path in packed.archives(*folders)
    if (subtitles or "subtitle" not in path.name)
    and packed.may_hold(path, missing)
  ]
  if not found:
    return []
  shown = ", ".join(path.name for path in found[:3])
  more = f" and {len(found) - 3} more" if len(found) > 3 else ""
  told = (
    f"{len(missing)} of the {len(asked)} videos of {benchmark.title} are not there;"
    f" {shown}{more} {'lies' if len(found) == 1 else 'lie'} there packed;"
    f" unpack with `{packed.commands(found)}`"
  )
  if len(missing) == len(asked):
    raise UserError(told)
  return [f"{told}."]


def _without_subtitles(
  questions: list[Question], benchmark: Benchmark, root: pathlib.Path
) -> list[str]:
  missing = sum(q.extra.get("subtitles") == "missing" for q in questions)
  if not missing:
    return []
  if missing == len(questions):
    found = [p for p in packed.archives(root) if "subtitle" in p.name]
    how = f", with `{packed.commands(found)}`" if found else ""
    raise UserError(
      f"--subtitles, and {root} has none for any of the {missing} questions;"
      f" unpack those of {benchmark.title} there ({benchmark.subtitles}){how}, or leave"
      " --subtitles out"
    )
  return [
    f"{missing} of {len(questions)} questions are asked without subtitles:"
    " their videos have no subtitle file."
  ]
