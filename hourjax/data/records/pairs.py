"""Pairs of answers: a chosen one, and a rejected one to the same question.

However a record writes them, `joined_pair` returns the usual turns, which end
with the chosen answer, and the rejected one under "rejected":

    turns       {"from": "gpt", "value": "red", "rejected": "I think red"}
    beside      "conversations": [...], "rejected": "I think red"
    messages    "chosen": [..., {"role": "assistant", "content": "red"}],
                "rejected": [..., {"role": "assistant", ...}]
    texts       "prompt": "What colour?", "chosen": "red", "rejected": "..."
    last turns  "conversations": [..., the question],
                "chosen": {"from": "gpt", ...}, "rejected": {...}
"""

from collections.abc import Collection, Mapping
from typing import Any

from hourjax.errors import UserError
from hourjax.schema import shorten

CHOSEN, REJECTED = "chosen", "rejected"
_QUESTIONS = ("prompt", "question")


def joined_pair(
  raw: Mapping[str, Any], talks: Collection[str], at: str
) -> dict[str, Any]:
  """Returns a raw record with its rejected answer as text, if it has one.

  Args:
    raw: as read; a record that is no pair is returned as it is.
    talks: keys under which turns may lie.
    at: file, place and record, for messages.

  Raises:
    UserError: one answer of the pair lacks, is empty, or they are the same.
  """
  result = dict(raw)
  talk = next((key for key in talks if raw.get(key) is not None), None)
  turns = raw.get(talk) if talk else None
  chosen, rejected = raw.get(CHOSEN), raw.get(REJECTED)
  if isinstance(chosen, str | list | Mapping):
    if rejected is None:
      raise UserError(
        f"{at}: 'chosen' is {shorten(chosen)} and there is no 'rejected';"
        " add the answer that it is preferred to, or write it as a usual turn"
      )
    result.pop(CHOSEN)
    if isinstance(chosen, list):
      _check_same_question(chosen, rejected, at)
      turns = chosen
    else:
      question = next((k for k in _QUESTIONS if raw.get(k) is not None), None)
      if turns is None and question is not None:
        turns = [{"from": "human", "value": result.pop(question)}]
      last = {"from": "gpt", "value": _text(chosen, CHOSEN, at)}
      turns = [*(turns if isinstance(turns, list) else []), last]
    result[talk or "conversations"] = turns
  listed: list[Any] = turns if isinstance(turns, list) else []
  own = [
    (number, turn)
    for number, turn in enumerate(listed)
    if isinstance(turn, Mapping) and REJECTED in turn
  ]
  if own:
    number, turn = own[0]
    if number != len(listed) - 1:
      raise UserError(
        f"{at}: turn {number} of {len(listed)} has a rejected answer; only the"
        " last turn may: end the record there"
      )
    rejected = turn[REJECTED]
    if rejected is None:
      raise UserError(
        f"{at}: turn {number} has a rejected answer that is null; write it, or"
        " take the key out"
      )
  if not isinstance(rejected, str | list | Mapping):
    return result
  text = _text(rejected, REJECTED, at)
  if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
    said = turns[-1].get("value", turns[-1].get("content"))
    if isinstance(said, str) and said.strip() == text.strip():
      raise UserError(
        f"{at}: the chosen answer and the rejected one are both"
        f" {shorten(text)}; drop the record, or correct one of them"
      )
  result[REJECTED] = text
  return result


def _text(answer: Any, name: str, at: str) -> str:
  """Returns the words of an answer: a text, a turn, or the last of turns."""
  last = answer[-1] if isinstance(answer, list) and answer else answer
  if isinstance(last, Mapping):
    last = last.get("value", last.get("content"))
  if not isinstance(last, str) or not last.strip():
    raise UserError(
      f"{at}: the {name} answer is {shorten(answer)}; it must be text that is"
      " not empty"
    )
  return last


def _check_same_question(chosen: list, rejected: Any, at: str) -> None:
  """Raises a UserError unless two conversations differ only in their end."""
  if isinstance(rejected, list) and chosen[:-1] != rejected[:-1]:
    raise UserError(
      f"{at}: 'chosen' asks {shorten(chosen[:-1])} and 'rejected'"
      f" {shorten(rejected[:-1])}; a pair answers one question: make these the"
      " same"
    )
