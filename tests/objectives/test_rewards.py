"""Rewards, one by one, and what they may not return."""

import numpy as np
import pytest

from hourjax.data.records.record import parse_record
from hourjax.errors import UserError
from hourjax.evaluation.benchmarks.record_questions import last_question
from hourjax.evaluation.questions import Question
from hourjax.objective_config import ObjectiveConfig
from hourjax.objectives import rewards

CHOICE = Question("q", "v", "Who?", "B", "choice", ("a cat", "a dog"))
OPEN = Question("q", "v", "What colour?", "red", "open")


@pytest.mark.parametrize(
  ("name", "question", "answers", "expected"),
  [
    ("multiple_choice", CHOICE, ["B", "b) a dog", "A", "A or B", ""],
     [1, 1, 0, 0, 0]),
    ("multiple_choice", OPEN, ["red", "Red.", "a red ball"], [1, 1, 0]),
    ("format", CHOICE, ["B", "(b)", "A. a cat", "a cat", "I think B", ""],
     [1, 1, 1, 0, 0, 0]),
    ("format", OPEN, ["blue", "a bright blue one", ""], [1, 0, 0]),
    ("number", Question("q", "v", "?", "20 seconds", "open"),
     ["20", "25 s", "about 15", "60", "-20", "none"], [1, 0.75, 0.75, 0, 0, 0]),
    ("number", Question("q", "v", "?", "1,200", "open"), ["1200.0"], [1]),
    ("time_span", Question("q", "v", "?", "0:10-0:20", "open"),
     ["10-20", "from 15 to 25 s", "0:00 - 0:05", "20-10", "soon"],
     [1, 1 / 3, 0, 0, 0]),
  ],
)  # fmt: skip
def test_values(name, question, answers, expected):
  found = rewards.REWARDS[name](question, answers)
  np.testing.assert_allclose(found, expected)


def test_the_last_question_of_a_record():
  record = parse_record(
    {
      "id": "r",
      "video": "v.mp4",
      "conversations": [
        {"from": "human", "value": "<image>\nWhat colour?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "Who?\nA. a cat\nB. a dog"},
        {"from": "gpt", "value": "B"},
      ],
    },
    "here",
  )
  question = last_question(record)
  assert question.kind == "choice" and question.expected == "B"
  assert question.options == ("a cat", "a dog")


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ([1.0, float("nan")], r"returned nan for the answer 'b', where 'red' is"),
    ([1.0, float("-inf")], r"returned -inf for the answer 'b'"),
    ([1.0], r"shape \(1,\) for 2 answers; return one number for each"),
    ([[1.0], [2.0]], r"shape \(2, 1\) for 2 answers"),
    (1.0, r"shape \(\) for 2 answers"),
    (None, r"returned nan|no numbers|shape"),
    (["good", "bad"], r"'good'.*no numbers"),
  ],
)
def test_what_a_reward_may_not_return(values, said):
  with pytest.raises(UserError, match=said) as caught:
    rewards.checked("mine", OPEN, ["a", "b"], values)
  assert str(caught.value).startswith("reward 'mine', question q: it returned")


@pytest.mark.parametrize("name", ["number", "time_span"])
def test_expected_answers_that_a_reward_cannot_read(name):
  with pytest.raises(UserError, match=rf"'red', which has no .* take {name} "):
    rewards.REWARDS[name](OPEN, ["red"])


@pytest.mark.parametrize(
  ("given", "expected"),
  [([1, 0, 0, 1], [1, -1, -1, 1]), ([3, 3, 3], [0, 0, 0]),
   ([0.1 + 0.2, 0.3, 0.3], [0, 0, 0])],
)  # fmt: skip
def test_advantages(given, expected):
  found = rewards.advantages(np.array(given, np.float64), True)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  centred = rewards.advantages(np.array(given, np.float64), False)
  assert centred.sum() == pytest.approx(0)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("multiple_choice", "'multiple_choice' must be NAME=WEIGHT"),
    ("a=1,a=2", "'a=2' must be NAME=WEIGHT with a number, each name once"),
    ("a=inf", "'a=inf' must be"),
    ("", "nothing is rewarded"),
    ("a=0", "nothing is rewarded"),
  ],
)
def test_weights(text, said):
  with pytest.raises(UserError, match=said):
    ObjectiveConfig(name="grpo", rewards=text)


def test_a_judge_needs_a_model():
  with pytest.raises(UserError, match=r"judge=0.5 and config.objective.judge"):
    rewards.check_names({"judge": 0.5}, rewards.REWARDS, "")
