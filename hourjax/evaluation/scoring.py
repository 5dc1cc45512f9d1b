"""Scores: which answers are right, and what share with which certainty."""

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
  """One answered question.

  Attributes:
    question: as it was asked.
    answer: what the model said.
    parsed: what is read in it (`parsing`); None if nothing can be.
    correct: whether that is right; what cannot be read is wrong.
    finished: whether the answer ended by itself.
    seconds: that it took, its share of reading the video included.
  """

  question: Question
  answer: str
  parsed: str | None
  correct: bool
  finished: bool
  seconds: float


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Share of right answers in a group; NaN where it is empty.

  Attributes:
    accuracy: right answers of `count`.
    low, high: ends of the 95 % interval (`wilson`).
    chance: what guessing would reach, the mean of the questions' chances.
    count: of questions.
    unreadable: answers of which nothing could be read, counted as wrong.
  """

  accuracy: float
  low: float
  high: float
  chance: float
  count: int
  unreadable: int


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two runs on the same questions.

  Attributes:
    count: of questions that both answered.
    only_ours, only_theirs: questions that one alone has right.
    difference: of the accuracies, ours less theirs.
    low, high: ends of its 95 % interval.
  """

  count: int
  only_ours: int
  only_theirs: int
  difference: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """A question that could not be asked, and why; it is not in the score."""

  id: str
  video: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Run:
  """One model's answers to a benchmark.

  Attributes:
    about: what the answers depend on (`run.json`).
    scored: answered questions, in the benchmark's order.
    left_out: the others, in the same order.
  """

  about: Mapping[str, Any]
  scored: tuple[Scored, ...]
  left_out: tuple[LeftOut, ...]


def score(question: Question, row: Mapping[str, Any]) -> Scored:
  """Reads and judges one raw answer.

  Args:
    question: that was asked.
    row: its record; only what the model said and how it ended counts, parsed
      and judged anew.
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
  """Whether a parsed answer is the expected one; free text word by word.

  Where the right option's text stands twice among the options, each of its
  letters is right.
  """
  if question.kind == "open":
    return parsed == normalise(question.expected)
  return parsed is not None and parsed in right_answers(question)


def accuracy(scored: Sequence[Scored]) -> Accuracy:
  """Accuracy of a group, its interval, and the mean chance."""
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
  """Wilson's 95 % interval of a share, without continuity correction.

  Unlike the usual one it never leaves [0, 1] and does not shrink to a point
  where all or none are right: 4 of 4 gives 0.51 to 1. Questions are taken as
  independent, though those about one video are not quite. (E. B. Wilson,
  Probable inference, 1927.)
  """
  share, square = right / count, _Z * _Z
  whole = 1 + square / count
  middle = (share + square / (2 * count)) / whole
  spread = share * (1 - share) / count + square / (4 * count * count)
  reach = _Z * math.sqrt(spread) / whole
  return max(0.0, middle - reach), min(1.0, middle + reach)


def group(
  scored: Iterable[Scored], names: Callable[[Scored], Iterable[str]]
) -> dict[str, Accuracy]:
  """Accuracies of groups in natural order.

  "5-10 min" comes before "10-20 min", and "short" before "long".

  Args:
    scored: answered questions.
    names: gives the groups that one counts in: none, one or several.
  """
  groups: dict[str, list[Scored]] = {}
  for item in scored:
    for name in names(item):
      groups.setdefault(name, []).append(item)
  return {name: accuracy(groups[name]) for name in in_order(groups)}


def in_order(names: Iterable[str]) -> list[str]:
  """Names from A to Z, but lengths of videos from short to long.

  ["long", "10-20 min", "short", "8-15 s"]
      -> ["8-15 s", "10-20 min", "short", "long"]
  """
  return sorted(names, key=_order)


_LENGTHS = ("short", "medium", "long")
_SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600}
_RANGE = re.compile(r"(\d+)(?: ?[-–] ?\d+)? ?(s|sec|min|h)\b")


def _order(name: str) -> tuple[int, int, str]:
  if name in _LENGTHS:
    return 1, _LENGTHS.index(name), name
  if found := _RANGE.search(name):
    return 0, int(found[1]) * _SECONDS[found[2]], name
  return 2, 0, name


def compare(ours: Iterable[Scored], theirs: Iterable[Scored]) -> Comparison:
  """Sets two runs against each other on the questions that both answered.

  The interval is Wald's for paired shares with half a question added to each
  of the four cells (Agresti and Min, 2005). It is narrower than the two runs'
  own intervals suggest, as both found the same questions hard.
  """
  others = {item.question.id: item.correct for item in theirs}
  pairs = [
    (item.correct, others[item.question.id])
    for item in ours
    if item.question.id in others
  ]
  first, second = pairs.count((True, False)), pairs.count((False, True))
  count = len(pairs) + 2
  difference = (first - second) / count
  changed = (first + second + 1) / count
  reach = _Z * math.sqrt((changed - difference**2) / count)
  return Comparison(
    count=len(pairs),
    only_ours=first,
    only_theirs=second,
    difference=(first - second) / max(len(pairs), 1),
    low=max(-1.0, difference - reach),
    high=min(1.0, difference + reach),
  )
