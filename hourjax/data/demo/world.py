"""The demo's world: places, objects, colours and the tasks of questions."""

from hourjax.data.demo import shapes

PLACES = tuple(shapes.PLACES)
KINDS = tuple(shapes.ACTORS)
SIDES = ("left", "right")
LEVELS = ("top", "bottom")
SPOTS = tuple(f"{level} {side}" for level in LEVELS for side in SIDES)

ACTIONS = tuple(shapes.SIGNS)

COLOURS = {
  "red": (214, 36, 40),
  "green": (34, 158, 62),
  "blue": (34, 78, 220),
  "yellow": (246, 210, 36),
  "purple": (134, 46, 176),
  "orange": (244, 126, 28),
}

NEEDLES = tuple(shapes.NEEDLES)
NEEDLE_COLOURS = ("red", "green", "blue", "yellow")

# What crosses the screen of a clip, and the words that clips show.
CLIP_THINGS = tuple(shapes.CLIP_THINGS)
CLIP_WORDS = ("open", "stop", "sale", "exit")

QUARTERS = ("first", "second", "third", "fourth")

# Task -> (topic, form), as in VideoMarathon. Of its 22 tasks only
# object_interaction is missing: a scene of the demo has a single actor.
TASKS = {
  "temporal_perception": ("temporality", "short"),
  "duration_perception": ("temporality", "long"),
  "temporal_reasoning": ("temporality", "long"),
  "temporal_gap_estimation": ("temporality", "long"),
  "temporal_order": ("temporality", "long"),
  "spatial_perception": ("spatiality", "short"),
  "spatial_reasoning": ("spatiality", "long"),
  "object_recognition": ("object", "short"),
  "object_attribute": ("object", "short"),
  "object_reasoning": ("object", "long"),
  "object_existence": ("object", "long"),
  "object_permanence": ("object", "long"),
  "action_recognition": ("action", "short"),
  "action_localization": ("action", "long"),
  "action_sequence": ("action", "long"),
  "action_reasoning": ("action", "long"),
  "scene_recognition": ("scene", "short"),
  "scene_transition": ("scene", "long"),
  "event_sequence": ("event", "long"),
  "key_event_extraction": ("event", "long"),
  "event_summarization": ("event", "long"),
}
