"""VideoMarathon records: questions in their formats, balanced over a split."""

import collections

import numpy as np

from hourjax.data.demo import ask, world
from hourjax.data.demo.ask import Ask
from hourjax.data.demo.questions import ASKERS
from hourjax.data.demo.script import SPLITS, Script

LETTERS = "ABCD"
FORMATS = ("open", "multiple_choice")
INSTRUCTION = "Answer with the letter."
TURNS = (1, 2, 1, 5)  # questions in a video's training conversations
TEST_OTHERS = 12  # questions about a test video besides the one for its needle


class Writer:
  """Writes the records of one split's videos, in the order of the calls.

  Right letters, yes and no, tasks and formats are balanced over all calls,
  so a writer's output depends on the seed and on the calls before. A record
  is SPEC section 2's, with `questions`: what is known about each human turn.
  """

  def __init__(self, seed: int, split: str):
    code = SPLITS.index(split)
    self._rng = np.random.default_rng([seed, code, 0, 1])
    self._decks: dict[str, list[str]] = collections.defaultdict(list)
    self._used: collections.Counter = collections.Counter()

  def train(self, script: Script, conversations: int) -> list[dict]:
    """Conversations of one to five questions, one of them for the needle.

    No two questions of a conversation share a task, so that no answer gives
    another one away.
    """
    records = []
    for number in range(conversations):
      turns = [self._turn(ask.needle_ask(script.needle), "open")]
      turns += self._others(script, TURNS[number % len(TURNS)] - 1)
      turns = [turns[i] for i in self._rng.permutation(len(turns))]
      records.append(_record(script, number, turns))
    return records

  def test(self, script: Script) -> list[dict]:
    """One question a record: for the needle, and for others."""
    turns = [self._turn(ask.needle_ask(script.needle), "open")]
    turns += self._others(script, TEST_OTHERS)
    return [_record(script, i, [turn]) for i, turn in enumerate(turns)]

  def _deal(self, deck: str, cards, keep: bool = False) -> str:
    """The next of the shuffled cards; all come before one comes again.

    A plain cycle would give each video's first question the same letter.
    """
    pile = self._decks[deck]
    if not pile:
      pile.extend(cards[i] for i in self._rng.permutation(len(cards)))
    return pile[-1] if keep else pile.pop()

  def _others(self, script: Script, count: int) -> list[tuple]:
    """Questions of different tasks, those asked least so far first."""
    pairs = [(task, form) for task in world.TASKS for form in FORMATS]
    pairs = [pairs[i] for i in self._rng.permutation(len(pairs))]
    pairs.sort(key=self._used.__getitem__)
    turns: dict[str, tuple] = {}
    for task, form in pairs:
      if len(turns) == count:
        break
      found = None if task in turns else self._find(script, task, form)
      if found is not None:
        self._used[task, form] += 1
        turns[task] = self._turn(found, form)
    return list(turns.values())

  def _find(self, script: Script, task: str, form: str) -> Ask | None:
    """A question of this task and format, if some tries find one."""
    yes = self._deal(f"{task} yes", ("yes", "no"), keep=True) == "yes"
    for asker in ASKERS[task] * 3:
      found = asker(script, self._rng, yes)
      if found is not None and form in found.formats:
        return found
    return None

  def _turn(self, found: Ask, form: str) -> tuple[str, str, dict]:
    """The human's text, the assistant's text and what is known about it."""
    if found.answer in ("yes", "no"):
      self._deal(f"{found.task} yes", ("yes", "no"))
    needle = found.needle
    facts = {
      "topic": world.TASKS[found.task][0],
      "task": found.task,
      "format": form,
      "answer": found.answer,
      "options": None,
      "letter": None,
      "needle": needle is not None,
      "dropped": needle.dropped if needle else None,
      "seconds": list(found.span) if found.span else None,
    }
    if form == "open":
      return found.text, found.answer, {**facts, "chance": found.chance}
    wrong = self._rng.permutation(len(found.wrong))[: len(LETTERS) - 1]
    options = [found.wrong[i] for i in wrong]
    letter = self._deal(f"{found.task} letter", LETTERS)
    options.insert(LETTERS.index(letter), found.answer)
    lines = [f"{name}. {text}" for name, text in zip(LETTERS, options)]
    facts |= {"options": options, "letter": letter, "chance": 1 / len(options)}
    return "\n".join([found.text, *lines, INSTRUCTION]), letter, facts


def _record(script: Script, number: int, turns: list[tuple]) -> dict:
  talk = []
  for i, (question, answer, _) in enumerate(turns):
    mark = "<image>\n" if i == 0 else ""
    talk.append({"from": "human", "value": mark + question})
    talk.append({"from": "gpt", "value": answer})
  return {
    "id": f"{script.name}-{number:02d}",
    "video": f"{script.name}.mp4",
    "data_source": "demo",
    "duration": float(script.duration),
    "conversations": talk,
    "questions": [facts for _, _, facts in turns],
  }
