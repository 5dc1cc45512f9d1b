"""What the result of a construction depends on, and what is made of a video."""

import dataclasses
import hashlib
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from hourjax.construction.answers import Refused, Unusable
from hourjax.construction.clips import ClipOptions
from hourjax.construction.tasks import Tasks
from hourjax.errors import UserError

STAGES = (
  "caption",
  "events",
  "event",
  "video",
  "questions",
  "blind",
  "judge",
)
ROLES = ("captioner", "writer", "judge")
ROLE_OF = {
  "caption": "captioner",
  "events": "writer",
  "event": "writer",
  "video": "writer",
  "questions": "writer",
  "blind": "writer",
  "judge": "judge",
}
# Limits of answers in tokens. Questions come up to 24 at a time.
MAX_TOKENS = {
  "caption": 1024,
  "events": 4096,
  "event": 1024,
  "video": 2048,
  "questions": 6144,
  "blind": 512,
  "judge": 1024,
}
# By role, the variable that holds its key; the other is for all roles without.
KEYS = "{}_API_KEY"
COMMON_KEY = "OPENAI_API_KEY"
CHECKS = ("rules", "blind", "judge")
VERSION = 1  # of the construction; another one makes results anew


@dataclasses.dataclass(frozen=True)
class ModelName:
  """Names a model and its endpoint.

  Attributes:
    name: that the endpoint knows the model by.
    url: of the endpoint, up to and with /v1.
  """

  name: str
  url: str

  @classmethod
  def parse(cls, text: str, option: str) -> "ModelName":
    """Parses NAME@URL.

    Args:
      text: value of the option.
      option: its name, for messages.

    Raises:
      UserError: it has another form, or holds a key.
    """
    name, at, url = text.partition("@http")
    url = f"http{url}"
    parts = _split(url)
    if not name or not at or parts is None:
      raise UserError(
        f"--{option}={_hidden(text)}: write NAME@URL, for example"
        f" --{option}=Qwen2.5-VL-7B@http://localhost:8000/v1"
      )
    if parts.username is not None or parts.query:
      raise UserError(
        f"--{option}={_hidden(text)} holds a password or key; give it as"
        f" {KEYS.format(option.upper())} in the environment"
      )
    return cls(name, url.rstrip("/"))

  def __str__(self) -> str:
    return f"{self.name}@{self.url}"


def _split(url: str) -> urllib.parse.SplitResult | None:
  """Returns the parts of an address, None of one that no client takes."""
  try:
    parts = urllib.parse.urlsplit(url)
    # The port is read, and names are encoded, only when they are used.
    port, host = parts.port, parts.hostname or ""
    host.encode("idna")
  except ValueError:  # UnicodeError is one
    return None
  plain = parts.scheme in ("http", "https") and not re.search(r"\s", url)
  return parts if plain and host and port != 0 else None


def _hidden(text: str) -> str:
  """Returns an option's value without what may be a password."""
  return re.sub(r"//.*@|\?.*", lambda m: m[0][:2] + "***", text)


@dataclasses.dataclass(frozen=True)
class Options:
  """Holds what the result depends on, beside prompts and tasks.

  Attributes:
    clip: how clips are cut and sent.
    models: by role.
    count: questions for each task and format.
    min_events: a video with fewer different events is dropped.
    checks: some of CHECKS.
    blind_tries: a question is dropped that is answered so many times of so many
      without the video.
    mark: whether such questions are marked instead of dropped.
    again: how often a model is asked anew for an answer that can be used.
    seed: of sampling.
  """

  clip: ClipOptions
  models: Mapping[str, ModelName]
  count: int = 3
  min_events: int = 3
  checks: tuple[str, ...] = CHECKS
  blind_tries: int = 3
  mark: bool = False
  again: int = 2
  seed: int = 0

  def plan(self, prompts: str, tasks: Tasks, benchmarks: str) -> str:
    """Returns a digest of all that results depend on, hexadecimal.

    Args:
      prompts: digest of the templates.
      tasks: that questions are written for.
      benchmarks: digest of what is left out.
    """
    own = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    own["clip"] = dataclasses.asdict(self.clip)
    # Not their addresses: another server may have the same model.
    own["models"] = {role: model.name for role, model in self.models.items()}
    content = [VERSION, own, prompts, tasks.model_dump(), benchmarks]
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class Clip:
  """Holds a clip and its caption.

  Attributes:
    start: in seconds.
    end: in seconds.
    aspects: texts of the caption by their headings.
  """

  start: float
  end: float
  aspects: dict[str, str]

  def about(self, aspects: Sequence[str]) -> "Clip":
    """Returns the clip with some of its headings."""
    chosen = {name: self.aspects[name] for name in aspects}
    return dataclasses.replace(self, aspects=chosen)

  def __getattr__(self, name: str) -> str:
    """Returns the text below a heading, as `clip.summary` in a template."""
    try:
      return self.__dict__["aspects"][name]
    except KeyError:
      raise AttributeError(name) from None


@dataclasses.dataclass
class Made:
  """Holds what is made of a video, stage by stage.

  Attributes:
    duration: of the video, in seconds.
    stage: that is at work, for messages.
    clips: with captions.
    events: with `title`, `start`, `end` in seconds, and `description`.
    description: of the whole video.
    questions: that passed the checks.
    dropped: that did not, with the `reason`.
    unusable: answers, with `what` they were to be, `kind` and `problem`.
    refused: whether the endpoint refused a request that another start may get
      an answer to.
  """

  duration: float
  stage: str = ""
  clips: list[Clip] = dataclasses.field(default_factory=list)
  events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  description: str = ""
  questions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  dropped: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  unusable: list[dict[str, str]] = dataclasses.field(default_factory=list)
  refused: bool = False

  def give_up(self, what: str, error: Unusable) -> None:
    """Lists an answer that could not be used."""
    self.refused |= isinstance(error, Refused)
    self.unusable.append(
      {"what": what, "kind": error.kind, "problem": str(error)}
    )

  def values(self) -> dict[str, Any]:
    """Returns everything as JSON values."""
    return {
      "captions": [dataclasses.asdict(clip) for clip in self.clips],
      "events": self.events,
      "description": self.description,
      "questions": self.questions,
      "dropped": self.dropped,
      # In another order than that in which answers happen to come.
      "unusable": sorted(self.unusable, key=lambda item: sorted(item.items())),
    }
