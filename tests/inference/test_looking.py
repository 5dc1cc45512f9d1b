"""Attention over time, as numbers, text and picture."""

import numpy as np
import pytest

from hourjax.errors import UserError
from hourjax.inference.attention_map import (
  AttentionMap,
  attention_figure,
  attention_over_time,
  check_picture,
  clock,
  save_attention_figure,
)
from tests import videos


def _looked(duration=1800.0, peak=1000):
  share = np.full(int(duration), 0.5 / duration)
  share[peak] += 0.5
  return AttentionMap(np.linspace(0, duration, len(share) + 1), share)


def test_from_tokens_to_time():
  # Two blocks, frames of 2 tokens and a newline, dealt to two devices.
  places = np.array([0, 2, 4, 1, 3, 5, -1, -1])
  shares = np.array([[1, 1, 2, 1, 2, 1, 9, 9], [4, 0, 0, 0, 0, 0, 9, 9.0]])
  frame = np.where(places < 0, -1, places // 3)
  looked = attention_over_time(shares, frame, 10.0)
  np.testing.assert_allclose(looked.edges, [0, 5, 10])
  # The first block: 3 of 8 on frame 0; the second: all of it.
  np.testing.assert_allclose(looked.share, [(3 / 8 + 1) / 2, (5 / 8) / 2])


def test_minutes_and_peaks():
  looked = _looked()
  edges, share = looked.minutes()
  assert edges.tolist() == [60.0 * n for n in range(31)]
  np.testing.assert_allclose(share.sum(), 1)
  start, end, most = looked.peaks()[0]
  assert (start, end) == (960.0, 1020.0) and most == pytest.approx(0.5 + 1 / 60)
  short = _looked(100.0, 42)
  assert len(short.minutes()[1]) == 10
  assert short.peaks(1)[0][:2] == (40.0, 50.0)
  # A short video's frames are repeated; a second is not divided.
  one = AttentionMap(np.linspace(0, 1.5, 129), np.full(128, 1 / 128))
  assert one.peaks() == [(0.0, 1.5, pytest.approx(1))]
  odd = AttentionMap(np.linspace(0, 350.5, 352), np.full(351, 1 / 351))
  assert odd.minutes()[0][-2:].tolist() == [300.0, 350.5]


def test_binned_divides_a_moment_as_time():
  looked = AttentionMap(np.array([0.0, 10, 20]), np.array([0.25, 0.75]))
  np.testing.assert_allclose(looked.binned([0, 5, 20]), [0.125, 0.875])


def test_text():
  bar, ends, most = _looked(4000.0, 3000).text(40).splitlines()
  assert len(bar) == len(ends) == 40
  assert bar[30] == "█" and set(bar[:30]) == {"▁"}
  assert ends.startswith("00:00") and ends.endswith("1:06:40")
  assert most.startswith("looked most at 50:00-51:00 51%, ")


def test_clock():
  assert [clock(n) for n in (0, 61.4, 3600, 37230)] == [
    "00:00",
    "01:01",
    "1:00:00",
    "10:20:30",
  ]


@pytest.mark.parametrize("duration, shown", [(600.0, 5), (3.0, 3), (70.0, 5)])
def test_picture_with_frames(tmp_path, duration, shown):
  film = videos.write(tmp_path / "film.mp4", int(duration), rate=1)
  figure = attention_figure(
    _looked(duration, 1), question="Who?", answer="A dog", film=film
  )
  frames = [axes for axes in figure.axes if axes.images]
  assert len(frames) == min(5, shown)
  titles = [axes.get_title() for axes in frames]
  assert titles == sorted(titles)
  assert "A dog" in figure.get_suptitle()
  dollars = r"$5 or $\no$?"  # no formula
  save_attention_figure(
    _looked(duration, 1), tmp_path / "look.png", question=dollars
  )
  assert (tmp_path / "look.png").stat().st_size > 4000


def test_letters_that_no_font_has(tmp_path, recwarn):
  save_attention_figure(
    _looked(), tmp_path / "look.png", question="\U0001f436 \U00020bb7?"
  )
  assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_pictures_that_cannot_be_written(tmp_path):
  check_picture(tmp_path / "look.png")
  check_picture(tmp_path / "look.PDF")
  (tmp_path / "folder.png").mkdir()
  for name, message in {
    "look.xyz": r"cannot be written as look.xyz; name it .png",
    "look": "cannot be written as look;",
    "no/look.png": r"/no is no folder for the picture look.png",
    "folder.png": "is no folder for the picture",
  }.items():
    with pytest.raises(UserError, match=message):
      check_picture(tmp_path / name)
  with pytest.raises(UserError, match=r"cannot write .*no/look.png"):
    save_attention_figure(_looked(), tmp_path / "no/look.png")
  assert not (tmp_path / "no").exists()
