"""The tasks that questions are written for, a file that a user may replace."""

import os
import pathlib
from typing import Literal

import pydantic
import yaml

from hourjax import schema
from hourjax.errors import UserError

TASKS = pathlib.Path(__file__).with_name("tasks.yaml")
# What a caption says of a clip, in the order of VideoMarathon's.
ASPECTS = (
  "temporality",
  "spatiality",
  "object",
  "action",
  "scene",
  "summary",
)
FORMATS = ("open", "multiple_choice")
OPTIONS = 4  # of a multiple-choice question
# That one call asks for at most, so that its answer has room for them.
MOST_QUESTIONS = 24


class _Described(schema.Schema):
  """Forbids unknown keys, which are usually misspelt."""

  model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class OpenExample(_Described):
  """Holds an example of an open question."""

  question: str = pydantic.Field(min_length=1)
  answer: str = pydantic.Field(min_length=1)


class ChoiceExample(OpenExample):
  """Holds an example of a multiple-choice question."""

  options: list[str] = pydantic.Field(min_length=OPTIONS, max_length=OPTIONS)

  @pydantic.model_validator(mode="after")
  def _check(self) -> "ChoiceExample":
    if self.answer not in self.options:
      raise ValueError(f"answer {self.answer!r} is none of its options")
    return self


class Task(_Described):
  """Describes a task, as tasks.yaml explains its keys.

  Attributes:
    name: of the task.
    topic: of the task, a key of `Tasks.topics`.
    form: of its answers.
    definition: for the model that writes questions.
    formats: that questions are asked in.
    count: of questions in each format; None for the usual number.
    answer: "description" if the description of the whole video answers all of
      `questions`.
    questions: of such a task.
    open: example of an open question.
    multiple_choice: example of a multiple-choice question.
  """

  name: str = pydantic.Field(pattern=r"^[a-z][a-z0-9_]*$")
  topic: str
  form: Literal["short", "long"]
  definition: str = pydantic.Field(min_length=1)
  formats: list[Literal["open", "multiple_choice"]] = pydantic.Field(
    default_factory=lambda: list(FORMATS)
  )
  count: int | None = pydantic.Field(default=None, ge=1, le=20)
  answer: Literal["written", "description"] = "written"
  questions: list[str] = pydantic.Field(default_factory=list)
  open: OpenExample | None = None
  multiple_choice: ChoiceExample | None = None

  @pydantic.model_validator(mode="after")
  def _check(self) -> "Task":
    if self.answer == "description":
      if not self.questions:
        raise ValueError("with answer: description it needs questions")
      return self
    for name in self.formats:
      if getattr(self, name) is None:
        raise ValueError(f"it has no example named {name}")
    return self


class Tasks(_Described):
  """Holds all tasks, by topic.

  Attributes:
    topics: parts of a clip's caption that each topic's questions are about.
    tasks: in the order in which they are asked for.
  """

  topics: dict[
    str,
    list[
      Literal[
        "temporality", "spatiality", "object", "action", "scene", "summary"
      ]
    ],
  ]
  tasks: list[Task] = pydantic.Field(min_length=1)

  @pydantic.model_validator(mode="after")
  def _check(self) -> "Tasks":
    names = [task.name for task in self.tasks]
    for name in names:
      if names.count(name) > 1:
        raise ValueError(f"task {name} is there {names.count(name)} times")
    for task in self.tasks:
      if task.topic not in self.topics:
        raise ValueError(
          f"task {task.name} is of topic {task.topic}, which topics lacks;"
          f" they are {', '.join(self.topics)}"
        )
    return self

  def written(self, topic: str, form: str) -> list[Task]:
    """Returns the tasks of a topic whose questions a model writes.

    Args:
      topic: of the tasks.
      form: one of FORMATS.
    """
    return [
      task
      for task in self.tasks
      if task.topic == topic
      and task.answer == "written"
      and form in task.formats
    ]

  def groups(self, topic: str, form: str, count: int) -> list[list[Task]]:
    """Returns the tasks of `written`, in parts that a call can answer.

    Args:
      topic: of the tasks.
      form: one of FORMATS.
      count: of questions for each task that states no number.
    """
    groups: list[list[Task]] = []
    room = 0
    for task in self.written(topic, form):
      number = task.count or count
      if number > room or not groups:
        groups.append([])
        room = MOST_QUESTIONS
      groups[-1].append(task)
      room -= number
    return groups

  def by_description(self) -> list[Task]:
    """Returns the tasks that the description of the video answers."""
    return [task for task in self.tasks if task.answer == "description"]


def read_tasks(path: str | os.PathLike = TASKS) -> Tasks:
  """Reads a file of tasks.

  Raises:
    UserError: it cannot be read, or does not fit; the message says where.
  """
  remedy = f"see {TASKS} for how it is written"
  content = schema.read_bytes(path, remedy=remedy)
  try:
    raw = yaml.safe_load(content)
  except (yaml.YAMLError, ValueError) as error:  # ValueError: of dates
    text = " ".join(str(error).split())
    raise UserError(f"{path} is not YAML ({text}); {remedy}") from None
  return schema.validate(Tasks, raw, str(path), remedy=remedy)
