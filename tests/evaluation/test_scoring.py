import math

import pytest

from hourjax.data.records import Record, Turn
from hourjax.evaluation.scoring import (
  Scored,
  accuracy,
  duration_bin,
  group,
  normalise,
  parse_letter,
  score,
)


def _scored(**values):
  given = {
    "id": "x",
    "task": "order",
    "topic": "time",
    "form": "open",
    "needle": False,
    "hidden": False,
    "minutes": 3.0,
    "chance": 0.25,
    "answer": "red",
    "expected": "red",
    "correct": True,
  }
  return Scored(**{**given, **values})


def _record(name, **facts):
  question = {
    "task": "order",
    "topic": "time",
    "format": "open",
    "answer": "red",
    "letter": None,
    "needle": False,
    "dropped": None,
    "chance": 0.5,
    **facts,
  }
  turns = (Turn("human", "Why?"), Turn("gpt", "red"))
  extra = {"questions": [question], "duration": 90.0}
  return Record(name, "text", (), turns, "", extra)


@pytest.mark.parametrize(
  ("answer", "letter"),
  [
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("B. red", "B"),
    ("(B) red", "B"),
    (" \n B", "B"),
    ("B) it", "B"),
    ("Blue", None),
    ("a boat", "A"),
    ("", None),
    ("the B", None),
    ("Z", None),
    ("7", None),
  ],
)
def test_parse_letter(answer, letter):
  assert parse_letter(answer) == letter


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("Red", "red"),
    ("  the  Red\nboat. ", "the red boat"),
    ("yes!", "yes"),
    ("3.5", "3.5"),
    ("", ""),
  ],
)
def test_normalise(answer, expected):
  assert normalise(answer) == expected


def test_score():
  records = [
    _record("open"),
    _record("wrong"),
    _record("letter", letter="C", format="multiple_choice", chance=0.25),
    _record("word", letter="C", format="multiple_choice", chance=0.25),
    _record("needle", needle=True, dropped=True),
    _record("unanswered"),
  ]
  answers = {
    "open": " Red.",
    "wrong": "reddish",
    "letter": "C. red",
    # The option's text is no letter.
    "word": "red",
    "needle": "red",
  }
  scored = {item.id: item for item in score(records, answers)}
  assert scored.keys() == answers.keys()
  right = {name for name, item in scored.items() if item.correct}
  assert right == {"open", "letter", "needle"}
  assert scored["letter"].expected == "C" and scored["letter"].chance == 0.25
  assert scored["needle"].needle and scored["needle"].hidden
  assert not scored["open"].needle and not scored["open"].hidden
  assert scored["open"].minutes == 1.5 and scored["open"].chance == 0.5


def test_accuracy_and_chance_are_means():
  items = [
    _scored(chance=0.5),
    _scored(chance=0.25, correct=False),
    _scored(chance=0.25, correct=False),
    _scored(chance=0.25),
  ]
  whole = accuracy(items)
  assert (whole.accuracy, whole.chance, whole.count) == (0.5, 0.3125, 4)
  empty = accuracy([])
  assert math.isnan(empty.accuracy) and math.isnan(empty.chance)
  assert empty.count == 0


def test_group():
  items = [
    _scored(task="b"),
    _scored(task="a", correct=False),
    _scored(task="b", correct=False),
  ]
  groups = group(iter(items), lambda item: item.task)
  assert list(groups) == ["a", "b"]
  assert [g.accuracy for g in groups.values()] == [0, 0.5]
  assert [g.count for g in groups.values()] == [1, 2]


@pytest.mark.parametrize(
  ("minutes", "name"),
  [
    (0.5, "00-05 min"),
    (5.0, "00-05 min"),
    (5.01, "05-10 min"),
    (10.0, "05-10 min"),
    (20.0, "10-20 min"),
    (30.0, "20-30 min"),
    (60.0, "30-60 min"),
    (61.0, "over 60 min"),
  ],
)
def test_duration_bins(minutes, name):
  assert duration_bin(_scored(minutes=minutes)) == name
