"""A question before it gets its format, and what questions are made from."""

import dataclasses

import numpy as np

from hourjax.data.demo import world
from hourjax.data.demo.script import Needle, Scene, Script


@dataclasses.dataclass(frozen=True)
class Ask:
  """A question before it gets its format.

  Attributes:
    task: a key of `world.TASKS`.
    text: the question.
    answer: the right answer, as an open answer or as an option.
    wrong: wrong answers to draw options from; fewer than three: open only.
    open_answers: how many answers an open question has in this world, so
      that chance is one in so many; 0: multiple choice only.
    span: seconds (start, end) that show the answer; None if spread out.
    needle: the needle asked for, if any.
  """

  task: str
  text: str
  answer: str
  wrong: tuple[str, ...] = ()
  open_answers: int = 0
  span: tuple[int, int] | None = None
  needle: Needle | None = None

  @property
  def formats(self) -> tuple[str, ...]:
    """The formats in which this may be asked."""
    forms = ("open",) if self.open_answers else ()
    return (*forms, "multiple_choice") if len(self.wrong) >= 3 else forms

  @property
  def chance(self) -> float:
    """Accuracy of guessing an open question's answer."""
    return 1 / self.open_answers


def needle_ask(needle: Needle) -> Ask:
  """The question for the colour of a needle's card."""
  return Ask(
    task="object_attribute",
    text=f"What colour is the {needle.kind} that appears briefly?",
    answer=needle.colour,
    wrong=others(world.NEEDLE_COLOURS, needle.colour),
    open_answers=len(world.NEEDLE_COLOURS),
    span=needle.spans[0],
    needle=needle,
  )


def others(items, *banned: str) -> tuple[str, ...]:
  """The items that are not banned, in order."""
  return tuple(item for item in items if item not in banned)


def pick(rng: np.random.Generator, items):
  """One item at random; None if there is none."""
  return items[int(rng.integers(len(items)))] if items else None


def two_of(rng: np.random.Generator, items: list) -> list | None:
  """Two different items in random order; None if there are not as many."""
  if len(items) < 2:
    return None
  return [items[i] for i in rng.permutation(len(items))[:2]]


def lone(script: Script, *fields: str) -> list[Scene]:
  """The scenes that share the values of these fields with no other scene."""
  keys = [tuple(getattr(s, f) for f in fields) for s in script.scenes]
  return [s for s, key in zip(script.scenes, keys) if keys.count(key) == 1]


def places_of(script: Script) -> list[str]:
  """The places in the order of their first appearance."""
  return list(dict.fromkeys(s.place for s in script.scenes))


def shown(script: Script, place: str) -> int:
  """Seconds for which a place is shown, needles included."""
  return sum(s.end - s.start for s in script.scenes if s.place == place)


def following(script: Script, scene: Scene) -> Scene | None:
  """The next scene; None after the last."""
  index = script.scenes.index(scene) + 1
  return script.scenes[index] if index < len(script.scenes) else None


def yes_no(task: str, text: str, yes: bool) -> Ask:
  """An open question for yes or no."""
  return Ask(task, text, "yes" if yes else "no", open_answers=2)


def about_scene(task, text, scene, answer, items) -> Ask:
  """A short question: `items` are all the answers there are."""
  wrong = others(items, answer)
  span = (scene.start, scene.end)
  return Ask(task, text, answer, wrong, len(items), span)
