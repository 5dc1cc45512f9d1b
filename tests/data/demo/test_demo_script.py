import itertools

import numpy as np
import pytest

from hourjax.data.demo import draw, script, world
from hourjax.errors import UserError


def _scripts(count=100, seconds=(180, 3600)):
  return [script.make_script(3, "test", i, seconds) for i in range(1, count)]


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


def test_needles_apart_and_mostly_in_dropped_frames():
  dropped = []
  for s in _scripts():
    assert {n.kind for n in s.needles} == set(world.NEEDLES)
    for one, two in itertools.pairwise(s.needles):
      assert two.start - one.end >= script.NEEDLE_GAP
    kept = np.linspace(0, s.duration - 1, min(512, s.duration // 4))
    kept = set(kept.astype(int).tolist())
    for n in s.needles:
      assert 1 <= n.end - n.start <= 2
      assert 0 < n.start < n.end < s.duration
      assert n.dropped == kept.isdisjoint(range(n.start, n.end))
      dropped.append(n.dropped)
  assert script.HIDDEN_SHARE - 0.02 <= np.mean(dropped) < 1


def test_shortest_videos_hold_all_needles():
  lowest = script.MIN_SECONDS
  for s in _scripts(200, (lowest, lowest)):
    assert len(s.needles) == 4
  with pytest.raises(UserError, match="59 s < 60 s"):
    script.make_script(0, "train", 1, (lowest - 1, lowest))


@pytest.mark.parametrize("action", world.ACTIONS)
def test_every_second_moves(action):
  scene = script.Scene(0, 60, "beach", "boat", "red", action, "left", "top")
  film = script.Script("x", 60, (scene,), ())
  frames = [draw.frame(film, t).astype(int) for t in range(10)]
  for one, two in itertools.pairwise(frames):
    assert one.shape == (96, 96, 3)
    assert (np.abs(one - two).max(axis=-1) > 30).sum() > 100


def test_cards_are_half_filled_with_the_colour():
  for kind in world.NEEDLES:
    for name in world.NEEDLE_COLOURS:
      needle = script.Needle(0, 1, kind, name, True)
      card = draw.frame(script.Script("x", 1, (), (needle,)), 0)
      share = (card == world.COLOURS[name]).all(axis=-1).mean()
      assert 0.38 < share < 0.62, (kind, share)
