"""What a record says of each of its questions, beside question and answer."""

import re
from typing import Any

from hourjax.data.records.record import Record
from hourjax.data.records.turns import Turn

FACTS = ("topic", "task", "format")

# "B", "B." or "B. a dog", but neither "A dog" nor "(B)", whose first token is
# the same for all letters.
_LETTER = re.compile(r"([A-Z])(?:[.):]|\s*$|\s*\n)")


def question_facts(record: Record) -> list[tuple[str, ...]]:
  """Returns topic, task and format of each answer's question, "" if unknown.

  A record has them in `questions`, one by one, or, the same for all questions,
  beside its turns.
  """
  count = sum(turn.role == "gpt" for turn in record.turns)
  found = record.extra.get("questions")
  if not isinstance(found, list) or len(found) != count:
    found = [record.extra] * count

  def text(facts: Any, name: str) -> str:
    value = facts.get(name) if isinstance(facts, dict) else None
    return value if isinstance(value, str) else ""

  return [tuple(text(facts, name) for name in FACTS) for facts in found]


def letter_answers(turns: tuple[Turn, ...]) -> list[bool]:
  r"""Returns of each answer whether it begins with the letter of an option.

  The question before it must list options, that letter's among them:

      Who?\nA. a cat\nB. a dog     "B"  "B."  "B. a dog"     yes
      Who?\nA. a cat\nB. a dog     "A dog"  "C"  "(B)"       no
      Which letter is shown?       "B"                       no
  """
  found, question = [], ""
  for turn in turns:
    if turn.role == "human":
      question = turn.text
      continue
    match = _LETTER.match(turn.text)
    letters = {"A", "B", match[1]} if match else set()
    found.append(
      bool(letters)
      and all(
        re.search(rf"(?:^|[\s(]){letter}[.):]", question) for letter in letters
      )
    )
  return found
