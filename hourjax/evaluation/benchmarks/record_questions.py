"""Questions of records: their kind, options and right answer.

The demo's records tell more of their questions (`questions[n]`: letter,
options, task, chance, whether it is a needle), which is used where it is there.
Without it a question is multiple choice if options stand below it and the
answer names one of them; it is a yes-or-no question if the answer is yes or no;
else its answer is free text.
"""

import re
from typing import Any

from hourjax.data.records.record import MARKER, Record
from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields
from hourjax.evaluation.parsing import LETTERS, normalise, parse
from hourjax.evaluation.questions import Kind, Question

# The marker of the video and its newline, which a question's text leaves out.
MARKER_LINE = re.compile(rf"{MARKER}\n?|\n{MARKER}$")


def last_question(record: Record) -> Question:
  """Returns the question that a record's last answer is to.

  Args:
    record: of any modality, with an answer.

  Raises:
    UserError: it has no such question, or the answer names an option that the
      question does not have.
  """
  at = f"record {record.id}"
  if [turn.role for turn in record.turns[-2:]] != ["human", "gpt"]:
    raise UserError(
      f"{at}: its last turns are from"
      f" {', '.join(turn.role for turn in record.turns[-2:])}, expected human,"
      " gpt: a question and its answer; repair or drop it"
    )
  text = MARKER_LINE.sub("", record.turns[-2].text)
  number = sum(turn.role == "gpt" for turn in record.turns) - 1
  return question_at(record, number, text, record.turns[-1].text, at)


def question_at(
  record: Record, number: int, text: str, answer: str, at: str
) -> Question:
  """Makes the question with this number in a record.

  Args:
    record: that it is of.
    number: among the record's questions, from 0.
    text: of the question, without markers.
    answer: that is right.
    at: file and place, for messages.

  Raises:
    UserError: it is empty, or its answer names an option that it lacks.
  """
  facts = _facts(record, number)
  if not text.strip():
    raise UserError(f"{at}: the question is empty; repair or drop it")
  kind, expected, options = _kind(text, answer, facts, at)
  return Question(
    id=record.id,
    video=record.media[0] if record.media else "",
    prompt=text,
    expected=expected,
    kind=kind,
    options=options,
    tasks=tuple(fields.known(facts, "task").values()),
    duration=fields.minutes_range(record.extra.get("duration")),
    chance=_chance(kind, expected, options, facts),
    extra=_extra(record, facts),
  )


def _chance(
  kind: str, expected: str, options: tuple[str, ...], facts: dict[str, Any]
) -> float:
  """Returns the probability that a guess is right."""
  if (chance := facts.get("chance")) is not None:
    return float(chance)
  if kind == "choice":
    return fields.chance(options, expected)
  return 0.5 if kind == "yes_no" else 0.0


def _facts(record: Record, number: int) -> dict[str, Any]:
  """Returns the facts that a record states about a question; {} if none."""
  questions = record.extra.get("questions")
  if not isinstance(questions, list) or number >= len(questions):
    return {}
  facts = questions[number]
  return facts if isinstance(facts, dict) else {}


def _kind(
  text: str, answer: str, facts: dict[str, Any], at: str
) -> tuple[Kind, str, tuple[str, ...]]:
  """Returns the kind, the right answer, and the options."""
  answer = answer.strip()
  if facts.get("letter") is not None:
    options = fields.options({"options": facts.get("options")}, at)
    return "choice", fields.letter(str(facts["letter"]), options, at), options
  # Facts whose letter is null are those of a question without options.
  if "letter" not in facts:
    _, options = fields.split_options(text)
    probe = Question("", "", text, "", "choice", options)
    if options and (right := _letter(answer, probe, at)):
      return "choice", right, options
  if normalise(answer) in ("yes", "no"):
    return "yes_no", normalise(answer), ()
  return "open", answer, ()


def _letter(answer: str, probe: Question, at: str) -> str | None:
  """Returns the letter that an answer names; None if it is in words."""
  letter = parse(answer, probe)
  if letter is None and re.fullmatch(rf"\(?[{LETTERS}]\)?[.:]?", answer):
    # The answer is a letter that no option has, which raises the error.
    return fields.letter(answer, probe.options, at)
  return letter


def _extra(record: Record, facts: dict[str, Any]) -> dict[str, Any]:
  """Returns the further fields by which a report groups."""
  extra: dict[str, Any] = {
    key: facts[key]
    for key in ("topic", "format", "needle_kind")
    if facts.get(key)
  }
  if record.source:
    extra["source"] = record.source
  if facts:
    extra["needle"] = bool(facts.get("needle"))
    extra["hidden"] = bool(facts.get("dropped"))
    if depth := _depth(facts, record):
      extra["depth"] = depth
  return extra


def _depth(facts: dict[str, Any], record: Record) -> str:
  """Returns the fifth of the video that shows a needle, such as "20-40 %"."""
  span, duration = facts.get("seconds"), record.extra.get("duration")
  if not (facts.get("needle") and span and duration):
    return ""
  share = span[0] / duration
  fifth = min(int(share * 5), 4)
  return f"{20 * fifth}-{20 * fifth + 20} %"
