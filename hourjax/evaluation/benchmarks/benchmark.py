"""What a benchmark consists of: its rules, and what its reader gets."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields
from hourjax.evaluation.benchmarks.folder import Videos
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut

Row = dict[str, Any]

# Hour-LLaVA reads the videos of all benchmarks alike.
FRAMES = (
  "128 uniform frames below 128 seconds, else one a second (of files every"
  " round(fps)-th); all of them in memory"
)


@dataclasses.dataclass(frozen=True)
class Source:
  """Holds what a reader makes questions from.

  Attributes:
    file: annotation file.
    rows: rows of the file, each a dict of its columns, or a UserError about a
      row that is none.
    root: folder of the benchmark.
    videos: names of the existing videos.
    subtitles: whether questions are asked with subtitles.
  """

  file: pathlib.Path
  rows: Sequence[Row | UserError]
  root: pathlib.Path
  videos: Videos
  subtitles: bool

  def make_each(
    self,
    make: Callable[[Row], Question],
    rows: Iterable[Row | UserError] | None = None,
  ) -> list[Question | LeftOut]:
    """Makes a question of each row, or a LeftOut if it cannot be asked.

    Args:
      make: makes a question of a row; raises a UserError if it cannot be asked.
      rows: rows to read, if not the file's own.
    """
    items: list[Question | LeftOut] = []
    for number, row in enumerate(self.rows if rows is None else rows, start=1):
      try:
        if isinstance(row, UserError):
          raise row
        items.append(make(row))
      except UserError as error:
        place = f"{self.file.name}, row {number}"
        video = _video(row, self.file.name)
        items.append(LeftOut(place, video, str(error)))
    return items


def _video(row: Row | UserError, file: str) -> str:
  """Returns the video of a row that cannot be asked; else its file."""
  names = ("video", "videoID", "video_path", "video_name", "video_id", "key")
  fields = row if isinstance(row, dict) else {}
  return next((str(fields[name]) for name in names if fields.get(name)), file)


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Describes one benchmark by its rules.

  Attributes:
    name: name by which it is chosen.
    title: its authors' name for it.
    revision: number that is raised whenever code changes what is asked. Changes
      of the texts below change `version` by themselves.
    annotations: where its files lie below its folder, by layout: patterns
      separated by spaces. The first layout that has a file counts.
    columns: names of its columns, by layout. A row that has all names of one of
      the sets is this benchmark's.
    read: makes the questions of one file, or LeftOut for rows that give none.
    prompts: prompt templates by kind of question, which the reader fills in.
    videos: folders below its own in which its videos may lie.
    subtitles: rule by which subtitles get into the prompt; "" if it has none.
    frames: rule by which frames are taken.
    max_tokens: most tokens of an answer.
    shape: returns whether a row without columns is this benchmark's.
  """

  name: str
  title: str
  revision: int
  annotations: tuple[str, ...]
  columns: tuple[frozenset[str], ...]
  read: Callable[[Source], list[Question | LeftOut]]
  prompts: Mapping[str, str]
  videos: tuple[str, ...]
  subtitles: str = ""
  frames: str = FRAMES
  max_tokens: int = 16
  shape: Callable[[Row], bool] = lambda row: False

  @property
  def rules(self) -> dict[str, Any]:
    """Returns everything that two runs must share to be comparable."""
    return {
      "benchmark": self.name,
      "revision": self.revision,
      "prompts": dict(self.prompts),
      "subtitles": self.subtitles,
      "frames": self.frames,
      "max_tokens": self.max_tokens,
    }

  @property
  def version(self) -> str:
    """Returns revision and a hash of all rules: "1-3fa94c02".

    The parser has a version of its own (`parsing.PARSER_VERSION`), because old
    answers can be parsed again.
    """
    text = json.dumps(self.rules, sort_keys=True)
    return f"{self.revision}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

  def knows(self, row: Row) -> bool:
    """Returns whether a row has this benchmark's columns.

    Options in a column each count as a column of options.

    Args:
      row: row of an annotation file.
    """
    names = set(row)
    if fields.has_options(row):
      names |= {"options", "candidates"}
    return self.shape(row) or any(wanted <= names for wanted in self.columns)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Holds a benchmark as it was read from disk.

  Attributes:
    benchmark: its rules.
    questions: questions in the order of its files; ids are unique.
    videos: folder that `Question.video` is relative to.
    notes: sentences that a report must contain on how it was asked.
    left_out: rows of its files that cannot be asked.
  """

  benchmark: Benchmark
  questions: tuple[Question, ...]
  videos: pathlib.Path
  notes: tuple[str, ...] = ()
  left_out: tuple[LeftOut, ...] = ()
