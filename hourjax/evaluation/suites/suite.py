"""What a benchmark is to the evaluation: its rules, stated in one place."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from hourjax.evaluation.questions import Question
from hourjax.evaluation.suites.folder import Videos

# Hour-LLaVA reads the videos of all benchmarks alike.
FRAMES = "one frame a second, all of them in memory"


@dataclasses.dataclass(frozen=True)
class Source:
  """What a reader makes questions from.

  Attributes:
    file: annotation file.
    rows: of the file, each a dict of its columns.
    root: folder of the whole benchmark.
    videos: names of the videos there are.
    subtitles: whether questions are asked with subtitles.
  """

  file: pathlib.Path
  rows: list[dict[str, Any]]
  root: pathlib.Path
  videos: Videos
  subtitles: bool


@dataclasses.dataclass(frozen=True)
class Suite:
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
    read: makes the questions of one file.
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
  read: Callable[[Source], list[Question]]
  prompts: Mapping[str, str]
  videos: tuple[str, ...]
  subtitles: str = ""
  frames: str = FRAMES
  max_tokens: int = 16
  shape: Callable[[dict[str, Any]], bool] = lambda row: False

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

  def knows(self, row: dict[str, Any]) -> bool:
    """Whether a row of a file has this benchmark's columns."""
    return self.shape(row) or any(names <= row.keys() for names in self.columns)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A benchmark as it lies on disk.

  Attributes:
    suite: its rules.
    questions: in the order of its files; ids are unique.
    videos: folder that `Question.video` is relative to.
    notes: what a report must tell of how it was asked, a sentence each.
  """

  suite: Suite
  questions: tuple[Question, ...]
  videos: pathlib.Path
  notes: tuple[str, ...] = ()
