"""Records in VideoMarathon's format, the demo's test records among them.

Files: one JSON list or JSONL of records as in training, of videos. Each
question is asked on its own, without the turns before it. What the demo knows
of its questions (`questions[n]`: letter, options, task, chance, whether it asks
for a needle) is used where it is there. Without it a question is multiple
choice if options stand below it and the answer names one of them, yes or no if
the answer is that, else free text.

Prompt: the record's own question; the answer is not shown.
"""

import re
from collections.abc import Iterator
from typing import Any

from hourjax.data.records.files import read_records
from hourjax.data.records.record import MARKER, Record
from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields
from hourjax.evaluation.benchmarks.benchmark import Benchmark, Source
from hourjax.evaluation.parsing import LETTERS, normalise, parse
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut

QUESTION = "{question}"
_MARKER = re.compile(rf"{MARKER}\n?|\n{MARKER}$")


def read(source: Source) -> list[Question | LeftOut]:
  """A record's questions; "id", or "id#1", "id#2" where it has several.

  Raises:
    UserError: all records are damaged.
  """
  records, skipped = read_records(source.file)
  if skipped and not records:
    raise UserError(
      f"{len(skipped)} of {len(skipped)} records of {source.file} are damaged,"
      f" the first: {skipped[0].reason}; repair or drop them"
    )
  made: list[Question | LeftOut] = []
  for record in records:
    made += _questions(record, source)
  return made + [
    LeftOut(item.id, source.file.name, item.reason) for item in skipped
  ]


def _questions(record: Record, source: Source) -> Iterator[Question | LeftOut]:
  video = ", ".join(record.media) or source.file.name
  try:
    asked = _asked(record, f"{source.file.name}: question {record.id}")
  except UserError as error:
    yield LeftOut(record.id, video, str(error))
    return
  for number, (text, answer) in enumerate(asked):
    name = f"{record.id}#{number + 1}" if len(asked) > 1 else record.id
    at = f"{source.file.name}: question {name}"
    facts = _facts(record, number)
    try:
      yield _question(record, source, name, text, answer, facts, at)
    except UserError as error:
      yield LeftOut(name, video, str(error))


def _question(record, source, name, text, answer, facts, at) -> Question:
  if not text.strip():
    raise UserError(f"{at}: the question is empty; repair or drop it")
  kind, expected, options = _kind(text, answer, facts, at)
  chance = facts.get("chance")
  if chance is None:
    chance = 0.5 if kind == "yes_no" else 0.0
    if kind == "choice":
      chance = fields.chance(options, expected)
  return Question(
    id=name,
    video=source.videos.name(record.media[0]),
    prompt=QUESTION.format(question=text),
    expected=expected,
    kind=kind,
    options=options,
    tasks=tuple(fields.known(facts, "task").values()),
    duration=fields.minutes_range(record.extra.get("duration")),
    chance=float(chance),
    extra=_extra(record, facts),
  )


def _asked(record: Record, at: str) -> list[tuple[str, str]]:
  """The questions of a record with their answers."""
  if record.modality != "video":
    raise UserError(f"{at}: is about {record.modality}, not a video; drop it")
  roles = [turn.role for turn in record.turns]
  if roles != ["human", "gpt"] * (len(roles) // 2):
    raise UserError(
      f"{at}: has the turns {', '.join(roles)}, expected human, gpt, in pairs:"
      " questions and their answers; repair or drop it"
    )
  # As published, but for the marker and the newline that goes with it.
  texts = [_MARKER.sub("", turn.text) for turn in record.turns]
  return list(zip(texts[::2], texts[1::2], strict=True))


def _facts(record: Record, number: int) -> dict[str, Any]:
  """What is known about a question, or nothing."""
  questions = record.extra.get("questions")
  if not isinstance(questions, list) or number >= len(questions):
    return {}
  facts = questions[number]
  return facts if isinstance(facts, dict) else {}


def _kind(text: str, answer: str, facts: dict[str, Any], at: str):
  """Kind, what is right, and the options."""
  answer = answer.strip()
  if facts.get("letter") is not None:
    options = fields.options({"options": facts.get("options")}, at)
    return "choice", fields.letter(str(facts["letter"]), options, at), options
  if "letter" not in facts:
    _, options = fields.split_options(text)
    probe = Question("", "", text, "", "choice", options)
    if options and (right := _letter(answer, probe, at)):
      return "choice", right, options
  if normalise(answer) in ("yes", "no"):
    return "yes_no", normalise(answer), ()
  return "open", answer, ()


def _letter(answer: str, probe: Question, at: str) -> str | None:
  """The letter that an answer names; None if it is an answer in words."""
  found = parse(answer, probe)
  if found is None and re.fullmatch(rf"\(?[{LETTERS}]\)?[.:]?", answer):
    return fields.letter(answer, probe.options, at)  # raises: none of them
  return found


def _extra(record: Record, facts: dict[str, Any]) -> dict[str, Any]:
  extra: dict[str, Any] = {
    key: facts[key] for key in ("topic", "format") if facts.get(key)
  }
  if record.source:
    extra["source"] = record.source
  if facts:
    extra["needle"] = bool(facts.get("needle"))
    extra["hidden"] = bool(facts.get("dropped"))
  return extra


SUITE = Benchmark(
  name="records",
  title="Records",
  revision=2,
  annotations=("test.json", "test.jsonl", "*.json", "*.jsonl"),
  columns=(frozenset({"id", "conversations"}),),
  read=read,
  prompts={"question": QUESTION},
  videos=("videos", "video"),
  max_tokens=32,
)
