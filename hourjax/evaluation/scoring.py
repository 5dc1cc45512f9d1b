"""Scores: which answers are right, and accuracies with their intervals."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hourjax.evaluation.parsing import normalise, parse, right_answers
from hourjax.evaluation.questions import Question

_Z = 1.959964  # two-sided 95 % of a normal distribution


@dataclasses.dataclass(frozen=True)
class Scored:
  """Holds one answered question.

  Attributes:
    question: the question as it was asked.
    answer: text that the model answered.
    parsed: what the parser reads in it; None if it can read nothing.
    correct: whether that is right; an answer that cannot be read is wrong.
    finished: whether the answer ended by itself.
    seconds: time that it took, including its part of reading the video.
  """

  question: Question
  answer: str
  parsed: str | None
  correct: bool
  finished: bool
  seconds: float


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Holds the fraction of right answers in a group; NaN in an empty group.

  Attributes:
    accuracy: right answers divided by `count`.
    low: lower end of the 95 % interval (see `wilson`).
    high: upper end of the interval.
    chance: expected accuracy of guessing, the mean of the questions' chances.
    count: number of questions.
    unreadable: answers in which nothing could be read; they count as wrong.
  """

  accuracy: float
  low: float
  high: float
  chance: float
  count: int
  unreadable: int


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Holds the comparison of two runs on the same questions.

  Attributes:
    count: questions that both answered.
    only_ours: questions that the first run alone has right.
    only_theirs: questions that the second run alone has right.
    difference: the first run's accuracy minus the second's.
    low: lower end of the 95 % interval of the difference.
    high: upper end of the interval.
  """

  count: int
  only_ours: int
  only_theirs: int
  difference: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """Holds a question that could not be asked; it is not in the score.

  Attributes:
    id: id of the question, or its place in the annotation file.
    video: its video, or the annotation file if the row names none.
    reason: why it could not be asked.
  """

  id: str
  video: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Run:
  """Holds one model's answers to a benchmark.

  Attributes:
    about: what the answers depend on; the content of run.json.
    scored: answered questions, in the benchmark's order.
    left_out: the other questions, in the same order.
  """

  about: Mapping[str, Any]
  scored: tuple[Scored, ...]
  left_out: tuple[LeftOut, ...]


def score(question: Question, row: Mapping[str, Any]) -> Scored:
  """Parses and scores one answer.

  Args:
    question: the question that was asked.
    row: record of the answer. Only the text, its end and its time are used;
      the text is parsed and scored again.
  """
  parsed = parse(row["answer"], question)
  return Scored(
    question=question,
    answer=row["answer"],
    parsed=parsed,
    correct=is_right(parsed, question),
    finished=bool(row.get("finished", True)),
    seconds=float(row.get("seconds", 0.0)),
  )


def is_right(parsed: str | None, question: Question) -> bool:
  """Returns whether a parsed answer is the expected one.

  Free text is compared word by word. Where two options have the text of the
  right one, each of their letters is right.

  Args:
    parsed: what `parse` returned.
    question: the question that was asked.
  """
  if question.kind == "open":
    return parsed == normalise(question.expected)
  return parsed is not None and parsed in right_answers(question)


def accuracy(scored: Sequence[Scored]) -> Accuracy:
  """Computes the accuracy of a group, its interval, and the mean chance.

  Args:
    scored: answered questions of the group.
  """
  count = len(scored)
  nan = float("nan")
  if not count:
    return Accuracy(nan, nan, nan, nan, 0, 0)
  right = sum(item.correct for item in scored)
  low, high = wilson(right, count)
  return Accuracy(
    accuracy=right / count,
    low=low,
    high=high,
    chance=sum(item.question.chance for item in scored) / count,
    count=count,
    unreadable=sum(item.parsed is None for item in scored),
  )


def wilson(right: int, count: int) -> tuple[float, float]:
  """Computes Wilson's 95 % interval of a fraction.

  It never leaves [0, 1], and is not empty where all or none are right: 4 of 4
  gives 0.51 to 1. There is no continuity correction. Questions are taken as
  independent, though those about one video are not quite independent.
  (E. B. Wilson, Probable inference, 1927.)

  Args:
    right: number of right answers.
    count: number of answers, at least 1.

  Returns:
    Lower and upper end.
  """
  # scipy.stats takes a second to import, which only a report needs.
  from scipy.stats import binomtest

  interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
  return float(interval.low), float(interval.high)


def group(
  scored: Iterable[Scored], names: Callable[[Scored], Iterable[str]]
) -> dict[str, Accuracy]:
  """Computes the accuracy of each group, in the order of `in_order`.

  Args:
    scored: answered questions.
    names: returns the groups of a question: none, one or several.
  """
  groups: dict[str, list[Scored]] = {}
  for item in scored:
    for name in names(item):
      groups.setdefault(name, []).append(item)
  return {name: accuracy(groups[name]) for name in in_order(groups)}


def in_order(names: Iterable[str]) -> list[str]:
  """Sorts names alphabetically, but lengths of videos from short to long.

  ["long", "10-20 min", "short", "8-15 s"]
      -> ["8-15 s", "10-20 min", "short", "long"]

  Args:
    names: the names in any order.
  """
  return sorted(names, key=_order)


_LENGTHS = ("short", "medium", "long")
_SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600}
_RANGE = re.compile(r"(\d+)(?: ?[-–] ?\d+)? ?(s|sec|min|h)\b")


def _order(name: str) -> tuple[int, int, str]:
  """Returns the key that puts ranges of time first, by their lower edge."""
  if name in _LENGTHS:
    return 1, _LENGTHS.index(name), name
  if match := _RANGE.search(name):
    return 0, int(match[1]) * _SECONDS[match[2]], name
  return 2, 0, name


def compare(ours: Iterable[Scored], theirs: Iterable[Scored]) -> Comparison:
  """Compares two runs on the questions that both answered.

  The interval is Wald's for paired proportions, with half a question added to
  each of the four cells (Agresti and Min, 2005). It is narrower than the two
  runs' own intervals suggest, because both runs tend to fail at the same
  questions.

  Args:
    ours: answers of the first run.
    theirs: answers of the second run.
  """
  others = {item.question.id: item.correct for item in theirs}
  pairs = [
    (item.correct, others[item.question.id])
    for item in ours
    if item.question.id in others
  ]
  first, second = pairs.count((True, False)), pairs.count((False, True))
  count = len(pairs) + 2
  # Half a question in each of the four cells adds two to the count and one to
  # the questions that one run alone has right; their difference stays.
  difference = (first - second) / count
  discordant = (first + second + 1) / count
  reach = _Z * math.sqrt((discordant - difference**2) / count)
  return Comparison(
    count=len(pairs),
    only_ours=first,
    only_theirs=second,
    difference=(first - second) / max(len(pairs), 1),
    low=max(-1.0, difference - reach),
    high=min(1.0, difference + reach),
  )
