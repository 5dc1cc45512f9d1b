"""Questions about a demo video; the answer is computed from its script.

There is one function for each kind of question. It takes `(script, rng, yes)`
and returns a `DemoQuestion`, or None where the video offers no such question
with a single right answer. `yes` says which answer a yes-or-no question must
have, so that both answers are equally frequent.

A question that compares two things in a video is answered with both and the
result, such as "left, right: no". A model of this size learns to name them, and
to compare what it named, long before it compares what it sees.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from hourjax.data.demo import world
from hourjax.data.demo.script import Clip, Needle, Scene, Script

Rng = np.random.Generator
T = TypeVar("T")
# Which of two places is shown longer is asked only where the longer time is at
# least this multiple of the other.
CLEARLY_LONGER = 1.2
# What another scene may differ in, and the values.
_ALTERED: tuple[tuple[str, tuple[str, ...]], ...] = (
  ("place", world.PLACES),
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
    needle: the card or clip asked for, if any.
    needle_kind: "card", "clip, order" or "clip, word"; empty without needle.
    yes: whether the answer is or ends with "yes"; None if it is neither.
  """

  task: str
  text: str
  answer: str
  wrong: tuple[str, ...] = ()
  open_answers: int = 0
  span: tuple[int, int] | None = None
  needle: Needle | Clip | None = None
  needle_kind: str = ""
  yes: bool | None = None

  @property
  def format(self) -> str:
    """Returns "open", or "multiple_choice" if there is no open form.

    A model of this size learns to name things long before it learns to match
    what it would name with four options.
    """
    return "open" if self.open_answers else "multiple_choice"

  @property
  def chance(self) -> float:
    """Returns the accuracy of guessing the answer of the open form."""
    return 1 / self.open_answers


def card_question(needle: Needle) -> DemoQuestion:
  """Asks for the colour of a needle's card."""
  return DemoQuestion(
    task="object_attribute",
    text=f"What colour is the {needle.kind} that appears briefly?",
    answer=needle.colour,
    wrong=others(world.NEEDLE_COLOURS, needle.colour),
    open_answers=len(world.NEEDLE_COLOURS),
    span=needle.spans[0],
    needle=needle,
    needle_kind="card",
  )


def clip_question(clip: Clip, about: str) -> DemoQuestion:
  """Asks about a moving clip.

  Args:
    clip: asked about.
    about: "word" for what it says; "first" or "last" for what moves in it
      first or last.
  """
  if about == "word":
    task, text = "object_attribute", "What does the clip say?"
    answer, items, kind = clip.word, world.CLIP_WORDS, "clip, word"
  else:
    task, text = "action_sequence", f"What moves {about} in the clip?"
    answer = clip.things[0 if about == "first" else 1]
    items, kind = world.CLIP_THINGS, "clip, order"
  return DemoQuestion(
    task,
    text,
    answer,
    others(items, answer),
    len(items),
    clip.spans[0],
    clip,
    kind,
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
  answer = "yes" if yes else "no"
  return DemoQuestion(task, text, answer, open_answers=2, yes=yes)


def both_question(
  task: str, text: str, values: Sequence[str], items: Sequence[str]
) -> DemoQuestion:
  """Makes an open question whose answer is two values, of those in `items`."""
  return DemoQuestion(
    task, text, ", ".join(values), open_answers=len(items) ** 2
  )


def same_question(
  task: str, text: str, values: Sequence[str], items: Sequence[str]
) -> DemoQuestion:
  """Asks whether two values, of those in `items`, are the same.

  Half of the time they are, whatever the items, so the best guess is right once
  in twice their number.
  """
  one, two = values
  result = "yes" if one == two else "no"
  return DemoQuestion(
    task,
    text,
    f"{one}, {two}: {result}",
    open_answers=2 * len(items),
    yes=one == two,
  )


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
  one, two = (long, short) if yes else (short, long)
  text = f"Is the {one} shown longer than the {two}?"
  return yes_no_question("temporal_reasoning", text, yes)


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


def _where(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scene = pick_if_any(rng, unique_scenes(script, "kind", "place"))
  if scene is None:
    return None
  text = f"In which corner is the {scene.kind} in the {scene.place}?"
  return scene_question(
    "spatial_perception", text, scene, scene.spot, world.SPOTS
  )


def _same_side(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  pair = pick_two(rng, unique_scenes(script, "kind", "place"))
  if pair is None or (pair[0].side == pair[1].side) != yes:
    return None
  one, two = (f"the {s.kind} in the {s.place}" for s in pair)
  text = f"Are {one} and {two} on the same side, left or right?"
  sides = [scene.side for scene in pair]
  return same_question("spatial_reasoning", text, sides, world.SIDES)


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


def _count(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  kinds = [s.kind for s in script.scenes]
  counts = [str(n) for n in range(1, 5)]
  kind = pick_if_any(rng, sorted({k for k in kinds if kinds.count(k) <= 4}))
  if kind is None:
    return None
  answer = str(kinds.count(kind))
  text = f"How many scenes have a {kind}?"
  return DemoQuestion(
    "object_reasoning", text, answer, others(counts, answer), 4
  )


def _exists(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  seen = {s.actor for s in script.scenes}
  every = [f"{c} {k}" for c in world.COLOURS for k in world.KINDS]
  actor = pick(rng, [a for a in every if (a in seen) == yes])
  article = "an" if actor[0] in "aeiou" else "a"
  text = f"Is there {article} {actor} in the video?"
  return yes_no_question("object_existence", text, yes)


def _elsewhere(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  actors = [s.actor for s in script.scenes]
  scenes = unique_scenes(script, "actor", "place")
  scene = pick_if_any(rng, [s for s in scenes if actors.count(s.actor) == 2])
  if scene is None:
    return None
  # The other one is in another place, or neither would be unique.
  (other,) = (s for s in scenes if s.actor == scene.actor and s != scene)
  text = f"Where else is the {scene.actor} of the {scene.place}?"
  places = others(world.PLACES, scene.place)
  return scene_question("object_permanence", text, other, other.place, places)


def _does_what(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scene = pick_if_any(rng, unique_scenes(script, "kind", "place"))
  if scene is None:
    return None
  text = f"What is the {scene.kind} in the {scene.place} doing?"
  return scene_question(
    "action_recognition", text, scene, scene.action, world.ACTIONS
  )


def _quarter(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scene = pick_if_any(rng, unique_scenes(script, "actor", "action"))
  if scene is None:
    return None
  place = scene.start / script.duration * 4
  # A start close to a quarter's border has no clear answer.
  if scene.start and min(place % 1, 1 - place % 1) < 0.08:
    return None
  text = f"In which quarter does the {scene.actor} start {scene.action}?"
  answer = world.QUARTERS[int(place)]
  return scene_question(
    "action_localization", text, scene, answer, world.QUARTERS
  )


def _next_action(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  scenes = unique_scenes(script, "place")
  scene = pick_if_any(rng, [s for s in scenes if next_scene(script, s)])
  if scene is None:
    return None
  after = next_scene(script, scene)
  assert after is not None  # the scene was chosen so
  text = f"What is the object right after the {scene.place} doing?"
  return scene_question(
    "action_sequence", text, after, after.action, world.ACTIONS
  )


def _same_action(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  pair = pick_two(rng, unique_scenes(script, "kind", "place"))
  if pair is None or (pair[0].action == pair[1].action) != yes:
    return None
  one, two = (f"the {s.kind} in the {s.place}" for s in pair)
  text = f"Do {one} and {two} move alike?"
  actions = [scene.action for scene in pair]
  return same_question("action_reasoning", text, actions, world.ACTIONS)


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


def _altered(rng: Rng, script: Script) -> str:
  """Returns a title like those of the video, of an event not in it."""
  happened = {s.title for s in script.scenes}
  while True:
    scene = pick(rng, script.scenes)
    field, items = pick(rng, _ALTERED)
    changes: dict[str, Any] = {field: pick(rng, items)}
    title = dataclasses.replace(scene, **changes).title
    if title not in happened:
      return title


def _first_and_last(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  text = "Which object comes first, and which one last?"
  kinds = script.scenes[0].kind, script.scenes[-1].kind
  return both_question("event_sequence", text, kinds, world.KINDS)


def _key_event(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  title = pick(rng, script.scenes).title if yes else _altered(rng, script)
  article = "an" if title[0] in "aeiou" else "a"
  text = f"Does the video show {article} {title}?"
  return yes_no_question("key_event_extraction", text, yes)


def _summary(script: Script, rng: Rng, yes: bool) -> DemoQuestion | None:
  text = "Where does the video begin, and where does it end?"
  places = script.scenes[0].place, script.scenes[-1].place
  return both_question("event_summarization", text, places, world.PLACES)


QuestionMaker = Callable[[Script, Rng, bool], DemoQuestion | None]
QUESTION_MAKERS: dict[str, tuple[QuestionMaker, ...]] = {
  "temporal_perception": (_first_or_last,),
  "duration_perception": (_longest,),
  "temporal_reasoning": (_longer_than,),
  "temporal_gap_estimation": (_gap,),
  "temporal_order": (_which_first,),
  "spatial_perception": (_where,),
  "spatial_reasoning": (_same_side,),
  "object_recognition": (_which_object,),
  "object_attribute": (_colour,),
  "object_reasoning": (_count,),
  "object_existence": (_exists,),
  "object_permanence": (_elsewhere,),
  "action_recognition": (_does_what,),
  "action_localization": (_quarter,),
  "action_sequence": (_next_action,),
  "action_reasoning": (_same_action,),
  "scene_recognition": (_in_place,),
  "scene_transition": (_next_place,),
  "event_sequence": (_first_and_last,),
  "key_event_extraction": (_key_event,),
  "event_summarization": (_summary,),
}
