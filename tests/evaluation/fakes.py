"""A model that answers by rule, a task for it, and what it was asked."""

import dataclasses
import pathlib
import zlib
from collections.abc import Sequence

from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.evaluation.questions import Question
from hourjax.evaluation.task import EvalTask


@dataclasses.dataclass
class Answer:
  text: str
  tokens: int = 1
  finished: bool = True


class Memory:
  note = ""

  def __init__(self, model: "Model", video: str):
    self._model, self._video = model, video

  def answer(self, questions: Sequence[str], *, max_tokens: int):
    self._model.before_answer(self._video, questions)
    self._model.asked.append((self._video, tuple(questions)))
    return [Answer(self._model.say(text, questions)) for text in questions]


class Model:
  """Says what `answers` holds for a prompt, else "B"."""

  def __init__(
    self, name: str = "fake@3", answers=None, broken=(), sensitive=False
  ):
    """`broken` videos cannot be read.

    A `sensitive` model's answers depend on the whole batch, as rounding can
    make those of a real one.
    """
    self.name, self.answers, self.broken = name, answers or {}, set(broken)
    self.sensitive = sensitive
    self.encoded: list[str] = []
    self.asked: list[tuple[str, tuple[str, ...]]] = []

  def encode_memory(self, video: str) -> Memory:
    name = pathlib.Path(video).name
    if name in self.broken:
      raise UserError(f"{video} cannot be read; fetch it again")
    self.encoded.append(video)
    return Memory(self, name)

  def encode_stored_memory(self, store: FeatureStore, video: str) -> Memory:
    self.encoded.append(f"stored {video}")
    return Memory(self, video)

  def say(self, prompt: str, batch: Sequence[str]) -> str:
    if self.sensitive:
      return "ABCD"[zlib.crc32(f"{prompt} {batch}".encode()) % 4]
    return self.answers.get(prompt, "B")

  def before_answer(self, video: str, questions: Sequence[str]) -> None:
    """For tests that interfere."""


def question(number: int, video: str = "a.mp4", **changes) -> Question:
  given = {
    "id": f"q{number}",
    "video": video,
    "prompt": f"question {number}?",
    "expected": "ABCD"[number % 4],
    "kind": "choice",
    "options": ("red", "blue", "green", "white"),
    "tasks": (("order", "colour")[number % 2],),
    "duration": ("short", "long")[number % 3 == 0],
    "chance": 0.25,
  }
  return Question(**{**given, **changes})


def make_task(
  questions: Sequence[Question] | None = None, **changes
) -> EvalTask:
  """By default 45 questions about 4 videos of 20, 11, 9 and 5, mixed."""
  if questions is None:
    names = ["a"] * 20 + ["b"] * 11 + ["c"] * 9 + ["d"] * 5
    order = [names[(7 * i) % len(names)] for i in range(len(names))]
    questions = [question(i, f"{name}.mp4") for i, name in enumerate(order)]
  given = {
    "benchmark": "colours",
    "version": "1",
    "questions": tuple(questions),
    "videos": pathlib.Path("videos"),
    "frames": "1 a second",
    "max_tokens": 4,
  }
  return EvalTask(**{**given, **changes})


def same(rows) -> dict[str, dict]:
  """Records by id, without the times that no two runs share."""
  return {
    name: {key: value for key, value in row.items() if key != "seconds"}
    for name, row in rows.items()
  }


def timeless(value):
  """A report without its times."""
  if isinstance(value, dict):
    return {k: timeless(v) for k, v in value.items() if k != "seconds"}
  if isinstance(value, list):
    return [timeless(item) for item in value]
  return value
