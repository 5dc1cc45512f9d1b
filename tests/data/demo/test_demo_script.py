import itertools

import numpy as np
import pytest

from configs.demo import get_config
from hourjax.data.demo import drawing, script, world
from hourjax.data.forgetting import Forgetting
from hourjax.errors import UserError


def _scripts(count=100, seconds=(180, 3600)):
  return [script.make_script(3, "test", i, seconds) for i in range(1, count)]


def test_training_videos_have_as_many_scenes_as_an_hour():
  counts = {
    split: [
      len(script.make_script(3, split, i, seconds).scenes)
      for i in range(1, 200)
    ]
    for split, seconds in (("train", (130, 170)), ("test", (3600, 3600)))
  }
  assert set(counts["train"]) == set(range(4, 15))
  assert set(counts["test"]) == set(range(10, 17))


def test_same_arguments_same_script():
  one = script.make_script(5, "train", 7, (180, 360))
  assert one == script.make_script(5, "train", 7, (180, 360))
  for other in ((6, "train", 7), (5, "test", 7), (5, "train", 8)):
    assert script.make_script(*other, (180, 360)).scenes != one.scenes


def test_scenes_fill_the_video_and_places_change():
  for s in _scripts():
    assert s.scenes[0].start == 0
    assert s.scenes[-1].end == s.duration
    for one, two in itertools.pairwise(s.scenes):
      assert one.end == two.start > one.start
      assert one.place != two.place
    assert 4 <= len(s.scenes) <= 16


@pytest.mark.parametrize(
  ("split", "seconds"), [("train", (130, 170)), ("test", (180, 3600))]
)
def test_needles_apart_and_mostly_in_dropped_frames(split, seconds):
  dropped, showings = [], set()
  for i in range(1, 201):
    s = script.make_script(3, split, i, seconds)
    spans = s.needle.spans
    ends = [(0, 0), *spans, (s.duration, s.duration)]
    for (_, one), (two, _) in itertools.pairwise(ends):
      assert two - one >= script.NEEDLE_GAP
    assert all(1 <= end - start <= 2 for start, end in spans)
    kept = np.linspace(0, s.duration - 1, min(16, s.duration // 4))
    shown = {t for t in range(s.duration) if s.needle.shown_at(t)}
    assert shown == {t for start, end in spans for t in range(start, end)}
    assert s.needle.dropped == shown.isdisjoint(kept.astype(int).tolist())
    dropped.append(s.needle.dropped)
    showings.add(len(spans))
  assert showings == {"train": {2, 4, 8, 12}, "test": {1}}[split]
  assert np.mean(dropped) >= script.HIDDEN_SHARE - 0.05


@pytest.mark.parametrize(
  ("split", "seconds"), [("train", (130, 170)), ("test", (180, 3600))]
)
def test_clips_apart_from_cards_and_mostly_in_dropped_frames(split, seconds):
  dropped, lengths, words, showings = [], set(), [], set()
  for i in range(1, 193):
    s = script.make_script(3, split, i, seconds)
    clip, gap = s.clip, script.NEEDLE_GAP
    shown = {t for span in clip.spans for t in range(*span)}
    assert gap <= min(shown) and max(shown) < s.duration - gap
    assert shown == {t for t in range(s.duration) if clip.shown_at(t)}
    assert len(shown) == len(clip.spans) * (clip.end - clip.start)
    showings.add(len(clip.spans))
    for start, end in s.needle.spans:
      assert shown.isdisjoint(range(start - gap, end + gap))
    assert clip.dropped == shown.isdisjoint(
      script.kept_frames(s.duration).tolist()
    )
    dropped.append(clip.dropped)
    lengths.add(clip.end - clip.start)
    words.append(clip.word)
    assert len(set(clip.things)) == 2
  # Where there is no room for all of them, there are fewer.
  assert showings == {"train": {1, 2, 3, 4, 5, 6}, "test": {1}}[split]
  assert lengths == set(range(3, 11))
  assert np.mean(dropped) >= script.HIDDEN_SHARE - 0.05
  assert all(words.count(word) == 48 for word in world.CLIP_WORDS)


@pytest.mark.parametrize("length", range(3, 11))
def test_two_things_cross_the_screen_of_a_clip(length):
  """One after the other, each from the left to the right."""
  clip = script.Clip(20, 20 + length, ("bird", "train"), "open", True)
  ways = {"bird": [], "train": []}
  for second in range(20, 20 + length):
    thing, way = clip.thing_at(second)
    ways[thing].append(way)
  assert [clip.thing_at(20)[0], clip.thing_at(19 + length)[0]] == [*ways]
  assert abs(len(ways["bird"]) - len(ways["train"])) <= 1
  for found in ways.values():
    assert found == sorted(found) and found[0] == 0
    assert found[-1] == (1 if len(found) > 1 else 0)


def test_clips_differ_in_what_moves_and_in_what_they_say():
  frames = {}
  for thing, word in itertools.product(world.CLIP_THINGS, world.CLIP_WORDS):
    other = next(t for t in world.CLIP_THINGS if t != thing)
    clip = script.Clip(0, 4, (thing, other), word, True)
    card = script.Needle((), "flag", "red", True)
    made = script.Script("x", 4, (), card, clip)
    frames[thing, word] = drawing.frame(made, 0).astype(int)
    assert np.abs(frames[thing, word] - drawing.frame(made, 1)).mean() > 3
  for (one, first), (two, second) in itertools.combinations(frames.items(), 2):
    upper, lower = np.split(np.abs(first - second).mean(axis=-1), 2)
    assert (upper.mean() > 8) == (one[0] != two[0])
    assert (lower.mean() > 8) == (one[1] != two[1])


@pytest.mark.parametrize("minutes", [4, 60, 480])
@pytest.mark.parametrize("depth", [0.02, 0.5, 0.9])
def test_needles_moved_to_a_depth(minutes, depth):
  seconds = 60 * minutes
  whole = script.make_script(3, "test", 1, (seconds, seconds))
  moved = script.move_needles(whole, depth)
  ((start, end),) = moved.needle.spans
  kept = set(script.kept_frames(seconds).tolist())
  assert kept.isdisjoint(range(start, moved.clip.end))
  assert moved.clip.start - end == script.NEEDLE_GAP <= start
  # A kept frame in the way moves them by a clip's length at most.
  assert abs(start - depth * seconds) <= 18
  assert moved.scenes == whole.scenes
  for one, two in ((moved.clip, whole.clip), (moved.needle, whole.needle)):
    assert type(one) is type(two)
  assert moved.clip.end - moved.clip.start == whole.clip.end - whole.clip.start


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_clips_are_shortened_to_fit_into_short_videos(depth):
  """Of 3 minutes, the shortest of a haystack, in which 11 frames are dropped
  in a row."""
  for number in range(1, 41):
    whole = script.make_script(3, "test", number, (180, 180))
    moved = script.move_needles(whole, depth)
    shown = range(moved.needle.spans[0][0], moved.clip.end)
    assert set(script.kept_frames(180).tolist()).isdisjoint(shown)
    least, most = script.CLIP_SECONDS
    length = moved.clip.end - moved.clip.start
    assert least <= length <= min(most, whole.clip.end - whole.clip.start)


def test_colours_are_dealt_in_turn():
  needles = [
    script.make_script(3, "train", i, (130, 170)).needle for i in range(1, 41)
  ]
  for colour in world.NEEDLE_COLOURS:
    assert sum(n.colour == colour for n in needles) == 10
  assert {n.kind for n in needles} == set(world.NEEDLES)


def test_kept_frames_are_those_of_the_demo_model():
  rule = Forgetting(max_frames=get_config().forgetting.max_frames)
  for frames in (180, 257, 3600):
    np.testing.assert_array_equal(
      script.kept_frames(frames),
      rule.kept_frames(frames, np.random.default_rng(0)),
    )


def test_shorter_videos_are_refused():
  lowest = script.MIN_SECONDS
  for s in _scripts(100, (lowest, lowest)):
    assert s.duration == lowest and s.needle.spans
  with pytest.raises(UserError, match="129 s < 130 s"):
    script.make_script(0, "train", 1, (lowest - 1, lowest))


def test_a_still_frame_shows_the_action():
  """By a sign, which looks the same wherever and whatever the actor is."""
  signs = {}
  for action in world.ACTIONS:
    for side, level in itertools.product(world.SIDES, world.LEVELS):
      scene = script.Scene(0, 9, "beach", "boat", "red", action, side, level)
      video = script.Script(
        "x", 9, (scene,), script.Needle((), "flag", "red", True)
      )
      for second in range(9):
        frame = drawing.frame(video, second)
        frame = frame[::-1] if level == "top" else frame
        frame = frame[:, ::-1] if side == "left" else frame
        sign = frame[: drawing.SIGN_SIDE, : drawing.SIGN_SIDE]
        sign = sign[::-1] if level == "top" else sign
        sign = sign[:, ::-1] if side == "left" else sign
        signs.setdefault(action, set()).add(sign.tobytes())
  assert all(len(found) == 1 for found in signs.values())
  assert len(set.union(*signs.values())) == len(world.ACTIONS)


@pytest.mark.parametrize("action", world.ACTIONS)
def test_every_second_moves(action):
  scene = script.Scene(0, 60, "beach", "boat", "red", action, "left", "top")
  video = script.Script(
    "x", 60, (scene,), script.Needle((), "flag", "red", True)
  )
  frames = [drawing.frame(video, t).astype(int) for t in range(10)]
  for one, two in itertools.pairwise(frames):
    assert one.shape == (96, 96, 3)
    assert (np.abs(one - two).max(axis=-1) > 30).sum() > 100


def test_cards_are_half_filled_with_the_colour():
  for kind in world.NEEDLES:
    for name in world.NEEDLE_COLOURS:
      needle = script.Needle(((0, 1),), kind, name, True)
      card = drawing.frame(script.Script("x", 1, (), needle), 0)
      share = (card == world.COLOURS[name]).all(axis=-1).mean()
      assert 0.38 < share < 0.62, (kind, share)
