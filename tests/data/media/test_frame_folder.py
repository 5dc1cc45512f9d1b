import numpy as np
import pytest
from PIL import Image

from hourjax.data.media import frame_folder, video
from hourjax.errors import UserError


def _folder(path, names):
  """Frames of one grey each: 10, 20, 30, ..., in the order of `names`."""
  path.mkdir()
  for i, name in enumerate(names):
    Image.new("RGB", (32, 24), (10 * (i + 1),) * 3).save(path / name)
  return path


def _greys(frames):
  return [int(frame[0, 0, 0]) for part in frames for frame in part]


NAMES = ["f_1.png", "f_2.png", "f_9.png", "f_10.png", "f_11.png", "g_0.png"]


def test_a_folder_is_a_video_of_its_frames(tmp_path):
  path = _folder(tmp_path / "a.mp4", NAMES)
  (path / "Thumbs.db").write_bytes(b"x")
  (path / ".f_5.png").write_bytes(b"x")
  (path / "sub").mkdir()
  info = video.probe(path)
  assert (info.frames, info.fps, info.duration) == (6, 2, 3.0)
  assert (info.width, info.height) == (32, 24)
  # In the order of the numbers, not of the letters.
  assert _greys(video.decode_frames(path, range(6), 8)) == [
    *(10, 20, 30, 40, 50, 60)
  ]
  frames = list(video.decode_frames(path, [0, 3, 3, 5], 8, batch=3))
  assert [part.shape for part in frames] == [(3, 8, 8, 3), (1, 8, 8, 3)]
  assert _greys(frames) == [10, 40, 40, 60]


@pytest.mark.parametrize(
  "second, grey", [(0, 10), (0.5, 20), (0.9, 20), (2.6, 60), (99, 60), (-1, 10)]
)
def test_a_moment(tmp_path, second, grey):
  path = _folder(tmp_path / "a", NAMES)
  assert video.frame_at(path, second, 8)[0, 0, 0] == grey


def test_frames_of_a_video_are_those_of_images(tmp_path):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 255, (24, 32, 3), np.uint8)
  (tmp_path / "a").mkdir()
  Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
  (got,) = video.decode_frames(tmp_path / "a", [0], 8)
  expected = frame_folder.resize(pixels, 8)
  np.testing.assert_array_equal(got[0], expected)


def test_mistakes_are_named(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="empty is not a video but a folder with"):
    video.probe(tmp_path / "empty")
  path = _folder(tmp_path / "a", NAMES[:2])
  with pytest.raises(UserError, match="has 2 frames but frame 2 is needed"):
    list(video.decode_frames(path, [0, 2], 8))
  (path / NAMES[1]).write_bytes(b"no image")
  with pytest.raises(UserError, match=r"f_2\.png is not an image"):
    list(video.decode_frames(path, [0, 1], 8))
  with pytest.raises(UserError, match="No such file"):
    frame_folder.frame_files(tmp_path / "none")


def test_a_damaged_frame_costs_itself_alone(tmp_path):
  path = _folder(tmp_path / "a", [f"{i}.png" for i in range(20)])
  (path / "7.png").write_bytes(b"no image")
  reading = video.Reading()
  frames = video.decode_frames(path, range(20), 8, reading=reading)
  greys = [10 * (i + 1) for i in range(20)]
  assert _greys(frames) == [*greys[:7], greys[6], *greys[8:]]
  assert reading.share == 0.95
  (path / "8.png").write_bytes(b"")
  match = r"a: 90.0% of 20 frames .* at least 95% must be \(.*7\.png is not an"
  with pytest.raises(UserError, match=match):
    list(video.decode_frames(path, range(20), 8))


def test_a_damaged_first_frame_is_probed_over(tmp_path):
  path = _folder(tmp_path / "a", NAMES)
  (path / NAMES[0]).write_bytes(b"")
  assert video.probe(path).width == 32
  for name in NAMES:
    (path / name).write_bytes(b"")
  with pytest.raises(UserError, match="a: none of its 6 frames can be read"):
    video.probe(path)
