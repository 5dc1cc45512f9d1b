"""Shares, their intervals, and what counts as right."""

import math

import pytest

from hourjax.evaluation.scoring import (
  accuracy,
  compare,
  group,
  in_order,
  is_right,
  score,
  wilson,
)
from tests.evaluation.fakes import question


def _scored(number=1, answer="B", **changes):
  return score(question(number, **changes), {"answer": answer})


def test_score():
  right = score(
    question(1), {"answer": "(B)", "finished": False, "seconds": 2.5}
  )
  assert right.correct and right.parsed == "B" and right.answer == "(B)"
  assert not right.finished and right.seconds == 2.5
  wrong = _scored(answer="C")
  assert not wrong.correct and wrong.parsed == "C" and wrong.finished
  unreadable = _scored(answer="")
  assert not unreadable.correct and unreadable.parsed is None
  # What a record says of itself does not count.
  lie = score(question(1), {"answer": "C", "parsed": "B", "correct": True})
  assert not lie.correct


@pytest.mark.parametrize(
  ("options", "expected", "right"),
  [
    (("red", "blue", "red", "green"), "A", "AC"),
    (("red", "blue", "red", "green"), "B", "B"),
    (("red", "blue", "red ", " red"), "C", "ACD"),
    (("red", "Red", "RED", "green"), "A", "A"),
    (("", "", "", ""), "D", "D"),  # what says nothing is not the same answer
    (("red", "blue", "green", "white"), "", ""),  # no option is right
  ],
)
def test_an_answer_that_stands_twice(options, expected, right):
  scored = [
    _scored(answer=letter, options=options, expected=expected)
    for letter in "ABCD"
  ]
  assert "".join(s.parsed for s in scored if s.correct) == right


@pytest.mark.parametrize(
  ("kind", "parsed", "expected", "right"),
  [
    ("choice", "B", "B", True),
    ("choice", "A", "B", False),
    ("choice", None, "B", False),
    ("yes_no", "yes", "yes", True),
    ("match", "2", "2", True),
    # The words of an answer, as a file writes them.
    ("open", "the red boat", "The  red boat.", True),
    ("open", "red boat", "The red boat", False),
    ("open", None, "", False),
  ],
)
def test_is_right(kind, parsed, expected, right):
  item = question(1, kind=kind, expected=expected)
  assert is_right(parsed, item) is right


# As scipy's binomtest(...).proportion_ci(method="wilson") gives them.
@pytest.mark.parametrize(
  ("right", "count", "low", "high"),
  [
    (0, 10, 0.0, 0.2775),
    (4, 4, 0.5101, 1.0),
    (50, 100, 0.4038, 0.5962),
    (81, 263, 0.2553, 0.3662),
    (1, 1, 0.2065, 1.0),
  ],
)
def test_wilson(right, count, low, high):
  assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
  mirrored = wilson(count - right, count)
  assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_accuracy():
  items = [
    _scored(chance=0.5),
    _scored(answer="A"),
    _scored(answer="no idea"),
    _scored(),
  ]
  whole = accuracy(items)
  assert (whole.accuracy, whole.chance, whole.count) == (0.5, 0.3125, 4)
  assert (whole.low, whole.high) == wilson(2, 4)
  assert whole.unreadable == 1
  empty = accuracy([])
  assert math.isnan(empty.accuracy) and math.isnan(empty.low)
  assert empty.count == 0


def test_group():
  items = [
    _scored(tasks=("b",)),
    _scored(tasks=("a", "c"), answer="C"),
    _scored(tasks=("b", "c")),
    _scored(tasks=()),
  ]
  groups = group(iter(items), lambda item: item.question.tasks)
  assert list(groups) == ["a", "b", "c"]
  assert [g.accuracy for g in groups.values()] == [0, 1, 0.5]
  assert [g.count for g in groups.values()] == [1, 2, 2]


def test_lengths_come_from_short_to_long():
  names = ["order", "long", "over 60 min", "10-20 min", "short", "8-15 s"]
  names += ["3-10 min", "medium", "15-60 s", "30-60 min", "1-2 h"]
  assert in_order(names) == [
    "8-15 s",
    "15-60 s",
    "3-10 min",
    "10-20 min",
    "30-60 min",
    "1-2 h",
    "over 60 min",
    "short",
    "medium",
    "long",
    "order",
  ]


def _run(answers):
  return [_scored(4 * n + 1, answer) for n, answer in enumerate(answers)]


def test_compare():
  ours, theirs = _run("BBBBACB"), _run("BACAAB")
  found = compare(ours, theirs)  # the seventh has one answer only
  assert (found.count, found.only_ours, found.only_theirs) == (6, 3, 1)
  assert found.difference == pytest.approx(2 / 6)
  # By hand: d = 2/8, changed = 5/8, reach = 1.96 sqrt((5/8 - 1/16) / 8).
  assert found.low == pytest.approx(0.25 - 0.5197, abs=1e-4)
  assert found.high == pytest.approx(0.25 + 0.5197, abs=1e-4)
  same = compare(ours, ours)
  assert same.difference == 0 and same.low == -same.high < 0
  nothing = compare(ours, [])
  assert nothing.count == nothing.difference == 0 and nothing.low < -0.9
