"""What a benchmark is to the evaluation: its rules, stated in one place."""

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
  """What a reader makes questions from.

  Attributes:
    file: annotation file.
    rows: of the file, each a dict of its columns; a UserError tells of one
      that is none.
    root: folder of the whole benchmark.
    videos: names of the videos there are.
    subtitles: whether questions are asked with subtitles.
  """

  file: pathlib.Path
  rows: Sequence[Row | UserError]
  root: pathlib.Path
  videos: Videos
  subtitles: bool

  def each(
    self,
    make: Callable[[Row], Question],
    rows: Iterable[Row | UserError] | None = None,
  ) -> list[Question | LeftOut]:
    """Makes a question of each row; one that cannot be asked is left out.

    Args:
      make: raises a UserError that says why a row cannot be asked.
      rows: those of the file, if not as it has them.
    """
    made: list[Question | LeftOut] = []
    for number, row in enumerate(self.rows if rows is None else rows, start=1):
      try:
        if isinstance(row, UserError):
          raise row
        made.append(make(row))
      except UserError as error:
        place = f"{self.file.name}, row {number}"
        made.append(LeftOut(place, _video(row, self.file.name), str(error)))
    return made


def _video(row: Row | UserError, file: str) -> str:
  """The video of a row that cannot be asked; its file if it tells none."""
  names = ("video", "videoID", "video_path", "video_name", "video_id", "key")
  told = row if isinstance(row, dict) else {}
  return next((str(told[name]) for name in names if told.get(name)), file)


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One benchmark's rules.

  Attributes:
    name: by which it is chosen.
    title: its own name.
    revision: raised whenever code changes what is asked; changes of the texts
      below change `version` by themselves.
    annotations: where its files lie below its folder, by layout: patterns
      with spaces between. The first layout of which there is any file counts.
    columns: names that its rows have, by layout: a row with all names of one
      of the sets is this benchmark's.
    shape: tells its rows where they have no columns.
    read: makes the questions of one file, and says which rows give none.
    prompts: wording by kind of question; readers fill it in.
    videos: folders that its videos may lie in, below its own.
    subtitles: rule by which subtitles get into the prompt; "" if it has none.
    frames: rule by which frames are taken.
    max_tokens: of an answer.
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
    """Everything that two runs must share for their answers to compare."""
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
    """Revision and a digest of all rules: "1-3fa94c02".

    The parser has a version of its own (`parsing.PARSER_VERSION`), as it can
    read old answers anew.
    """
    text = json.dumps(self.rules, sort_keys=True)
    return f"{self.revision}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

  def knows(self, row: Row) -> bool:
    """Whether a row of a file has this benchmark's columns.

    A column for each option stands for one of all.
    """
    names = set(row)
    if fields.has_options(row):
      names |= {"options", "candidates"}
    return self.shape(row) or any(wanted <= names for wanted in self.columns)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A benchmark as it lies on disk.

  Attributes:
    benchmark: its rules.
    questions: in the order of its files; ids are unique.
    videos: folder that `Question.video` is relative to.
    notes: what a report must tell of how it was asked, a sentence each.
    left_out: rows of its files that cannot be asked.
  """

  benchmark: Benchmark
  questions: tuple[Question, ...]
  videos: pathlib.Path
  notes: tuple[str, ...] = ()
  left_out: tuple[LeftOut, ...] = ()
