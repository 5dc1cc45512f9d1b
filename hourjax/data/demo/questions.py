"""A question before it gets its format, and what questions are made from."""
# MERGED hourjax.data.demo.questions:
# One function for each kind of question; the answer is computed.
#
# Each takes `(script, rng, yes)` and returns an `Ask`, or None where the video
# offers no such question with a single right answer. `yes` is the answer that
# a question for yes or no is to have, so that both are equally frequent.

import dataclasses
from collections.abc import Callable

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


# Of two durations the longer is asked for only if it is clearly longer.
CLEARLY = 1.2


def _first_or_last(script, rng, yes):
  word, scene = pick(
    rng, [("first", script.scenes[0]), ("last", script.scenes[-1])]
  )
  text = f"Which place is shown {word}?"
  return about_scene(
    "temporal_perception", text, scene, scene.place, world.PLACES
  )


def _longest(script, rng, yes):
  places = sorted(places_of(script), key=lambda p: -shown(script, p))
  if shown(script, places[0]) < CLEARLY * shown(script, places[1]):
    return None
  return Ask(
    "duration_perception",
    "Which place is shown longest?",
    places[0],
    tuple(places[1:]),
    len(world.PLACES),
  )


def _longer_than(script, rng, yes):
  pair = two_of(rng, places_of(script))
  short, long = sorted(pair, key=lambda p: shown(script, p))
  if shown(script, long) < CLEARLY * shown(script, short):
    return None
  one, two = (long, short) if yes else (short, long)
  text = f"Is the {one} shown longer than the {two}?"
  return yes_no("temporal_reasoning", text, yes)


def _gap(script, rng, yes):
  pair = two_of(rng, lone(script, "place"))
  if pair is None:
    return None
  one, two = sorted(pair, key=lambda s: s.start)
  gap = two.start - one.start
  # The right answer may be the smallest, the largest or between: options are
  # a ladder of doublings, such as 30, 60, 120, 240 with 60 the answer.
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
  return Ask("temporal_gap_estimation", text, answer, wrong, span=span)


def _which_first(script, rng, yes):
  places = places_of(script)
  one, two = two_of(rng, places)
  answer = min(one, two, key=places.index)
  text = f"Which is shown first, the {one} or the {two}?"
  return Ask("temporal_order", text, answer, open_answers=2)


def _earliest(script, rng, yes):
  places = places_of(script)
  first = int(rng.integers(max(len(places) - 3, 1)))
  text = "Which of these places is shown first?"
  return Ask("temporal_order", text, places[first], tuple(places[first + 1 :]))


def _where(script, rng, yes):
  scene = pick(rng, lone(script, "kind", "place"))
  if scene is None:
    return None
  text = f"In which corner is the {scene.kind} in the {scene.place}?"
  return about_scene("spatial_perception", text, scene, scene.spot, world.SPOTS)


def _same_side(script, rng, yes):
  pair = two_of(rng, lone(script, "kind", "place"))
  if pair is None or (pair[0].side == pair[1].side) != yes:
    return None
  one, two = (f"the {s.kind} in the {s.place}" for s in pair)
  text = f"Are {one} and {two} on the same side, left or right?"
  return yes_no("spatial_reasoning", text, yes)


def _which_object(script, rng, yes):
  scene = pick(rng, lone(script, "place"))
  if scene is None:
    return None
  text = f"Which object is in the {scene.place}?"
  return about_scene("object_recognition", text, scene, scene.kind, world.KINDS)


def _colour(script, rng, yes):
  scene = pick(rng, lone(script, "kind", "place"))
  if scene is None:
    return None
  text = f"What colour is the {scene.kind} in the {scene.place}?"
  return about_scene(
    "object_attribute", text, scene, scene.colour, tuple(world.COLOURS)
  )


def _count(script, rng, yes):
  kinds = [s.kind for s in script.scenes]
  counts = [str(n) for n in range(1, 5)]
  kind = pick(rng, sorted({k for k in kinds if kinds.count(k) <= 4}))
  if kind is None:
    return None
  answer = str(kinds.count(kind))
  text = f"How many scenes have a {kind}?"
  return Ask("object_reasoning", text, answer, others(counts, answer), 4)


def _exists(script, rng, yes):
  seen = {s.actor for s in script.scenes}
  every = [f"{c} {k}" for c in world.COLOURS for k in world.KINDS]
  actor = pick(rng, [a for a in every if (a in seen) == yes])
  article = "an" if actor[0] in "aeiou" else "a"
  text = f"Is there {article} {actor} in the video?"
  return yes_no("object_existence", text, yes)


def _returns(script, rng, yes):
  def again(scene):
    later = script.scenes[script.scenes.index(scene) + 1 :]
    return any(s.actor == scene.actor for s in later)

  scenes = lone(script, "actor", "place")
  scenes = [s for s in scenes if s != script.scenes[-1] and again(s) == yes]
  scene = pick(rng, scenes)
  if scene is None:
    return None
  text = f"Does the {scene.actor} in the {scene.place} return later?"
  return yes_no("object_permanence", text, yes)


def _does_what(script, rng, yes):
  scene = pick(rng, lone(script, "kind", "place"))
  if scene is None:
    return None
  text = f"What does the {scene.kind} in the {scene.place} do?"
  return about_scene(
    "action_recognition", text, scene, scene.action, tuple(world.ACTIONS)
  )


def _quarter(script, rng, yes):
  scene = pick(rng, lone(script, "actor", "action"))
  if scene is None:
    return None
  place = scene.start / script.duration * 4
  # A start close to a quarter's border has no clear answer.
  if scene.start and min(place % 1, 1 - place % 1) < 0.08:
    return None
  verb = world.ACTIONS[scene.action]
  text = f"In which quarter does the {scene.actor} start to {verb}?"
  answer = world.QUARTERS[int(place)]
  return about_scene("action_localization", text, scene, answer, world.QUARTERS)


def _next_action(script, rng, yes):
  scenes = lone(script, "place")
  scene = pick(rng, [s for s in scenes if following(script, s)])
  if scene is None:
    return None
  after = following(script, scene)
  text = f"What does the object right after the {scene.place} do?"
  return about_scene(
    "action_sequence", text, after, after.action, tuple(world.ACTIONS)
  )


def _same_action(script, rng, yes):
  pair = two_of(rng, lone(script, "kind", "place"))
  if pair is None or (pair[0].action == pair[1].action) != yes:
    return None
  one, two = (f"the {s.kind} in the {s.place}" for s in pair)
  return yes_no("action_reasoning", f"Do {one} and {two} move alike?", yes)


def _in_place(script, rng, yes):
  scene = pick(rng, lone(script, "actor"))
  if scene is None:
    return None
  text = f"Where is the {scene.actor}?"
  return about_scene(
    "scene_recognition", text, scene, scene.place, world.PLACES
  )


def _next_place(script, rng, yes):
  scenes = lone(script, "place")
  scene = pick(rng, [s for s in scenes if following(script, s)])
  if scene is None:
    return None
  after = following(script, scene)
  # Places change at every cut, so the answer is one of the seven others.
  elsewhere = others(world.PLACES, scene.place)
  text = f"Which place follows the {scene.place}?"
  return about_scene("scene_transition", text, after, after.place, elsewhere)


def _altered(rng: np.random.Generator, script: Script) -> tuple[str, ...]:
  """Three titles like the video's own, none of which happens in it."""
  happened = {s.title for s in script.scenes}
  titles: list[str] = []
  while len(titles) < 3:
    scene = pick(rng, script.scenes)
    field, items = pick(
      rng,
      [
        ("place", world.PLACES),
        ("colour", tuple(world.COLOURS)),
        ("kind", world.KINDS),
      ],
    )
    title = dataclasses.replace(scene, **{field: pick(rng, items)}).title
    if title not in happened and title not in titles:
      titles.append(title)
  return tuple(titles)


def _next_event(script, rng, yes):
  scenes = lone(script, "title")
  scene = pick(rng, [s for s in scenes if following(script, s)])
  if scene is None:
    return None
  after = following(script, scene)
  titles = dict.fromkeys(s.title for s in script.scenes)
  wrong = others(titles, after.title, scene.title)
  if len(wrong) < 3:
    wrong += _altered(rng, script)[: 3 - len(wrong)]
  text = f"What happens right after {scene.title}?"
  span = (after.start, after.end)
  return Ask("event_sequence", text, after.title, wrong, span=span)


def _key_event(script, rng, yes):
  scene = pick(rng, script.scenes)
  wrong = _altered(rng, script)
  text = "Which event happens in the video?"
  span = (scene.start, scene.end)
  return Ask("key_event_extraction", text, scene.title, wrong, span=span)


def in_order(part: list[str], whole: list[str]) -> bool:
  """Whether `part` can be had from `whole` by leaving out items."""
  rest = iter(whole)
  return all(item in rest for item in part)


def _summary(script, rng, yes):
  whole = [s.place for s in script.scenes]
  # Four scenes spread over the video; six scenes give 0, 1, 3, 5.
  spread = np.linspace(0, len(whole) - 1, 4).astype(int)
  part = [whole[i] for i in spread]
  wrong = []
  for _ in range(50):
    mixed = [part[i] for i in rng.permutation(len(part))]
    text = ", ".join(mixed)
    if not in_order(mixed, whole) and text not in wrong:
      wrong.append(text)
  if len(wrong) < 3:
    return None
  text = "In which order does the video show these places?"
  return Ask("event_summarization", text, ", ".join(part), tuple(wrong[:3]))


Asker = Callable[[Script, np.random.Generator, bool], Ask | None]
ASKERS: dict[str, tuple[Asker, ...]] = {
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
  "object_reasoning": (_count,),
  "object_existence": (_exists,),
  "object_permanence": (_returns,),
  "action_recognition": (_does_what,),
  "action_localization": (_quarter,),
  "action_sequence": (_next_action,),
  "action_reasoning": (_same_action,),
  "scene_recognition": (_in_place,),
  "scene_transition": (_next_place,),
  "event_sequence": (_next_event,),
  "key_event_extraction": (_key_event,),
  "event_summarization": (_summary,),
}
