"""One function for each kind of question; the answer is computed.

Each takes `(script, rng, yes)` and returns an `Ask`, or None where the video
offers no such question with a single right answer. `yes` is the answer that
a question for yes or no is to have, so that both are equally frequent.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from hourjax.data.demo import ask, world
from hourjax.data.demo.script import Script

# Of two durations the longer is asked for only if it is clearly longer.
CLEARLY = 1.2


def _first_or_last(script, rng, yes):
  word, scene = ask.pick(
    rng, [("first", script.scenes[0]), ("last", script.scenes[-1])]
  )
  text = f"Which place is shown {word}?"
  return ask.about_scene(
    "temporal_perception", text, scene, scene.place, world.PLACES
  )


def _longest(script, rng, yes):
  places = sorted(ask.places_of(script), key=lambda p: -ask.shown(script, p))
  if ask.shown(script, places[0]) < CLEARLY * ask.shown(script, places[1]):
    return None
  return ask.Ask(
    "duration_perception",
    "Which place is shown longest?",
    places[0],
    tuple(places[1:]),
    len(world.PLACES),
  )


def _longer_than(script, rng, yes):
  pair = ask.two_of(rng, ask.places_of(script))
  short, long = sorted(pair, key=lambda p: ask.shown(script, p))
  if ask.shown(script, long) < CLEARLY * ask.shown(script, short):
    return None
  one, two = (long, short) if yes else (short, long)
  text = f"Is the {one} shown longer than the {two}?"
  return ask.yes_no("temporal_reasoning", text, yes)


def _gap(script, rng, yes):
  pair = ask.two_of(rng, ask.lone(script, "place"))
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
  wrong = ask.others(options, answer)
  span = (one.start, two.start)
  return ask.Ask("temporal_gap_estimation", text, answer, wrong, span=span)


def _which_first(script, rng, yes):
  places = ask.places_of(script)
  one, two = ask.two_of(rng, places)
  answer = min(one, two, key=places.index)
  text = f"Which is shown first, the {one} or the {two}?"
  return ask.Ask("temporal_order", text, answer, open_answers=2)


def _earliest(script, rng, yes):
  places = ask.places_of(script)
  first = int(rng.integers(max(len(places) - 3, 1)))
  text = "Which of these places is shown first?"
  return ask.Ask(
    "temporal_order", text, places[first], tuple(places[first + 1 :])
  )


def _where(script, rng, yes):
  scene = ask.pick(rng, ask.lone(script, "kind", "place"))
  if scene is None:
    return None
  text = f"In which corner is the {scene.kind} in the {scene.place}?"
  return ask.about_scene(
    "spatial_perception", text, scene, scene.spot, world.SPOTS
  )


def _same_side(script, rng, yes):
  pair = ask.two_of(rng, ask.lone(script, "kind", "place"))
  if pair is None or (pair[0].side == pair[1].side) != yes:
    return None
  one, two = (f"the {s.kind} in the {s.place}" for s in pair)
  text = f"Are {one} and {two} on the same side, left or right?"
  return ask.yes_no("spatial_reasoning", text, yes)


def _which_object(script, rng, yes):
  scene = ask.pick(rng, ask.lone(script, "place"))
  if scene is None:
    return None
  text = f"Which object is in the {scene.place}?"
  return ask.about_scene(
    "object_recognition", text, scene, scene.kind, world.KINDS
  )


def _colour(script, rng, yes):
  scene = ask.pick(rng, ask.lone(script, "kind", "place"))
  if scene is None:
    return None
  text = f"What colour is the {scene.kind} in the {scene.place}?"
  return ask.about_scene(
    "object_attribute", text, scene, scene.colour, tuple(world.COLOURS)
  )


def _count(script, rng, yes):
  kinds = [s.kind for s in script.scenes]
  counts = [str(n) for n in range(1, 5)]
  kind = ask.pick(rng, sorted({k for k in kinds if kinds.count(k) <= 4}))
  if kind is None:
    return None
  answer = str(kinds.count(kind))
  text = f"How many scenes have a {kind}?"
  return ask.Ask(
    "object_reasoning", text, answer, ask.others(counts, answer), 4
  )


def _exists(script, rng, yes):
  seen = {s.actor for s in script.scenes}
  every = [f"{c} {k}" for c in world.COLOURS for k in world.KINDS]
  actor = ask.pick(rng, [a for a in every if (a in seen) == yes])
  article = "an" if actor[0] in "aeiou" else "a"
  text = f"Is there {article} {actor} in the video?"
  return ask.yes_no("object_existence", text, yes)


def _returns(script, rng, yes):
  def again(scene):
    later = script.scenes[script.scenes.index(scene) + 1 :]
    return any(s.actor == scene.actor for s in later)

  scenes = ask.lone(script, "actor", "place")
  scenes = [s for s in scenes if s != script.scenes[-1] and again(s) == yes]
  scene = ask.pick(rng, scenes)
  if scene is None:
    return None
  text = f"Does the {scene.actor} in the {scene.place} return later?"
  return ask.yes_no("object_permanence", text, yes)


def _does_what(script, rng, yes):
  scene = ask.pick(rng, ask.lone(script, "kind", "place"))
  if scene is None:
    return None
  text = f"What does the {scene.kind} in the {scene.place} do?"
  return ask.about_scene(
    "action_recognition", text, scene, scene.action, tuple(world.ACTIONS)
  )


def _quarter(script, rng, yes):
  scene = ask.pick(rng, ask.lone(script, "actor", "action"))
  if scene is None:
    return None
  place = scene.start / script.duration * 4
  # A start close to a quarter's border has no clear answer.
  if scene.start and min(place % 1, 1 - place % 1) < 0.08:
    return None
  verb = world.ACTIONS[scene.action]
  text = f"In which quarter does the {scene.actor} start to {verb}?"
  answer = world.QUARTERS[int(place)]
  return ask.about_scene(
    "action_localization", text, scene, answer, world.QUARTERS
  )


def _next_action(script, rng, yes):
  scenes = ask.lone(script, "place")
  scene = ask.pick(rng, [s for s in scenes if ask.following(script, s)])
  if scene is None:
    return None
  after = ask.following(script, scene)
  text = f"What does the object right after the {scene.place} do?"
  return ask.about_scene(
    "action_sequence", text, after, after.action, tuple(world.ACTIONS)
  )


def _same_action(script, rng, yes):
  pair = ask.two_of(rng, ask.lone(script, "kind", "place"))
  if pair is None or (pair[0].action == pair[1].action) != yes:
    return None
  one, two = (f"the {s.kind} in the {s.place}" for s in pair)
  return ask.yes_no("action_reasoning", f"Do {one} and {two} move alike?", yes)


def _in_place(script, rng, yes):
  scene = ask.pick(rng, ask.lone(script, "actor"))
  if scene is None:
    return None
  text = f"Where is the {scene.actor}?"
  return ask.about_scene(
    "scene_recognition", text, scene, scene.place, world.PLACES
  )


def _next_place(script, rng, yes):
  scenes = ask.lone(script, "place")
  scene = ask.pick(rng, [s for s in scenes if ask.following(script, s)])
  if scene is None:
    return None
  after = ask.following(script, scene)
  # Places change at every cut, so the answer is one of the seven others.
  others = ask.others(world.PLACES, scene.place)
  text = f"Which place follows the {scene.place}?"
  return ask.about_scene("scene_transition", text, after, after.place, others)


def _altered(rng: np.random.Generator, script: Script) -> tuple[str, ...]:
  """Three titles like the video's own, none of which happens in it."""
  happened = {s.title for s in script.scenes}
  titles: list[str] = []
  while len(titles) < 3:
    scene = ask.pick(rng, script.scenes)
    field, items = ask.pick(
      rng,
      [
        ("place", world.PLACES),
        ("colour", tuple(world.COLOURS)),
        ("kind", world.KINDS),
      ],
    )
    title = dataclasses.replace(scene, **{field: ask.pick(rng, items)}).title
    if title not in happened and title not in titles:
      titles.append(title)
  return tuple(titles)


def _next_event(script, rng, yes):
  scenes = ask.lone(script, "title")
  scene = ask.pick(rng, [s for s in scenes if ask.following(script, s)])
  if scene is None:
    return None
  after = ask.following(script, scene)
  titles = dict.fromkeys(s.title for s in script.scenes)
  wrong = ask.others(titles, after.title, scene.title)
  if len(wrong) < 3:
    wrong += _altered(rng, script)[: 3 - len(wrong)]
  text = f"What happens right after {scene.title}?"
  span = (after.start, after.end)
  return ask.Ask("event_sequence", text, after.title, wrong, span=span)


def _key_event(script, rng, yes):
  scene = ask.pick(rng, script.scenes)
  wrong = _altered(rng, script)
  text = "Which event happens in the video?"
  span = (scene.start, scene.end)
  return ask.Ask("key_event_extraction", text, scene.title, wrong, span=span)


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
  return ask.Ask("event_summarization", text, ", ".join(part), tuple(wrong[:3]))


Asker = Callable[[Script, np.random.Generator, bool], ask.Ask | None]
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
