"""Attention over time, as numbers, text and figure."""

import ast
import pathlib

import numpy as np
import pytest

from hourjax.errors import UserError
from hourjax.inference import attention_map
from hourjax.inference.attention_map import (
  AttentionMap,
  attention_figure,
  attention_over_time,
  check_figure_path,
  clock,
  save_attention_figure,
)
from tests import videos


def _map(duration=1800.0, peak=1000):
  weights = np.full(int(duration), 0.5 / duration)
  weights[peak] += 0.5
  return AttentionMap(np.linspace(0, duration, len(weights) + 1), weights)


def test_from_tokens_to_time():
  # Two blocks, frames of 2 tokens and a newline, sharded over two devices.
  places = np.array([0, 2, 4, 1, 3, 5, -1, -1])
  weights = np.array([[1, 1, 2, 1, 2, 1, 9, 9], [4, 0, 0, 0, 0, 0, 9, 9.0]])
  frame = np.where(places < 0, -1, places // 3)
  attention = attention_over_time(weights, frame, 10.0)
  np.testing.assert_allclose(attention.edges, [0, 5, 10])
  # The first block: 3 of 8 on frame 0; the second: all of it.
  np.testing.assert_allclose(
    attention.attention, [(3 / 8 + 1) / 2, (5 / 8) / 2]
  )


def test_minutes_and_peaks():
  attention = _map()
  edges, minutes = attention.minutes()
  assert edges.tolist() == [60.0 * n for n in range(31)]
  np.testing.assert_allclose(minutes.sum(), 1)
  start, end, most = attention.peaks()[0]
  assert (start, end) == (960.0, 1020.0) and most == pytest.approx(0.5 + 1 / 60)
  short = _map(100.0, 42)
  assert len(short.minutes()[1]) == 10
  assert short.peaks(1)[0][:2] == (40.0, 50.0)
  # A short video's frames are repeated; a second is not divided.
  one = AttentionMap(np.linspace(0, 1.5, 129), np.full(128, 1 / 128))
  assert one.peaks() == [(0.0, 1.5, pytest.approx(1))]
  odd = AttentionMap(np.linspace(0, 350.5, 352), np.full(351, 1 / 351))
  assert odd.minutes()[0][-2:].tolist() == [300.0, 350.5]


def test_binned_divides_a_moment_as_time():
  attention = AttentionMap(np.array([0.0, 10, 20]), np.array([0.25, 0.75]))
  np.testing.assert_allclose(attention.binned([0, 5, 20]), [0.125, 0.875])


def test_text():
  bar, ends, most = _map(4000.0, 3000).text(40).splitlines()
  assert len(bar) == len(ends) == 40
  assert bar[30] == "█" and set(bar[:30]) == {"▁"}
  assert ends.startswith("00:00") and ends.endswith("1:06:40")
  assert most.startswith("most attention at 50:00-51:00 51%, ")


def test_clock():
  assert [clock(n) for n in (0, 61.4, 3600, 37230)] == [
    "00:00",
    "01:01",
    "1:00:00",
    "10:20:30",
  ]


@pytest.mark.parametrize(
  "duration, num_frames", [(600.0, 5), (3.0, 3), (70.0, 5)]
)
def test_figure_with_frames(tmp_path, duration, num_frames):
  video = videos.write(tmp_path / "video.mp4", int(duration), rate=1)
  figure = attention_figure(
    _map(duration, 1), question="Who?", answer="A dog", video=video
  )
  frames = [axes for axes in figure.axes if axes.images]
  assert len(frames) == num_frames
  titles = [axes.get_title() for axes in frames]
  assert titles == sorted(titles)
  assert "A dog" in figure.get_suptitle()
  dollars = r"$5 or $\no$?"  # no formula
  save_attention_figure(
    _map(duration, 1), tmp_path / "attention.png", question=dollars
  )
  assert (tmp_path / "attention.png").stat().st_size > 4000


def test_characters_that_no_font_has(tmp_path, recwarn):
  save_attention_figure(
    _map(), tmp_path / "attention.png", question="\U0001f436 \U00020bb7?"
  )
  assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_figures_that_cannot_be_written(tmp_path):
  check_figure_path(tmp_path / "attention.png")
  check_figure_path(tmp_path / "attention.PDF")
  (tmp_path / "folder.png").mkdir()
  for name, message in {
    "attention.xyz": r"cannot be written as attention.xyz; name it .png",
    "attention": "cannot be written as attention;",
    "no/attention.png": r"/no is no folder for the picture attention.png",
    "folder.png": "is no folder for the picture",
  }.items():
    with pytest.raises(UserError, match=message):
      check_figure_path(tmp_path / name)
  with pytest.raises(UserError, match=r"cannot write .*no/attention.png"):
    save_attention_figure(_map(), tmp_path / "no/attention.png")
  assert not (tmp_path / "no").exists()


def test_matplotlib_is_imported_only_to_draw():
  tree = ast.parse(pathlib.Path(attention_map.__file__).read_text())
  names = [
    ast.unparse(node)
    for node in tree.body
    if isinstance(node, ast.Import | ast.ImportFrom)
  ]
  assert names and not any("matplotlib" in name for name in names)
