"""Scripts of demo videos: what is shown at every second."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from hourjax.data.demo import world
from hourjax.data.forgetting import Forgetting
from hourjax.errors import UserError

SPLITS = ("train", "test")
# Share of the needles that lie where temporal forgetting drops every frame.
HIDDEN_SHARE = 0.9
# Least number of seconds between two needles, and between a needle and the
# first or last second of the video.
NEEDLE_GAP = 3
MIN_SECONDS = 130
# Most frames that the demo's model keeps (see configs/demo.py).
MAX_KEPT = 16
# Scenes of a training video. They change faster than in a test video, so that
# the model has seen as many in a video as an hour shows.
TRAIN_SCENES = (4, 14)
# Least and most seconds of a clip.
CLIP_SECONDS = (3, 10)
# Possible numbers of times that a video shows its card, and its clip. MemAug
# finds what it is trained on several times in a video, and then finds it once.
CARD_SHOWINGS = {"train": (2, 4, 8, 12), "test": (1,)}
CLIP_SHOWINGS = {"train": (2, 3, 4, 6), "test": (1,)}


@dataclasses.dataclass(frozen=True)
class Scene:
  """Describes one actor doing one thing in one place, for start <= t < end."""

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
    """Returns e.g. "red robot"."""
    return f"{self.colour} {self.kind}"

  @property
  def spot(self) -> str:
    """Returns the corner, e.g. "top left"."""
    return f"{self.level} {self.side}"

  @property
  def title(self) -> str:
    """Returns e.g. "red robot spinning in the kitchen"."""
    return f"{self.actor} {self.action} in the {self.place}"


@dataclasses.dataclass(frozen=True)
class Needle:
  """Describes a card of one kind and colour, shown for 1 or 2 s at a time.

  Attributes:
    spans: (start, end) in seconds of each showing, start <= t < end, in order.
      A test video shows its card once. Training videos show theirs more often,
      which makes the look-up easier to learn.
    kind: of the card, one of `world.NEEDLES`.
    colour: of the card, which questions ask for.
    dropped: whether temporal forgetting drops every frame that shows it.
  """

  spans: tuple[tuple[int, int], ...]
  kind: str
  colour: str
  dropped: bool

  def shown_at(self, second: int) -> bool:
    """Returns whether the card is visible at a second."""
    return any(start <= second < end for start, end in self.spans)


@dataclasses.dataclass(frozen=True)
class Clip:
  """Describes a moving clip of 3 to 10 s within a video, start <= t < end.

  Attributes:
    start: first second.
    end: second after the last one.
    again: first seconds of further showings of the same clip, which training
      videos have.
    things: two of `world.CLIP_THINGS`. Each crosses the screen for half of the
      time, one after the other.
    word: one of `world.CLIP_WORDS`, which stands below all the time.
    dropped: whether temporal forgetting drops every frame of the clip.
  """

  start: int
  end: int
  things: tuple[str, str]
  word: str
  dropped: bool
  again: tuple[int, ...] = ()

  @property
  def spans(self) -> tuple[tuple[int, int], ...]:
    """Returns (start, end) in seconds of each showing, the first one first."""
    length = self.end - self.start
    return tuple((start, start + length) for start in (self.start, *self.again))

  def shown_at(self, second: int) -> bool:
    """Returns whether the clip is on at a second."""
    return any(start <= second < end for start, end in self.spans)

  def thing_at(self, second: int) -> tuple[str, float]:
    """Returns what crosses the screen at a second, and its way from 0 to 1."""
    length = self.end - self.start
    half = (length + 1) // 2
    began = next(start for start, end in self.spans if start <= second < end)
    number, step = divmod(second - began, half)
    steps = half if number == 0 else length - half
    return self.things[number], step / max(steps - 1, 1)


@dataclasses.dataclass(frozen=True)
class Script:
  """Describes a whole video of `duration` seconds, with one frame a second.

  Attributes:
    name: of the video.
    duration: in seconds.
    scenes: from the first second to the last.
    needle: a card over the scenes.
    clip: a moving clip over the scenes; None for a video without one.
  """

  name: str
  duration: int
  scenes: tuple[Scene, ...]
  needle: Needle
  clip: Clip | None = None


def kept_frames(frames: int) -> np.ndarray:
  """Returns the frames that temporal forgetting keeps (paper, section 3.2).

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
  """Draws the script of one video; the same arguments give the same script.

  Args:
    seed: seed of the data set.
    split: "train" or "test"; the two never share random numbers.
    index: number of the video within its split, from 1.
    seconds: shortest and longest duration, both included.

  Raises:
    UserError: the shortest duration is below MIN_SECONDS.
  """
  if seconds[0] < MIN_SECONDS:
    raise UserError(
      f"demo video of {seconds[0]} s < {MIN_SECONDS} s, which four scenes and"
      " a needle need; ask for longer videos"
    )
  rng = np.random.default_rng([seed, SPLITS.index(split), index])
  duration = int(rng.integers(seconds[0], seconds[1] + 1))
  scenes = _scenes(rng, _cuts(rng, duration, split))
  # A card must leave its surroundings to the scenes, and so must the clip.
  free = np.ones(duration, dtype=bool)
  free[:NEEDLE_GAP] = free[duration - NEEDLE_GAP :] = False
  needle = _needle(
    rng,
    free,
    showings=CARD_SHOWINGS[split],
    # In turn, so that all colours are equally frequent.
    colour=world.NEEDLE_COLOURS[index % len(world.NEEDLE_COLOURS)],
  )
  # In turn as well, but so that a colour does not tell the word.
  word = world.CLIP_WORDS[(index - 1) // 4 % len(world.CLIP_WORDS)]
  clip = _clip(rng, free, word, showings=CLIP_SHOWINGS[split])
  return Script(f"{split}_{index:04d}", duration, scenes, needle, clip)


def move_needles(script: Script, depth: float) -> Script:
  """Moves the card and the clip of a video to one depth.

  The card comes first, then the clip: as near to the depth as temporal
  forgetting drops every frame of both. In a short video, where few frames in a
  row are dropped, the clip becomes shorter.

  Args:
    script: of a video with a clip, whose card is shown once.
    depth: share of the video that comes before, 0 to 1.
  """
  needle, clip = script.needle, script.clip
  assert clip is not None and len(needle.spans) == 1
  ((start, end),) = needle.spans
  shown = end - start
  kept = _is_kept(script.duration)
  kept[:NEEDLE_GAP] = kept[script.duration - NEEDLE_GAP :] = True
  length, starts = next(
    (length, found)
    for length in range(clip.end - clip.start, 0, -1)
    if len(found := _starts(~kept, shown + NEEDLE_GAP + length))
  )
  start = int(starts[np.abs(starts - depth * script.duration).argmin()])
  later = start + shown + NEEDLE_GAP
  return dataclasses.replace(
    script,
    needle=dataclasses.replace(
      needle, spans=((start, start + shown),), dropped=True
    ),
    clip=dataclasses.replace(
      clip, start=later, end=later + length, dropped=True
    ),
  )


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
  return items[int(rng.integers(len(items)))]


def _pick_fresh(
  rng: np.random.Generator,
  items: Sequence[str],
  used: list[str],
  rate: float,
  ban: str | None = None,
) -> str:
  """Draws with weight rate**-(times used), so that repeats are rare."""
  weights = np.array([rate ** -used.count(i) * (i != ban) for i in items])
  return str(rng.choice(items, p=weights / weights.sum()))


def _cuts(rng: np.random.Generator, duration: int, split: str) -> np.ndarray:
  """Returns scene boundaries in seconds, int[scenes + 1], 0 to the duration."""
  low, high = TRAIN_SCENES
  if split == "test":
    low = round(float(np.interp(duration, [360, 3600], [4, 10])))
    high = round(float(np.interp(duration, [360, 3600], [6, 16])))
  lengths = rng.uniform(0.5, 1.8, size=int(rng.integers(low, high + 1)))
  ends = np.cumsum(lengths) / lengths.sum() * duration
  return np.concatenate([[0], ends.round()]).astype(int)


def _scenes(rng: np.random.Generator, cuts: np.ndarray) -> tuple[Scene, ...]:
  """Draws the scenes between two boundaries each, one after another."""
  scenes: list[Scene] = []
  for start, end in itertools.pairwise(cuts.tolist()):
    last = scenes[-1].place if scenes else None
    place = _pick_fresh(
      rng, world.PLACES, [s.place for s in scenes], 4.0, ban=last
    )
    kind = _pick_fresh(rng, world.KINDS, [s.kind for s in scenes], 2.0)
    colour = _pick(rng, tuple(world.COLOURS))
    if scenes and rng.random() < 0.3:
      # An earlier actor returns, which questions on object permanence need.
      old = scenes[int(rng.integers(len(scenes)))]
      kind, colour = old.kind, old.colour
    action = _pick(rng, world.ACTIONS)
    side, level = _pick(rng, world.SIDES), _pick(rng, world.LEVELS)
    scenes.append(Scene(start, end, place, kind, colour, action, side, level))
  return tuple(scenes)


def _needle(
  rng: np.random.Generator,
  free: np.ndarray,
  *,
  showings: tuple[int, ...],
  colour: str,
) -> Needle:
  """Draws where a video shows its needle; marks the seconds in `free`."""
  kept = _is_kept(len(free))
  hidden = rng.random() < HIDDEN_SHARE
  tries = [
    _span(rng, free, kept if hidden else ~free, int(rng.integers(1, 3)))
    for _ in range(int(rng.choice(showings)))
  ]
  spans = tuple(sorted(span for span in tries if span))
  return Needle(
    spans=spans,
    kind=_pick(rng, world.NEEDLES),
    colour=colour,
    dropped=not any(kept[start:end].any() for start, end in spans),
  )


def _clip(
  rng: np.random.Generator,
  free: np.ndarray,
  word: str,
  *,
  showings: tuple[int, ...],
) -> Clip:
  """Draws where a video shows its clip; marks the seconds in `free`.

  Where no dropped frames are as many in a row as the clip takes, it is shorter.
  """
  kept = _is_kept(len(free))
  hidden = rng.random() < HIDDEN_SHARE
  low, high = CLIP_SECONDS
  lengths = range(int(rng.integers(low, high + 1)), low - 1, -1)
  tries = (
    _span(rng, free, banned, length)
    for banned in ((kept, ~free) if hidden else (~free,))
    for length in lengths
  )
  start, end = next(span for span in tries if span)
  banned = kept if hidden else ~free
  again = [
    _span(rng, free, banned, end - start)
    for _ in range(int(rng.choice(showings)) - 1)
  ]
  one, two = rng.permutation(len(world.CLIP_THINGS))[:2]
  clip = Clip(
    start,
    end,
    (world.CLIP_THINGS[one], world.CLIP_THINGS[two]),
    word,
    dropped=False,
    again=tuple(span[0] for span in again if span),
  )
  dropped = not any(kept[begin:stop].any() for begin, stop in clip.spans)
  return dataclasses.replace(clip, dropped=dropped)


def _is_kept(duration: int) -> np.ndarray:
  """Returns which frames temporal forgetting keeps, bool[duration]."""
  kept = np.zeros(duration, dtype=bool)
  kept[kept_frames(duration)] = True
  return kept


def _span(
  rng: np.random.Generator, free: np.ndarray, banned: np.ndarray, length: int
) -> tuple[int, int] | None:
  """Draws free seconds in a row outside the banned; marks them in `free`.

  Returns:
    (start, end); None if there are none.
  """
  found = _starts(free & ~banned, length)
  if not len(found):
    return None
  start = int(rng.choice(found))
  end = start + length
  free[max(start - NEEDLE_GAP, 0) : end + NEEDLE_GAP] = False
  return start, end


def _starts(allowed: np.ndarray, length: int) -> np.ndarray:
  """Returns where `length` allowed seconds in a row begin.

  [1, 1, 0, 1] and a length of 2 give [0].
  """
  windows = np.lib.stride_tricks.sliding_window_view(allowed, length)
  return np.flatnonzero(windows.all(axis=1))
