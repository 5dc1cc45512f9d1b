"""Rewards: functions from a question and answers to numbers.

A reward takes a question, whose `expected` is the right answer of the data, and
the texts of all answers that were sampled to it. It returns a number for each
of them, in order; larger is better. `config.objective.rewards` names the ones
that count and their weights:

    --config.objective.rewards=multiple_choice=1,format=0.2

To add one, write the function here and a line in `REWARDS`.
"""

import asyncio
import hashlib
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pydantic
from jaxtyping import Float64

from hourjax import command, schema
from hourjax.construction import answers as answers_of_models
from hourjax.construction.options import ModelName
from hourjax.errors import UserError
from hourjax.evaluation.parsing import parse
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import is_right
from hourjax.jsonl import JsonlWriter, read_valid_rows

Reward = Callable[[Question, Sequence[str]], Sequence[float]]

# "B", "(b)", "B." or "B. a dog".
_LETTER = re.compile(r"\(?[A-Ja-j]\)?(?:[.):](?:\s.*)?)?", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?")
# 75, 1:15 and 0:01:15 are 75 seconds.
_TIME = r"(?:\d+:)?\d+(?::\d+)?(?:\.\d+)?"
_SPAN = re.compile(
  rf"({_TIME})\s*(?:s|sec|seconds)?\s*(?:-|–|—|to|until|and)\s*({_TIME})",
  re.IGNORECASE,
)


def multiple_choice(question: Question, answers: Sequence[str]) -> list[float]:
  """Returns 1 for right answers, as the evaluation reads them, else 0.

  An answer that names no option, or two, is not right. Where the question has
  no options, the words must be those of the expected answer.
  """
  return [
    float(is_right(parse(answer, question), question)) for answer in answers
  ]


def answer_format(question: Question, answers: Sequence[str]) -> list[float]:
  """Returns 1 for answers in the form that the question asks for, else 0.

  Where it has options, that is a letter, alone or before its option: "B" or
  "B. a dog". Else it is an answer of at most twice the words of the expected
  one.
  """
  if question.kind == "choice":
    return [float(bool(_LETTER.fullmatch(a.strip()))) for a in answers]
  most = 2 * len(question.expected.split())
  return [float(0 < len(answer.split()) <= most) for answer in answers]


def number(question: Question, answers: Sequence[str]) -> list[float]:
  """Returns how near the first number of each answer is to the expected one.

  1 - |a - b| / |b|, at least 0, where b is expected: of 20, "25 seconds" is
  worth 0.75. An answer without a number is worth 0.

  Raises:
    UserError: the expected answer has no number.
  """
  right = _first_number(question.expected)
  if right is None:
    raise UserError(_lacks(question, "number", "number"))
  return [
    0.0
    if (found := _first_number(answer)) is None
    else max(0.0, 1 - abs(found - right) / (abs(right) or 1.0))
    for answer in answers
  ]


def time_span(question: Question, answers: Sequence[str]) -> list[float]:
  """Returns how much of their union two spans of time share, 0 to 1.

  Spans are read as "12-30", "from 0:12 to 0:30" or "12 s to 30 s"; of several
  the first counts. With 10-20 expected, "15-25" is worth 5 / 15.

  Raises:
    UserError: the expected answer has no span.
  """
  right = _first_span(question.expected)
  if right is None:
    raise UserError(_lacks(question, "time_span", "span of time"))
  return [_overlap(_first_span(answer), right) for answer in answers]


REWARDS: dict[str, Reward] = {
  "multiple_choice": multiple_choice,
  "format": answer_format,
  "number": number,
  "time_span": time_span,
}
JUDGE = "judge"  # is made of `config.objective.judge`, see `Judge`


def check_names(
  weights: Mapping[str, float], rewards: Mapping[str, Reward], judge: str
) -> None:
  """Checks that all rewards are there.

  Args:
    weights: by name.
    rewards: that may be named.
    judge: MODEL@URL of the judge, or "".

  Raises:
    UserError: a name is unknown, or the judge has no model.
  """
  known = (*rewards, JUDGE)
  for name in weights:
    if name not in known:
      raise UserError(
        f"config.objective.rewards names {name!r}; choose from"
        f" {', '.join(known)}, or add a function to"
        " hourjax/objectives/rewards.py"
      )
  if JUDGE in weights and not judge:
    raise UserError(
      f"config.objective.rewards gives judge={weights[JUDGE]:g} and"
      " config.objective.judge is empty; name its model as MODEL@URL"
    )


def total_reward(
  rewards: Mapping[str, Reward],
  weights: Mapping[str, float],
  question: Question,
  answers: Sequence[str],
) -> tuple[Float64[np.ndarray, "n"], dict[str, float]]:
  """Returns the weighted sum of the rewards of each answer, and their means.

  Args:
    rewards: by name.
    weights: by the same names.
    question: that was asked.
    answers: to it.

  Raises:
    UserError: a reward returns another number of values, or one that is not
      finite.
  """
  total, means = np.zeros(len(answers)), {}
  for name, weight in weights.items():
    values = checked(name, question, answers, rewards[name](question, answers))
    total += weight * values
    means[name] = float(values.mean())
  return total, means


def checked(
  name: str, question: Question, answers: Sequence[str], values: Any
) -> Float64[np.ndarray, "n"]:
  """Returns the values of a reward as an array.

  Args:
    name: of the reward.
    question: that was asked.
    answers: to it.
    values: what the reward returned.

  Raises:
    UserError: their number is another, or one of them is not finite.
  """
  at = f"reward {name!r}, question {question.id}"
  try:
    found = np.asarray(values, np.float64)
  except (TypeError, ValueError) as error:
    raise UserError(
      f"{at}: it returned {values!r:.80}, which are no numbers ({error});"
      " return one for each answer"
    ) from None
  if found.shape != (len(answers),):
    raise UserError(
      f"{at}: it returned values of shape {found.shape} for {len(answers)}"
      " answers; return one number for each, in order"
    )
  wrong = np.flatnonzero(~np.isfinite(found))
  if len(wrong):
    raise UserError(
      f"{at}: it returned {found[wrong[0]]} for the answer"
      f" {answers[wrong[0]]!r:.80}, where {question.expected!r:.80} is"
      " expected; return a finite number for every text, such as 0 where it"
      " cannot be read"
    )
  return found


def advantages(
  rewards: Float64[np.ndarray, "n"], normalise: bool
) -> Float64[np.ndarray, "n"]:
  """Returns how much better each answer of a group is than their mean.

  Rewards 1 0 0 1 give 1 -1 -1 1, and equal ones zeros.

  Args:
    rewards: of the answers to one question.
    normalise: whether they are divided by their standard deviation.
  """
  centred = rewards - rewards.mean()
  spread = rewards.std()
  # Equal numbers may differ from their mean by rounding.
  if spread <= 1e-9 * max(1.0, float(np.abs(rewards).max())):
    return np.zeros_like(rewards)
  return centred / spread if normalise else centred


def _first_number(text: str) -> float | None:
  """Returns the first number of a text, None if it has none."""
  match = _NUMBER.search(text)
  value = float(match[0].replace(",", "")) if match else math.nan
  return value if math.isfinite(value) else None


def _first_span(text: str) -> tuple[float, float] | None:
  """Returns the first span of time in a text, in seconds."""
  match = _SPAN.search(text)
  return (_seconds(match[1]), _seconds(match[2])) if match else None


def _seconds(text: str) -> float:
  """Returns 75 for "75", "1:15" and "0:01:15"."""
  total = 0.0
  for part in text.split(":"):
    total = 60 * total + float(part)
  return total


def _overlap(
  found: tuple[float, float] | None, right: tuple[float, float]
) -> float:
  """Returns the intersection of two spans over their union."""
  if found is None or found[1] < found[0]:
    return 0.0
  both = min(found[1], right[1]) - max(found[0], right[0])
  union = max(found[1], right[1]) - min(found[0], right[0])
  if union <= 0:  # the same moment
    return 1.0
  return max(0.0, both) / union


def _lacks(question: Question, name: str, what: str) -> str:
  """Returns the message about an expected answer that a reward cannot read."""
  return (
    f"reward {name!r}, question {question.id}: the expected answer is"
    f" {question.expected!r:.80}, which has no {what}; leave the record out, or"
    f" take {name} out of config.objective.rewards"
  )


_AT_ONCE = 64  # calls
_MAX_TOKENS = 300
_PROMPT = """Grade an answer to a question about a video.

Question: {question}
Right answer: {expected}
Answer to grade: {answer}

Give a score from 0 (wrong, or says nothing) to 1 (says the same as the right
answer). Answer in JSON: {{"score": 0.5}}"""


class _Score(answers_of_models.Answer):
  """Describes what the judge says."""

  score: float

  @pydantic.field_validator("score")
  @classmethod
  def _check(cls, value: float) -> float:
    # Not as bounds of the schema, which some servers refuse.
    if not 0 <= value <= 1:
      raise ValueError(f"{value} is not from 0 to 1")
    return value


class _Line(schema.Schema):
  """Describes a line of judged.jsonl."""

  key: str
  score: float


class Judge:
  """Asks a model behind an endpoint how right answers are; it is a reward.

  Every judgement is kept in a file, so that nothing is paid for twice and a run
  that goes on gets the same rewards.
  """

  def __init__(self, model: str, path: pathlib.Path):
    """Reads the judgements so far; nothing is sent.

    Args:
      model: MODEL@URL.
      path: file of the judgements.

    Raises:
      UserError: the model is named in another way, or the file is damaged.
    """
    with command.needing("construct"):  # what asking needs
      import hourjax.construction.endpoint  # noqa: F401
    self._model = ModelName.parse(model, "config.objective.judge")
    self._known: dict[str, float] = {}
    if path.exists():
      rows = read_valid_rows(path, {"key": _Line})
      self._known = {row["key"]: row["score"] for row in rows}
    self._writer = JsonlWriter.at(path)

  def __call__(self, question: Question, answers: Sequence[str]) -> list[float]:
    """Returns a score for each answer, 0 to 1.

    Raises:
      UserError: the endpoint does not answer, or says nothing that is a score.
    """
    prompts = [
      _PROMPT.format(
        question=question.prompt, expected=question.expected, answer=answer
      )
      for answer in answers
    ]
    keys = [
      hashlib.sha256(f"{self._model}\n{prompt}".encode()).hexdigest()[:32]
      for prompt in prompts
    ]
    new = {k: p for k, p in zip(keys, prompts) if k not in self._known}
    if new:
      found = asyncio.run(self._ask_all(new))
      self._writer.add(*({"key": k, "score": s} for k, s in found.items()))
      self._known |= found
    return [self._known[key] for key in keys]

  async def _ask_all(self, prompts: dict[str, str]) -> dict[str, float]:
    """Returns the scores of prompts, by key."""
    from hourjax.construction.endpoint import Endpoint, Gate, Lost

    endpoint = Endpoint(self._model, role="judge", gate=Gate(_AT_ONCE))
    try:
      scores = await asyncio.gather(
        *(self._ask(endpoint, key, text) for key, text in prompts.items())
      )
    except Lost as error:
      raise UserError(
        f"{error}; start again when it answers, or take judge out of"
        " config.objective.rewards"
      ) from None
    finally:
      await endpoint.close()
    return dict(zip(prompts, scores))

  async def _ask(self, endpoint: Any, key: str, prompt: str) -> float:
    """Returns one score."""
    try:
      reply = await endpoint.ask(
        [{"role": "user", "content": prompt}],
        max_tokens=_MAX_TOKENS,
        schema=answers_of_models.json_schema(_Score),
        temperature=0.0,
        seed=0,
        key=key,
      )
      return answers_of_models.read(_Score, reply.text, cut=reply.cut).score
    except answers_of_models.Unusable as error:
      raise UserError(
        f"the judge {self._model} did not score an answer ({error}); name"
        ' another model, which answers {"score": 0.5}'
      ) from None
