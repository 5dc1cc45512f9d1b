"""A question of a benchmark, as readers make it and as runs ask it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["choice", "yes_no", "match", "open"]


@dataclasses.dataclass(frozen=True)
class Question:
  """Holds one question about one video.

  Attributes:
    id: name that is unique in its benchmark.
    video: file name, relative to the benchmark's folder of videos.
    prompt: text that follows the sentence on the video's length, including
      subtitles and options.
    expected: right answer: an option's letter; "yes" or "no"; for "match" the
      number of the option; else the words of the answer. It is "" if no option
      is right; then every answer is wrong.
    kind: how an answer is parsed; see `parsing`.
    options: texts of the options in order; () if there are none.
    tasks: what the question is about, in the benchmark's own words; it counts
      in each of them.
    duration: group of the video's length, in the benchmark's own words
      ("short") or as a range ("5-10 min").
    chance: probability that a guess is right; 0 for free text.
    extra: further fields; a report groups by those that are texts.
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
