"""A question of a benchmark: what readers make and what runs and scores it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["choice", "yes_no", "match", "open"]


@dataclasses.dataclass(frozen=True)
class Question:
  """One question about one video.

  Attributes:
    id: unique in its benchmark.
    video: file name, relative to the benchmark's folder of videos.
    prompt: all that the model is told after the sentence on the video's
      length, subtitles and options included.
    expected: what is right: an option's letter; "yes" or "no"; for "match"
      the number of the option; else the words of the answer. "" if none of the
      options is: whatever is answered is wrong.
    kind: how an answer is read (`parsing`).
    options: texts of the options in order; () where there are none.
    tasks: what the question is about, in the benchmark's own words; it counts
      in each of them.
    duration: group of the video's length, in the benchmark's own words
      ("short") or as a range ("05-10 min").
    chance: probability that a guess is right; 0 for free text.
    extra: whatever else a benchmark's report tells apart.
  """

  id: str
  video: str
  prompt: str
  expected: str
  kind: Kind
  options: tuple[str, ...] = ()
  tasks: tuple[str, ...] = ()
  duration: str = ""
  chance: float = 0.0
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
