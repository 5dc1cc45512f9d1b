"""Timelines: which scene and which needle a video shows at which second."""

import dataclasses
import itertools

import numpy as np

from hourjax.data.demo import world
from hourjax.data.forgetting import Forgetting
from hourjax.errors import UserError

SPLITS = ("train", "test")
# Share of the needles placed where temporal forgetting drops every frame.
HIDDEN_SHARE = 0.9
# Seconds between two needles, and between a needle and the video's ends.
NEEDLE_GAP = 3
MIN_SECONDS = 180
# How many frames the demo's model keeps at most (`configs/demo.py`).
MAX_KEPT = 64
# How often a training video shows a card; a test video shows it once.
SHOWINGS = {"train": (1, 2, 4, 6), "test": (1,)}


@dataclasses.dataclass(frozen=True)
class Scene:
  """One actor doing one thing in one place, seconds start <= t < end."""

  start: int
  end: int
  place: str
  kind: str
  colour: str
  action: str
  side: str
  level: str

  @property
  def actor(self) -> str:
    return f"{self.colour} {self.kind}"

  @property
  def spot(self) -> str:
    return f"{self.level} {self.side}"

  @property
  def title(self) -> str:
    return f"the {self.actor} {self.action} in the {self.place}"


@dataclasses.dataclass(frozen=True)
class Needle:
  """A card of one kind and colour, shown for 1 or 2 s at a time.

  Attributes:
    spans: (start, end) of each showing, seconds start <= t < end, in order.
      Test videos show a card once; training videos also show some more often,
      which is where a model learns what to look for.
    kind: of the card.
    colour: that questions ask for.
    dropped: whether temporal forgetting drops every frame that shows it.
  """

  spans: tuple[tuple[int, int], ...]
  kind: str
  colour: str
  dropped: bool

  def shown_at(self, second: int) -> bool:
    return any(start <= second < end for start, end in self.spans)


@dataclasses.dataclass(frozen=True)
class Script:
  """A whole video; it has one frame a second, so `duration` frames."""

  name: str
  duration: int
  scenes: tuple[Scene, ...]
  needle: Needle


def kept_frames(frames: int) -> np.ndarray:
  """Frames that temporal forgetting keeps (paper, section 3.2).

  Eight frames keep `linspace(0, 7, 2)` = [0, 7]; 3,600 frames keep MAX_KEPT.

  Args:
    frames: number of frames F of the video.

  Returns:
    int64[min(MAX_KEPT, F // 4)], ascending.
  """
  rule = Forgetting(max_frames=MAX_KEPT)
  return rule.kept_frames(frames, np.random.default_rng(0))  # draws nothing


def make_script(
  seed: int, split: str, index: int, seconds: tuple[int, int]
) -> Script:
  """Draws the timeline of one video; the same arguments give the same one.

  Args:
    seed: of the data set.
    split: "train" or "test"; the two never share a random stream.
    index: of the video within its split, from 1.
    seconds: shortest and longest duration, both included.

  Raises:
    UserError: a video shorter than MIN_SECONDS is asked for.
  """
  if seconds[0] < MIN_SECONDS:
    raise UserError(
      f"demo video of {seconds[0]} s < {MIN_SECONDS} s, which four scenes and"
      " a needle need; ask for longer videos"
    )
  rng = np.random.default_rng([seed, SPLITS.index(split), index])
  duration = int(rng.integers(seconds[0], seconds[1] + 1))
  return Script(
    name=f"{split}_{index:04d}",
    duration=duration,
    scenes=_scenes(rng, duration),
    needle=_needle(
      rng,
      duration,
      showings=SHOWINGS[split],
      # Dealt in turn, so that no colour is the better guess.
      colour=world.NEEDLE_COLOURS[index % len(world.NEEDLE_COLOURS)],
    ),
  )


def _pick(rng: np.random.Generator, items) -> str:
  return str(items[rng.integers(len(items))])


def _pick_fresh(rng, items, used: list[str], rate: float, ban=None) -> str:
  """Picks with weight rate**-uses, so that repeats stay rare."""
  weights = np.array([rate ** -used.count(i) * (i != ban) for i in items])
  return str(rng.choice(items, p=weights / weights.sum()))


def _cuts(rng: np.random.Generator, duration: int) -> np.ndarray:
  """Scene boundaries, int[scenes + 1], from 0 to the duration."""
  low = round(float(np.interp(duration, [360, 3600], [4, 10])))
  high = round(float(np.interp(duration, [360, 3600], [6, 16])))
  lengths = rng.uniform(0.5, 1.8, size=int(rng.integers(low, high + 1)))
  ends = np.cumsum(lengths) / lengths.sum() * duration
  return np.concatenate([[0], ends.round()]).astype(int)


def _scenes(rng: np.random.Generator, duration: int) -> tuple[Scene, ...]:
  cuts = _cuts(rng, duration).tolist()
  scenes: list[Scene] = []
  for start, end in itertools.pairwise(cuts):
    last = scenes[-1].place if scenes else None
    place = _pick_fresh(
      rng, world.PLACES, [s.place for s in scenes], 4.0, ban=last
    )
    kind = _pick_fresh(rng, world.KINDS, [s.kind for s in scenes], 2.0)
    colour = _pick(rng, tuple(world.COLOURS))
    if scenes and rng.random() < 0.3:
      # An old acquaintance returns, which object permanence asks about.
      old = scenes[int(rng.integers(len(scenes)))]
      kind, colour = old.kind, old.colour
    action = _pick(rng, tuple(world.ACTIONS))
    side, level = _pick(rng, world.SIDES), _pick(rng, world.LEVELS)
    scenes.append(Scene(start, end, place, kind, colour, action, side, level))
  return tuple(scenes)


def _needle(
  rng: np.random.Generator,
  duration: int,
  *,
  showings: tuple[int, ...],
  colour: str,
) -> Needle:
  kept = np.zeros(duration, dtype=bool)
  kept[kept_frames(duration)] = True
  free = np.ones(duration, dtype=bool)
  free[:NEEDLE_GAP] = free[duration - NEEDLE_GAP :] = False
  hidden = rng.random() < HIDDEN_SHARE
  spans = [
    _span(rng, free, kept if hidden else ~free)
    for _ in range(int(rng.choice(showings)))
  ]
  return Needle(
    spans=tuple(sorted(spans)),
    kind=_pick(rng, world.NEEDLES),
    colour=colour,
    dropped=not any(kept[start:end].any() for start, end in spans),
  )


def _span(rng, free: np.ndarray, banned: np.ndarray) -> tuple[int, int]:
  """A free place for 1 or 2 s that avoids the banned; takes it from `free`."""
  length = int(rng.integers(1, 3))
  # A start is right when the whole card fits: [1, 1, 0, 1] and length 2 give
  # [1, 0, 0].
  allowed = free & ~banned
  starts = np.lib.stride_tricks.sliding_window_view(allowed, length)
  start = int(rng.choice(np.flatnonzero(starts.all(axis=1))))
  end = start + length
  free[max(start - NEEDLE_GAP, 0) : end + NEEDLE_GAP] = False
  return start, end
