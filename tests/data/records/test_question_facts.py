"""Facts about the questions of a record, and answers that are letters."""

import pytest

from hourjax.data.records.questions import letter_answers, question_facts
from hourjax.data.records.record import parse_record


def _record(*pairs, **fields):
  talk = [
    {"from": who, "value": text}
    for pair in pairs
    for who, text in zip(("human", "gpt"), pair)
  ]
  return parse_record({"id": "x", "conversations": talk, **fields}, "test")


OPTIONS = "Who?\nA. a cat\nB. a dog\nC. a hen\nAnswer with the letter."


@pytest.mark.parametrize(
  ("question", "answer", "expected"),
  [
    (OPTIONS, "B", True),
    (OPTIONS, "B.", True),
    (OPTIONS, "B. a dog", True),
    (OPTIONS, "C) a hen", True),
    (OPTIONS, "B\nIt barks.", True),
    (OPTIONS, "A", True),
    ("Who? (A) a cat (B) a dog", "B", True),
    ("Who? A: a cat B: a dog", "A", True),
    # An article, and a word.
    (OPTIONS, "A dog barks.", False),
    (OPTIONS, "Bees", False),
    # Its first token is the same for all letters.
    (OPTIONS, "(B)", False),
    # No option has this letter, or there are no options.
    (OPTIONS, "D", False),
    ("Which letter is on the sign?", "B", False),
    ("Is it B. or not?", "B", False),
    (OPTIONS, "yes", False),
    (OPTIONS, "", False),
  ],
)
def test_answers_that_begin_with_a_letter(question, answer, expected):
  record = _record((question, answer), ("So?", "Yes"))
  assert letter_answers(record.turns) == [expected, False]


def test_the_question_before_an_answer_counts():
  record = _record(("So?", "B"), (OPTIONS, "B"), ("And?", "A"))
  assert letter_answers(record.turns) == [False, True, False]


def test_facts_of_each_question_or_of_all():
  pairs = [("Who?", "Ann"), ("When?", "Now")]
  each = [{"topic": "object", "task": "t", "format": "open"}, {"topic": 5}]
  found = question_facts(_record(*pairs, questions=each))
  assert found == [("object", "t", "open"), ("", "", "")]
  found = question_facts(_record(*pairs, topic="action", questions=each[:1]))
  assert found == [("action", "", "")] * 2
  assert question_facts(_record(*pairs)) == [("", "", "")] * 2
