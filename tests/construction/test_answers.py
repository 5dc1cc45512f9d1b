"""Reading what models write."""

import contextlib
import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.construction import answers
from hourjax.construction.answers import Unusable
from hourjax.construction.tasks import ASPECTS

CAPTION = {name: f"This is the {name} of it." for name in ASPECTS}
TEXT = json.dumps(CAPTION)
CHOICE = {
  "task": "t",
  "question": "Which one?",
  "options": ["a cat", "a dog", "a cow", "an owl"],
  "answer": "a dog",
}


@pytest.mark.parametrize(
  "text",
  [
    TEXT,
    f"  \n{TEXT}\n",
    f"```json\n{TEXT}\n```",
    f"```\n{TEXT}```",
    f"Here is the answer:\n\n```json\n{TEXT}\n```\nI hope that it helps!",
    f"Sure! {TEXT} Anything else?",
    f"<think>Is it {{}} or {{'a': 1}}?</think>\n{TEXT}",
    f"I think of {{many}} things.</think>{TEXT}",
    json.dumps(CAPTION | {"mood": "calm"}),
  ],
)
def test_an_answer_is_found(text):
  assert answers.read(answers.Caption, text).aspects() == CAPTION


@pytest.mark.parametrize(
  "text, cut, kind",
  [
    ("", False, "empty answer"),
    (" \n", True, "empty answer"),
    ("I cannot see any video.", False, "invalid JSON"),
    (TEXT[:-1], False, "invalid JSON"),
    (TEXT[:-9], True, "cut off"),
    (TEXT.replace('"', "'"), False, "invalid JSON"),
    ("[" * 10_000, False, "invalid JSON"),
    ('{"a":' * 10_000, False, "invalid JSON"),
    ("{}", False, "wrong schema"),
    ("[1, 2]", False, "wrong schema"),
    ("null {}", False, "wrong schema"),
    (json.dumps(CAPTION | {"scene": ""}), False, "wrong schema"),
    (json.dumps(CAPTION | {"scene": None}), False, "wrong schema"),
    (json.dumps(CAPTION | {"scene": ["a"]}), False, "wrong schema"),
    ("x" * 200_001, False, "too long"),
    (f"<think>I must answer as {TEXT}", True, "cut off"),
  ],
)
def test_what_is_no_answer(text, cut, kind):
  with pytest.raises(Unusable) as error:
    answers.read(answers.Caption, text, cut=cut)
  assert error.value.kind == kind and len(str(error.value)) < 400


@given(st.text() | st.recursive(
  st.none() | st.booleans() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
).map(json.dumps))  # fmt: skip
def test_anything_is_an_answer_or_unusable(text):
  for kind in (answers.Caption, answers.ChoiceQuestions, answers.Judgement):
    with contextlib.suppress(Unusable):
      answers.read(kind, text)


@pytest.mark.parametrize(
  "change, answer",
  [
    ({}, "a dog"),
    ({"answer": "B"}, "a dog"),
    ({"answer": "(b)"}, "a dog"),
    ({"answer": "B. a dog"}, None),
    ({"options": ["A. a cat", "B. a dog", "C. a cow", "D. an owl"]}, "a dog"),
    (
      {
        "options": ["A) a cat", "B) a dog", "C) a cow", "D) an owl"],
        "answer": "B) a dog",
      },
      "a dog",
    ),
    ({"options": dict(zip("ABCD", CHOICE["options"]))}, "a dog"),
    ({"answer": "a bird"}, None),
    ({"options": ["a cat", "a dog", "A cat.", "an owl"]}, None),
    ({"answer": "E"}, None),
    ({"options": ["a cat", "a dog"]}, None),
    ({"options": ["a cat", "a dog", "a cow", ""]}, None),
  ],
)
def test_options_and_letters(change, answer):
  text = json.dumps({"questions": [CHOICE | change]})
  if answer is None:
    with pytest.raises(Unusable):
      answers.read(answers.ChoiceQuestions, text)
    return
  (found,) = answers.read(answers.ChoiceQuestions, text).questions
  assert found.answer == answer and found.options == CHOICE["options"]


def test_times_of_events():
  events = [
    {"title": "two", "start": "1:15", "end": "90 s"},
    {"title": "one", "start": 0, "end": "60.5"},
    {"title": "Two", "start": 200, "end": 210},
    {"title": "end", "start": 90, "end": 303},
  ]
  read = answers.read(answers.Events, json.dumps(events)).events
  found = answers.check_events(read, 300.0)
  assert [(e.title, e.start, e.end) for e in found] == [
    ("one", 0, 60.5), ("two", 75, 90), ("end", 90, 300),
  ]  # fmt: skip
  for start, end in ((5, 5), (9, 4), (10, 306)):
    event = answers.Event(title="x", start=start, end=end)
    with pytest.raises(Unusable) as error:
      answers.check_events([event], 300.0)
    assert error.value.kind == "times" and f"{end}" in str(error.value)


def test_counts_of_questions():
  def check(names):
    answers.check_counts(
      [answers.OpenQuestion(task=n, question="q", answer="a") for n in names],
      {"one": 3, "two": 1},
    )

  check(["one", "two", "one", "one"])
  for names, words in (
    (["one"] * 3, "0 questions for two instead of 1"),
    (["one"] * 4 + ["two"], "4 questions for one instead of 3"),
    (["one"] * 3 + ["two", "x"], "1 questions for x, which is no task"),
  ):
    with pytest.raises(Unusable, match=words):
      check(names)


@pytest.mark.parametrize(
  "text",
  [
    "Un hombre camina por la calle con su perro negro y luego entra en una"
    " tienda para comprar pan y leche fresca.",
    "Der Mann geht mit seinem Hund durch die Stadt und kauft sich dann ein"
    " frisches Brot beim nächsten Bäcker.",
    "一个男人带着他的狗走在街上，然后走进一家商店。",
    "Мужчина идет по улице.",
    "A man walks. 一个男人带着他的狗走在街上，然后走进一家商店。",
  ],
)
def test_other_languages_are_refused(text):
  with pytest.raises(Unusable) as error:
    answers.check_english([text])
  assert error.value.kind == "another language"


@pytest.mark.parametrize(
  "text",
  [
    "A man walks along the street with his dog.",
    "Crème brûlée, naïve façade, Ångström: the café serves jalapeño piñatas.",
    "Red, green, blue.",
    "Chopping vegetables, boiling pasta water, serving dinner.",
    "The sign says 出口, which is above the door of the station.",
    "",
    "12:30 - 14:00",
  ],
)
def test_english_is_accepted(text):
  answers.check_english([text])


def test_schemas_accept_the_answers_and_nothing_else():
  values = {
    answers.Caption: CAPTION,
    answers.Events: {"events": [{"title": "a", "start": 0, "end": 1}]},
    answers.Description: {"description": "d"},
    answers.OpenQuestions: {
      "questions": [{"task": "t", "question": "q", "answer": "a"}]
    },
    answers.ChoiceQuestions: {"questions": [CHOICE]},
    answers.Blind: {"answer": "A"},
    answers.Judgement: {"reason": "so", "right": ["A"]},
  }
  for kind, value in values.items():
    schema = answers.json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(value, schema)
    answers.read(kind, json.dumps(value))
    with pytest.raises(jsonschema.ValidationError):
      jsonschema.validate(value | {"more": 1}, schema)
    with pytest.raises(jsonschema.ValidationError):
      jsonschema.validate({}, schema)


@pytest.mark.parametrize(
  "right, letters",
  [
    (["A"], ["A"]),
    ("A, C", ["A", "C"]),
    ("A and C", ["A", "C"]),
    ([], []),
    (["b."], ["B"]),
    (["B. a cat"], ["B"]),
    ("None are supported", None),
    ("B (red)", None),
    (["A red car"], None),
  ],
)
def test_letters_of_a_judge(right, letters):
  text = json.dumps({"reason": "r", "right": right})
  if letters is None:
    with pytest.raises(Unusable):
      answers.read(answers.Judgement, text)
    return
  assert answers.read(answers.Judgement, text).right == letters
