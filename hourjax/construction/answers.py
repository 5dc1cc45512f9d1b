"""What models answer: one schema for each kind, and reading it from their text.

A text that does not fit is refused with a sentence that tells the model, and a
user, what is wrong with it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import pydantic

from hourjax.construction.tasks import ASPECTS, OPTIONS

# Longest answer that is used, in characters: a caption has about 1,500, and 60
# multiple-choice questions have 20,000.
LONGEST = 200_000
LETTERS = "ABCD"
_FENCE = re.compile(r"```[\w-]*\s*\n(.*?)\n?\s*```", re.DOTALL)
_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
_SHOWN = 3  # problems of one answer that are told
# Common words of English, of which a text has one in four or more.
_COMMON = """
a an the is are was were of in on at to and or it its his her he she they their
with from by for as that this there then not no before after while into one two
has have be been which who what where when how why does do did right left first
last
"""
_ENGLISH = frozenset(_COMMON.split())
_WORD = re.compile(r"[^\W\d_]+")
# A text of fewer words is not judged by its common words.
_JUDGED_WORDS = 12

Text = Annotated[
  str, pydantic.StringConstraints(strip_whitespace=True, min_length=1)
]


class Unusable(Exception):
  """Says why an answer cannot be used.

  Attributes:
    kind: a few words, the same for all answers with this fault.
  """

  def __init__(self, problem: str, kind: str):
    super().__init__(problem)
    self.kind = kind


class Refused(Unusable):
  """Says that an endpoint refuses a request, which it may take another time."""

  def __init__(self, problem: str):
    super().__init__(problem, "refused request")


class Answer(pydantic.BaseModel):
  """Describes an answer; further keys are ignored."""

  model_config = pydantic.ConfigDict(frozen=True, extra="ignore")


class Caption(Answer):
  """Describes what a clip shows, under six headings."""

  temporality: Text
  spatiality: Text
  object: Text
  action: Text
  scene: Text
  summary: Text

  def aspects(self) -> dict[str, str]:
    """Returns the six texts by their headings."""
    return {name: getattr(self, name) for name in ASPECTS}


def _seconds(value: Any) -> Any:
  """Reads a time in seconds, of 75, "75", "75 s" or "1:15"."""
  if not isinstance(value, str):
    return value
  text = value.strip().lower().removesuffix("seconds").removesuffix("s").strip()
  parts = text.split(":")
  try:
    numbers = [float(part) for part in parts]
  except ValueError:
    return value
  total = 0.0
  for number in numbers:
    total = 60 * total + number
  return total


Seconds = Annotated[
  float,
  pydantic.BeforeValidator(_seconds),
  pydantic.Field(ge=0, allow_inf_nan=False),
]


class Event(Answer):
  """Describes an event, from `start` to `end` in seconds."""

  title: Text
  start: Seconds
  end: Seconds


class Events(Answer):
  """Holds the events of a video."""

  events: list[Event] = pydantic.Field(min_length=1)


class Description(Answer):
  """Holds the description of an event or a video."""

  description: Text


class OpenQuestion(Answer):
  """Holds an open question and its answer."""

  task: str
  question: Text
  answer: Text


class ChoiceQuestion(OpenQuestion):
  """Holds a multiple-choice question; `answer` is one of the options."""

  options: list[Text] = pydantic.Field(min_length=OPTIONS, max_length=OPTIONS)

  @pydantic.model_validator(mode="before")
  @classmethod
  def _read_letters(cls, value: Any) -> Any:
    """Reads options with letters, as a list or by letter."""
    if not isinstance(value, dict):
      return value
    options, answer = value.get("options"), value.get("answer")
    if isinstance(options, dict):
      options = [options[key] for key in sorted(options)]
    if not isinstance(options, list) or not isinstance(answer, str):
      return value
    plain = _without_letters(options)
    own = _without_letters([answer])[0] if plain != options else answer
    letter = answer.strip().strip("().").upper()
    if answer not in plain and own in plain:
      answer = own
    elif (
      answer not in plain and letter in tuple(LETTERS) and len(plain) == OPTIONS
    ):
      answer = plain[LETTERS.index(letter)]
    return {**value, "options": plain, "answer": answer}

  @pydantic.model_validator(mode="after")
  def _check(self) -> "ChoiceQuestion":
    if self.answer not in self.options:
      raise ValueError(
        f"the answer {self.answer!r} repeats none of its options"
      )
    if len({plain_option(option) for option in self.options}) < OPTIONS:
      raise ValueError(f"two of the options {self.options} are equal")
    return self


def plain_option(text: str) -> str:
  """Returns an option as it is compared: in small letters, without a stop."""
  return " ".join(text.casefold().split()).rstrip(".")


def _without_letters(options: Sequence[Any]) -> list[Any]:
  """Returns options without the letters before them, if all have them."""
  found = [
    re.fullmatch(r"\(?([A-Da-d])[.):]\s*(.+)", option, re.DOTALL)
    if isinstance(option, str)
    else None
    for option in options
  ]
  if len(options) == 1 and found[0]:
    return [found[0][2]]
  letters = [match[1].upper() if match else "" for match in found]
  if letters == list(LETTERS[: len(options)]):
    return [match[2] for match in found if match]
  return list(options)


class OpenQuestions(Answer):
  """Holds the open questions of a topic."""

  questions: list[OpenQuestion]


class ChoiceQuestions(Answer):
  """Holds the multiple-choice questions of a topic."""

  questions: list[ChoiceQuestion]


class Blind(Answer):
  """Holds the letter that a model chose without having seen the video."""

  answer: str

  @pydantic.field_validator("answer")
  @classmethod
  def _read(cls, value: str) -> str:
    letter = _option_letter(value)  # not of "A red car"
    if letter not in tuple(LETTERS):
      raise ValueError(
        f"answer {value[:40]!r} names none of the letters A to D"
      )
    return letter


class Judgement(Answer):
  """Holds the letters of the options that a judge found right."""

  reason: str = ""
  right: list[Annotated[str, pydantic.StringConstraints(pattern="^[A-D]$")]]

  @pydantic.field_validator("right", mode="before")
  @classmethod
  def _read(cls, value: Any) -> Any:
    if isinstance(value, str):  # "A", "A, C", "A and C"
      value = re.split(r"[\s,;/&]+and[\s]+|[\s,;/&]+", value.strip())
    if not isinstance(value, list):
      return value
    return [_option_letter(each) for each in value]


def _option_letter(value: Any) -> Any:
  """Returns the letter of "b", "B." or "B. a cat"; anything else as it is."""
  if isinstance(value, str):
    match = re.match(r"\(?([A-Da-d])(?:\)?[.):]|\)?$)", value.strip())
    if match:
      return match[1].upper()
  return value


Kind = TypeVar("Kind", bound=Answer)


def json_schema(kind: type[Answer]) -> dict[str, Any]:
  """Returns the JSON schema of an answer, as structured output wants it.

  All keys are required and no others allowed, and bounds on numbers and texts,
  which some servers refuse, are left out.
  """
  left_out = {"minLength", "minimum", "pattern", "default", "description"}

  def strict(node: Any, names: bool = False) -> Any:
    if isinstance(node, list):
      return [strict(item) for item in node]
    if not isinstance(node, dict):
      return node
    if names:  # of properties, whatever they are called
      return {key: strict(value) for key, value in node.items()}
    found = {
      key: strict(value, names=key in ("properties", "$defs"))
      for key, value in node.items()
      if key not in left_out
    }
    if "properties" in found:
      found["additionalProperties"] = False
      found["required"] = list(found["properties"])
    return found

  return strict(kind.model_json_schema())


def read(kind: type[Kind], text: str, *, cut: bool = False) -> Kind:
  """Reads an answer from a model's text.

  Thoughts before it, a code fence around it and words beside it are left out.

  Args:
    kind: of answer.
    text: that the model wrote.
    cut: whether it was cut off at the limit of tokens.

  Raises:
    Unusable: the text holds no such answer.
  """
  if not text.strip():
    raise Unusable("it is empty", "empty answer")
  if len(text) > LONGEST:
    raise Unusable(
      f"it has {len(text):,} characters, more than {LONGEST:,}", "too long"
    )
  value = _json(text, cut)
  if isinstance(value, list) and len(kind.model_fields) == 1:
    value = {next(iter(kind.model_fields)): value}
  try:
    return kind.model_validate(value)
  except pydantic.ValidationError as error:
    problems = [_problem(item) for item in error.errors(include_url=False)]
    more = len(problems) - _SHOWN
    listed = problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    raise Unusable("; ".join(listed), "wrong schema") from None


def _json(text: str, cut: bool) -> Any:
  """Parses the JSON value in a text."""
  plain = _THOUGHTS.sub("", text)
  # Some servers drop the opening tag; a thought that does not end is no answer.
  plain = plain.rpartition("</think>")[2].partition("<think")[0]
  fenced = _FENCE.findall(plain)
  problem = "it holds no JSON object"
  for candidate in [*fenced, plain]:
    starts = [candidate.find(sign) for sign in "{["]
    starts = [start for start in starts if start >= 0]
    if not starts:
      continue
    try:
      return json.JSONDecoder().raw_decode(candidate, min(starts))[0]
    except RecursionError:
      problem = "its JSON is nested too deep"
    except ValueError as error:
      problem = f"its JSON is broken ({error})"
  if cut:
    raise Unusable(
      "it was cut off at the limit of tokens; write less", "cut off"
    )
  raise Unusable(problem, "invalid JSON")


def _problem(item: Any) -> str:
  """Words one error of pydantic."""
  place = ".".join(map(str, item["loc"])) or "the whole"
  message = item["msg"].removeprefix("Value error, ")
  return f"{place}: {message[:1].lower()}{message[1:]}"


def check_script(texts: Sequence[str]) -> None:
  """Refuses texts in another script than Latin.

  Raises:
    Unusable: more than a tenth of the letters are of another script.
  """
  letters = [c for c in " ".join(texts) if c.isalpha()]
  if sum(ord(c) > 0x24F for c in letters) > 0.1 * len(letters):
    raise Unusable("it is not in English", "another language")


def check_english(texts: Sequence[str]) -> None:
  """Refuses whole sentences in another language.

  Raises:
    Unusable: they are in another script, or fewer than one word in ten is a
      common one of English, which titles and lists may lack.
  """
  check_script(texts)
  words = [word.lower() for word in _WORD.findall(" ".join(texts))]
  common = sum(word in _ENGLISH for word in words)
  if len(words) >= _JUDGED_WORDS and common < 0.1 * len(words):
    raise Unusable("it is not in English", "another language")


def check_events(events: Sequence[Event], duration: float) -> list[Event]:
  """Returns different events in order, with ends that the video has.

  An end up to five seconds behind the video's is moved to it.

  Args:
    events: that a model found.
    duration: of the video, in seconds.

  Raises:
    Unusable: an event ends before it starts or after the video.
  """
  found: dict[str, Event] = {}
  for event in events:
    if event.end <= event.start:
      raise Unusable(
        f"event {event.title!r} ends at {event.end} s, which is not after its"
        f" start at {event.start} s",
        "times",
      )
    if event.end > duration + 5:
      raise Unusable(
        f"event {event.title!r} ends at {event.end} s, the video at"
        f" {duration:.1f} s",
        "times",
      )
    whole = event.model_copy(update={"end": min(event.end, duration)})
    if whole.start < whole.end:
      found.setdefault(event.title.casefold(), whole)
  return sorted(found.values(), key=lambda event: (event.start, event.end))


def check_counts(
  questions: Sequence[OpenQuestion], counts: Mapping[str, int]
) -> None:
  """Refuses other numbers of questions than were asked for.

  Args:
    questions: that a model wrote.
    counts: that were asked for, by task.

  Raises:
    Unusable: with the number of each task that differs.
  """
  found = [question.task for question in questions]
  wrong = [
    f"{found.count(name)} questions for {name} instead of {count}"
    for name, count in counts.items()
    if found.count(name) != count
  ]
  wrong += [
    f"{found.count(name)} questions for {name}, which is no task"
    for name in dict.fromkeys(found)
    if name not in counts
  ]
  if wrong:
    raise Unusable(f"it has {', '.join(wrong)}", "wrong number")
