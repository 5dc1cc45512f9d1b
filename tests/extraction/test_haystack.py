import json

import numpy as np
import pytest

from configs import demo
from hourjax.data.demo import drawing, script
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.extraction import haystack
from hourjax.extraction.encoder import Encoder
from hourjax.models.params import init_params


@pytest.fixture(scope="module")
def encoder():
  return Encoder(init_params(demo.MODEL, 0), demo.MODEL)


def _write(encoder, folder, **changes):
  options = {"minutes": [4, 20], "depths": 2, "videos": 1, "seed": 0}
  return haystack.write_haystack(encoder, folder, **(options | changes))


def test_features_are_those_of_each_second(encoder):
  whole = script.make_script(0, "test", 1, (200, 200))
  found = haystack.encode_script(encoder, whole)
  assert found.shape == (200, *encoder.shape)
  for second in (0, 57, whole.needle.spans[0][0], whole.clip.end - 1, 199):
    frame = drawing.frame(whole, second)
    alone = np.zeros((encoder.batch, 64, 64, 3), np.uint8)
    alone[0] = haystack.images.resize(frame, 64)
    np.testing.assert_allclose(
      found[second], np.asarray(encoder(alone))[0], rtol=1e-5, atol=1e-5
    )


def test_needles_lie_at_their_depths(encoder, tmp_path):
  scripts = _write(encoder, tmp_path)
  assert [s.duration for s in scripts] == [240, 240, 1200, 1200]
  assert len({s.name for s in scripts}) == 4
  records = json.loads((tmp_path / "test.json").read_text())
  assert len(records) == 4 * 4
  for record in records:
    (facts,) = record["questions"]
    depth = facts["seconds"][0] / record["duration"]
    assert min(abs(depth - 0.25), abs(depth - 0.75)) < 0.08
    assert facts["needle"] and facts["dropped"]
  store = FeatureStore(tmp_path / "features")
  assert {f"{s.name}.mp4" for s in scripts} == set(store.videos())
  assert store.stored(records[-1]["video"]) == (1200, 1200.0)


def test_other_options_are_other_videos(encoder, tmp_path):
  """Their features lie side by side in one store."""
  names = {
    s.name
    for depths, seed in ((1, 0), (2, 0), (1, 1))
    for s in _write(encoder, tmp_path, minutes=[4], depths=depths, seed=seed)
  }
  assert len(names) == 1 + 2 + 1
  assert len(FeatureStore(tmp_path / "features")) == 4


def test_what_needles_show_does_not_go_with_their_depth():
  for depth in (0.1, 0.5, 0.9):
    made = [
      haystack._script(0, minutes, depth, number)
      for minutes in (4, 10, 30)
      for number in range(8)
    ]
    assert len({s.clip.word for s in made}) == 4
    assert len({s.needle.colour for s in made}) == 4


def test_stored_videos_are_not_drawn_again(encoder, tmp_path, monkeypatch):
  _write(encoder, tmp_path, minutes=[4])
  drawn = []
  encode = haystack.encode_script
  monkeypatch.setattr(
    haystack,
    "encode_script",
    lambda e, s: drawn.append(s.duration) or encode(e, s),
  )
  _write(encoder, tmp_path, minutes=[4, 5])
  assert drawn == [300, 300]


@pytest.mark.parametrize("minutes", [2, 1441])
def test_lengths_out_of_range(encoder, tmp_path, minutes):
  with pytest.raises(
    UserError, match=rf"a video of {minutes} minutes;.* from 3 to 1440"
  ):
    _write(encoder, tmp_path, minutes=[minutes])
