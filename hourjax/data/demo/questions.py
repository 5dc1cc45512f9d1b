"""Questions about a demo video; the answer is computed from its script.

There is one function for each kind of question. It takes `(script, rng, yes)`
and returns a `DemoQuestion`, or None where the video offers no such question
with a single right answer. `yes` says which answer a yes-or-no question must
have, so that both answers are equally frequent.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from hourjax.data.demo import world
from hourjax.data.demo.script import Needle, Scene, Script

Rng = np.random.Generator
T = TypeVar("T")
# Which of two places is shown longer is asked only where the longer time is at
# least this multiple of the other.
CLEARLY_LONGER = 1.2
# Number of different events of scenes.
_EVENTS = len(world.COLOURS) * len(world.KINDS) * len(world.ACTIONS)
# What another scene may differ in, and the values.
_ALTERED: tuple[tuple[str, tuple[str, ...]], ...] = (
  ("action", tuple(world.ACTIONS)),
  ("colour", tuple(world.COLOURS)),
  ("kind", world.KINDS),
)


@dataclasses.dataclass(frozen=True)
class DemoQuestion:
  """Holds a question before it is written in a format.

  Attributes:
    task: a key of `world.TASKS`.
    text: the question.
    answer: the right answer, as an open answer or as an option.
    wrong: wrong answers, from which options are drawn; with fewer than three
      the question can only be open.
    open_answers: number of possible answers of the open form, which sets the
      accuracy of guessing; 0 if the question has no open form.
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
    """Returns the formats in which this may be asked."""
    forms = ("open",) if self.open_answers else ()
    return (*forms, "multiple_choice") if len(self.wrong) >= 3 else forms

  @property
  def chance(self) -> float:
    """Returns the accuracy of guessing the answer of the open form."""
    return 1 / self.open_answers


def needle_question(needle: Needle) -> DemoQuestion:
  """Asks for the colour of a needle's card."""
  return DemoQuestion(
    task="object_attribute",
    text=f"What colour is the {needle.kind}?",
    answer=needle.colour,
    wrong=others(world.NEEDLE_COLOURS, needle.colour),
    open_answers=len(world.NEEDLE_COLOURS),
    span=needle.spans[0],
    needle=needle,
  )


def others(items: Iterable[str], *banned: str) -> tuple[str, ...]:
  """Returns the items that are not banned, in order."""
  return tuple(item for item in items if item not in banned)


def pick(rng: Rng, items: Sequence[T]) -> T:
  """Draws one of the items, of which there must be some."""
  return items[int(rng.integers(len(items)))]


def pick_if_any(rng: Rng, items: Sequence[T]) -> T | None:
  """Draws one of the items; returns None if there are none."""
  return pick(rng, items) if items else None


def pick_two(rng: Rng, items: list[T]) -> list[T] | None:
  """Draws two items in random order; returns None if there are fewer."""
  if len(items) < 2:
    return None
  return [items[i] for i in rng.permutation(len(items))[:2]]


def unique_scenes(script: Script, *fields: str) -> list[Scene]:
  """Returns the scenes whose values of these fields no other scene has."""
  keys = [tuple(getattr(s, f) for f in fields) for s in script.scenes]
  return [s for s, key in zip(script.scenes, keys) if keys.count(key) == 1]


def places_of(script: Script) -> list[str]:
  """Returns the places in the order of their first appearance."""
  return list(dict.fromkeys(s.place for s in script.scenes))


def seconds_of_place(script: Script, place: str) -> int:
  """Returns how many seconds a place is shown, those of needles included."""
  return sum(s.end - s.start for s in script.scenes if s.place == place)


def next_scene(script: Script, scene: Scene) -> Scene | None:
  """Returns the next scene, None after the last one."""
  index = script.scenes.index(scene) + 1
  return script.scenes[index] if index < len(script.scenes) else None


def yes_no_question(task: str, text: str, yes: bool) -> DemoQuestion:
  """Makes an open question whose answer is yes or no."""
  return DemoQuestion(task, text, "yes" if yes else "no", open_answers=2)


def scene_question(
  task: str, text: str, scene: Scene, answer: str, items: Sequence[str]
) -> DemoQuestion:
  """Makes a question about one scene, with `items` as possible answers."""
  wrong = others(items, answer)
  span = (scene.start, scene.end)
  return DemoQuestion(task, text, answer, wrong, len(items), span)


def _first_or_last(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  word, scene = pick(
    rng, [("first", script.scenes[0]), ("last", script.scenes[-1])]
  )
  text = f"Which place is shown {word}?"
  return scene_question(
    "temporal_perception", text, scene, scene.place, world.PLACES
  )


def _longest(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  places = sorted(places_of(script), key=lambda p: -seconds_of_place(script, p))
  if seconds_of_place(script, places[0]) < CLEARLY_LONGER * seconds_of_place(
    script, places[1]
  ):
    return None
  return DemoQuestion(
    "duration_perception",
    "Which place is shown longest?",
    places[0],
    tuple(places[1:]),
    len(world.PLACES),
  )


def _longer_than(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  pair = pick_two(rng, places_of(script))
  assert pair is not None  # every script has four scenes
  short, long = sorted(pair, key=lambda p: seconds_of_place(script, p))
  if seconds_of_place(script, long) < CLEARLY_LONGER * seconds_of_place(
    script, short
  ):
    return None
  text = f"Which is shown longer, the {pair[0]} or the {pair[1]}?"
  return DemoQuestion("temporal_reasoning", text, long, open_answers=2)


def _gap(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  pair = pick_two(rng, unique_scenes(script, "place"))
  if pair is None:
    return None
  one, two = sorted(pair, key=lambda s: s.start)
  gap = two.start - one.start
  # Each option is twice the one before, such as 30, 60, 120, 240 with 60 the
  # answer, whose place among them is random.
  below = int(rng.integers(4))
  rungs = [round(gap * 2.0 ** (i - below)) for i in range(4)]
  if rungs[0] < 5:
    return None
  text = (
    f"How long after the start of the {one.place} does the {two.place} start?"
  )
  options = [f"{r} seconds" for r in rungs]
  answer = f"{gap} seconds"
  wrong = others(options, answer)
  span = (one.start, two.start)
  return DemoQuestion("temporal_gap_estimation", text, answer, wrong, span=span)


def _which_first(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  places = places_of(script)
  pair = pick_two(rng, places)
  assert pair is not None  # every script has four scenes
  one, two = pair
  answer = min(one, two, key=places.index)
  text = f"Which is shown first, the {one} or the {two}?"
  return DemoQuestion("temporal_order", text, answer, open_answers=2)


def _earliest(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  places = places_of(script)
  first = int(rng.integers(max(len(places) - 3, 1)))
  text = "Which of these places is shown first?"
  return DemoQuestion(
    "temporal_order", text, places[first], tuple(places[first + 1 :])
  )


def _where(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scene = pick_if_any(rng, unique_scenes(script, "kind", "place"))
  if scene is None:
    return None
  text = f"In which corner is the {scene.kind} in the {scene.place}?"
  return scene_question(
    "spatial_perception", text, scene, scene.spot, world.SPOTS
  )


def _same_side(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  pair = pick_two(rng, unique_scenes(script, "place"))
  if pair is None or (pair[0].side == pair[1].side) != yes:
    return None
  one, two = (s.place for s in pair)
  text = f"Are the objects in the {one} and the {two} on the same side?"
  return yes_no_question("spatial_reasoning", text, yes)


def _which_object(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scene = pick_if_any(rng, unique_scenes(script, "place"))
  if scene is None:
    return None
  text = f"Which object is in the {scene.place}?"
  return scene_question(
    "object_recognition", text, scene, scene.kind, world.KINDS
  )


def _colour(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scene = pick_if_any(rng, unique_scenes(script, "kind", "place"))
  if scene is None:
    return None
  text = f"What colour is the {scene.kind} in the {scene.place}?"
  return scene_question(
    "object_attribute", text, scene, scene.colour, tuple(world.COLOURS)
  )


def _most_scenes(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  kinds = collections.Counter(s.kind for s in script.scenes)
  (kind, most), *rest = kinds.most_common()
  if rest and rest[0][1] == most:
    return None
  return DemoQuestion(
    "object_reasoning",
    "Which object is in the most scenes?",
    kind,
    others(world.KINDS, kind),
    len(world.KINDS),
  )


def _exists(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  seen = {s.actor for s in script.scenes}
  every = [f"{c} {k}" for c in world.COLOURS for k in world.KINDS]
  actor = pick(rng, [a for a in every if (a in seen) == yes])
  article = "an" if actor[0] in "aeiou" else "a"
  text = f"Is there {article} {actor} in the video?"
  return yes_no_question("object_existence", text, yes)


def _returns(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  # The actors of exactly two scenes, in two places that are shown once.
  pairs = []
  for one in unique_scenes(script, "place"):
    again = [s for s in script.scenes if s.actor == one.actor and s != one]
    if len(again) == 1 and again[0] in unique_scenes(script, "place"):
      pairs.append((one, again[0]))
  pair = pick_if_any(rng, pairs)
  if pair is None:
    return None
  one, again = pair
  elsewhere = others(world.PLACES, one.place)
  text = f"Where else is the {one.actor} of the {one.place}?"
  return scene_question(
    "object_permanence", text, again, again.place, elsewhere
  )


def _does_what(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scene = pick_if_any(rng, unique_scenes(script, "kind", "place"))
  if scene is None:
    return None
  text = f"What does the {scene.kind} in the {scene.place} do?"
  return scene_question(
    "action_recognition", text, scene, scene.action, tuple(world.ACTIONS)
  )


def _half(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scenes = unique_scenes(script, "kind", "action")
  middle = script.duration / 2
  # A scene that lies in both halves has no answer. Either half is as frequent
  # where there are scenes in both.
  halves = (
    [s for s in scenes if s.end <= middle],
    [s for s in scenes if s.start >= middle],
  )
  some = [number for number in range(2) if halves[number]]
  number = pick_if_any(rng, some)
  if number is None:
    return None
  scene = pick(rng, halves[number])
  answer = world.HALVES[number]
  text = f"In which half is the {scene.kind} that {scene.action}?"
  return scene_question(
    "action_localization", text, scene, answer, world.HALVES
  )


def _next_action(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scenes = unique_scenes(script, "place")
  scene = pick_if_any(rng, [s for s in scenes if next_scene(script, s)])
  if scene is None:
    return None
  after = next_scene(script, scene)
  assert after is not None  # the scene was chosen so
  text = f"What does the object right after the {scene.place} do?"
  return scene_question(
    "action_sequence", text, after, after.action, tuple(world.ACTIONS)
  )


def _same_action(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  pair = pick_two(rng, unique_scenes(script, "place"))
  if pair is None or (pair[0].action == pair[1].action) != yes:
    return None
  one, two = (s.place for s in pair)
  text = f"Do the objects in the {one} and the {two} move alike?"
  return yes_no_question("action_reasoning", text, yes)


def _in_place(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scene = pick_if_any(rng, unique_scenes(script, "actor"))
  if scene is None:
    return None
  text = f"Where is the {scene.actor}?"
  return scene_question(
    "scene_recognition", text, scene, scene.place, world.PLACES
  )


def _next_place(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scenes = unique_scenes(script, "place")
  scene = pick_if_any(rng, [s for s in scenes if next_scene(script, s)])
  if scene is None:
    return None
  after = next_scene(script, scene)
  assert after is not None  # the scene was chosen so
  # Places change at every cut, so the answer is one of the seven others.
  elsewhere = others(world.PLACES, scene.place)
  text = f"Which place follows the {scene.place}?"
  return scene_question("scene_transition", text, after, after.place, elsewhere)


def _altered(rng: Rng, script: Script, event: str) -> tuple[str, ...]:
  """Returns three events that do not happen in the video."""
  happened = {s.event for s in script.scenes}
  events: list[str] = []
  while len(events) < 3:
    scene = pick(rng, script.scenes)
    field, items = pick(rng, _ALTERED)
    changes: dict[str, Any] = {field: pick(rng, items)}
    other = dataclasses.replace(scene, **changes).event
    if other not in happened and other not in events:
      events.append(other)
  return tuple(events)


def _event(
  task: str, text: str, script: Script, scene: Scene, rng: Rng
) -> DemoQuestion:
  """Asks for the event of a scene; the wrong ones happen, if enough do."""
  events = dict.fromkeys(s.event for s in script.scenes)
  wrong = others(events, scene.event)
  if len(wrong) < 3:
    wrong += _altered(rng, script, scene.event)[: 3 - len(wrong)]
  span = (scene.start, scene.end)
  return DemoQuestion(task, text, scene.event, wrong, _EVENTS, span)


def _next_event(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scenes = unique_scenes(script, "place")
  scene = pick_if_any(rng, [s for s in scenes if next_scene(script, s)])
  if scene is None:
    return None
  after = next_scene(script, scene)
  assert after is not None  # the scene was chosen so
  text = f"What happens right after the {scene.place}?"
  return _event("event_sequence", text, script, after, rng)


def _key_event(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scene = pick_if_any(rng, unique_scenes(script, "place"))
  if scene is None:
    return None
  text = f"What happens in the {scene.place}?"
  return _event("key_event_extraction", text, script, scene, rng)


def in_order(part: list[str], whole: list[str]) -> bool:
  """Returns whether `part` is `whole` with some items left out."""
  rest = iter(whole)
  return all(item in rest for item in part)


def _summary(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  whole = [s.place for s in script.scenes]
  part = whole[:3]
  wrong = []
  for order in rng.permutation(list(itertools.permutations(range(3)))):
    mixed = [part[i] for i in order]
    if not in_order(mixed, whole) and " ".join(mixed) not in wrong:
      wrong.append(" ".join(mixed))
  if len(set(part)) < 3 or len(wrong) < 3:
    return None
  places = len(world.PLACES)
  return DemoQuestion(
    "event_summarization",
    "Which three places are shown first, in order?",
    " ".join(part),
    tuple(wrong[:3]),
    places * (places - 1) * (places - 2),
  )


QuestionMaker = Callable[[Script, Rng, bool], DemoQuestion | None]
QUESTION_MAKERS: dict[str, tuple[QuestionMaker, ...]] = {
  "temporal_perception": (_first_or_last,),
  "duration_perception": (_longest,),
  "temporal_reasoning": (_longer_than,),
  "temporal_gap_estimation": (_gap,),
  "temporal_order": (
    _which_first,
    _earliest,
  ),
  "spatial_perception": (_where,),
  "spatial_reasoning": (_same_side,),
  "object_recognition": (_which_object,),
  "object_attribute": (_colour,),
  "object_reasoning": (_most_scenes,),
  "object_existence": (_exists,),
  "object_permanence": (_returns,),
  "action_recognition": (_does_what,),
  "action_localization": (_half,),
  "action_sequence": (_next_action,),
  "action_reasoning": (_same_action,),
  "scene_recognition": (_in_place,),
  "scene_transition": (_next_place,),
  "event_sequence": (_next_event,),
  "key_event_extraction": (_key_event,),
  "event_summarization": (_summary,),
}
