"""A reward that a model behind an endpoint gives.

Every judgement is kept in WORKDIR/judged.jsonl, so that nothing is paid for
twice and a run that goes on gets the same rewards.
"""

import asyncio
import hashlib
import pathlib
from collections.abc import Sequence

import pydantic

from hourjax import schema
from hourjax.construction import answers as construction
from hourjax.construction.endpoint import Endpoint, Gate, Lost
from hourjax.construction.options import ModelName
from hourjax.errors import UserError
from hourjax.evaluation.questions import Question
from hourjax.jsonl import JsonlWriter, read_valid_rows

_AT_ONCE = 64  # calls
_MAX_TOKENS = 300
_PROMPT = """Grade an answer to a question about a video.

Question: {question}
Right answer: {expected}
Answer to grade: {answer}

Give a score from 0 (wrong, or says nothing) to 1 (says the same as the right
answer). Answer in JSON: {{"score": 0.5}}"""


class _Score(construction.Answer):
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
  """Asks a model how right answers are; it is a reward."""

  def __init__(self, model: str, path: pathlib.Path):
    """Reads the judgements so far; nothing is sent.

    Args:
      model: MODEL@URL.
      path: file of the judgements.

    Raises:
      UserError: the model is named in another way, or the file is damaged.
    """
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

  async def _ask(self, endpoint: Endpoint, key: str, prompt: str) -> float:
    """Returns one score."""
    try:
      reply = await endpoint.ask(
        [{"role": "user", "content": prompt}],
        max_tokens=_MAX_TOKENS,
        schema=construction.json_schema(_Score),
        temperature=0.0,
        seed=0,
        key=key,
      )
      return construction.read(_Score, reply.text, cut=reply.cut).score
    except construction.Unusable as error:
      raise UserError(
        f"the judge {self._model} did not score an answer ({error}); name"
        ' another model, which answers {"score": 0.5}'
      ) from None
