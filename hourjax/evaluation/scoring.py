"""Scores of answers: exact for options and short open answers."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hourjax.data.records import Record

DURATIONS = (5, 10, 20, 30, 60)  # upper edges of the bins, minutes


@dataclasses.dataclass(frozen=True)
class Scored:
  """One answered question.

  Attributes:
    id: of the record.
    task, topic, form: of the question; form is "open" or "multiple_choice".
    needle: shown for a second or two only.
    hidden: whether forgetting drops every frame that shows the needle.
    minutes: length of the video.
    chance: probability that a guess is right.
    answer: what the model said.
    expected: what is right.
    correct: whether they agree.
  """

  id: str
  task: str
  topic: str
  form: str
  needle: bool
  hidden: bool
  minutes: float
  chance: float
  answer: str
  expected: str
  correct: bool


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Share of right answers in a group, with what guessing would reach."""

  accuracy: float
  chance: float
  count: int


def score(
  records: Sequence[Record], answers: Mapping[str, str]
) -> list[Scored]:
  """Scores records with one question each; unanswered ones are left out."""
  scored = []
  for record in records:
    if record.id not in answers:
      continue
    question = _question(record)
    multiple = question.get("letter") is not None
    expected = question["letter"] if multiple else question["answer"]
    answer = answers[record.id]
    said = parse_letter(answer) if multiple else normalise(answer)
    right = expected if multiple else normalise(expected)
    scored.append(
      Scored(
        id=record.id,
        task=question["task"],
        topic=question["topic"],
        form=question["format"],
        needle=bool(question.get("needle")),
        hidden=bool(question.get("dropped")),
        minutes=float(record.extra.get("duration", 0)) / 60,
        chance=float(question["chance"]),
        answer=answer,
        expected=expected,
        correct=said == right,
      )
    )
  return scored


def parse_letter(answer: str) -> str | None:
  """The option letter of an answer: "B", "B.", "(B) red" and "b" give B.

  A word that merely begins with such a letter ("Blue") is no option.
  """
  match = re.match(r"\s*\(?([A-Ha-h])(?![A-Za-z])", answer)
  return match.group(1).upper() if match else None


def normalise(answer: str) -> str:
  """Lower case, single spaces, no closing punctuation."""
  return " ".join(answer.lower().split()).rstrip(".!")


def group(
  scored: Iterable[Scored], key: Callable[[Scored], str]
) -> dict[str, Accuracy]:
  """Accuracies by key, sorted by it."""
  groups: dict[str, list[Scored]] = {}
  for item in scored:
    groups.setdefault(key(item), []).append(item)
  return {name: accuracy(groups[name]) for name in sorted(groups)}


def accuracy(scored: Sequence[Scored]) -> Accuracy:
  """Mean correctness and mean chance; NaN for an empty group."""
  count = len(scored)
  if not count:
    return Accuracy(float("nan"), float("nan"), 0)
  right = sum(item.correct for item in scored) / count
  chance = sum(item.chance for item in scored) / count
  return Accuracy(right, chance, count)


def duration_bin(item: Scored) -> str:
  """Name of the bin of a video's length, e.g. "10-20 min"."""
  lower = 0
  for upper in DURATIONS:
    if item.minutes <= upper:
      return f"{lower:02d}-{upper:02d} min"
    lower = upper
  return f"over {lower} min"


def _question(record: Record) -> dict[str, Any]:
  return record.extra["questions"][0]
