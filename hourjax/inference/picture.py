"""Where the model looked, as a picture."""

import os
import pathlib
import warnings
from collections.abc import Sequence

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

from hourjax.data.video import frame_at
from hourjax.errors import UserError
from hourjax.inference.looking import Looked, clock

_SIDE = 192  # pixels of a frame that is shown
_BAR, _PEAK = "#9db8cf", "#1b6ca8"
_SHORT = 110  # letters of a question or an answer
# The first one comes with matplotlib; the others have the letters it lacks.
_FONTS = (
  "DejaVu Sans",
  "Noto Sans CJK SC",
  "Noto Sans CJK JP",
  "Microsoft YaHei",
  "PingFang SC",
  "Arial Unicode MS",
)


def look_figure(
  looked: Looked,
  *,
  question: str = "",
  answer: str = "",
  film: str | os.PathLike | None = None,
  frames: int = 5,
) -> Figure:
  """Attention over time; of a film also the moments that got most.

  Args:
    looked: of an answer.
    question, answer: for the title.
    film: video file to take frames from.
    frames: how many are shown.

  Raises:
    UserError: the film cannot be read.
  """
  edges, share = looked.minutes()
  count = min(frames, len(share))
  best = np.argsort(-share, kind="stable")[:count].tolist()
  figure = plt.figure(figsize=(9, 4.8 if film else 2.9), layout="constrained")
  grid = figure.add_gridspec(
    2 if film else 1, count, height_ratios=[1.15, 1] if film else [1]
  )
  if film:
    moments = sorted(_moment(looked, edges, i) for i in best)
    for column, (second, picture) in enumerate(_frames(film, moments)):
      axes = figure.add_subplot(grid[0, column])
      axes.imshow(picture)
      axes.set_title(clock(second), fontsize=9)
      axes.set_axis_off()
  axes = figure.add_subplot(grid[-1, :])
  colours = [_PEAK if i in best else _BAR for i in range(len(share))]
  axes.bar(
    edges[:-1] / 60, share, np.diff(edges) / 60 * 0.92, align="edge",
    color=colours,
  )  # fmt: skip
  axes.set_xlim(0, looked.duration / 60)
  axes.set(xlabel="minutes", ylabel="attention")
  digits = 0 if share.max() > 0.05 else 1
  axes.yaxis.set_major_formatter(lambda value, _: f"{value:.{digits}%}")
  axes.spines[["top", "right"]].set_visible(False)
  title = [_short(text) for text in (question, answer) if text]
  installed = set(font_manager.get_font_names())
  # "$5 or $6" is no formula.
  figure.suptitle(
    "\n".join(title), x=0.01, ha="left", fontsize=10, parse_math=False,
    family=[font for font in _FONTS if font in installed],
  )  # fmt: skip
  return figure


def check_picture(path: str | os.PathLike) -> None:
  """Raises a UserError where `save_look` could not write, before any work."""
  path = pathlib.Path(path)
  known = sorted(plt.figure().canvas.get_supported_filetypes())
  plt.close()
  if path.suffix.lower().removeprefix(".") not in known:
    raise UserError(
      f"a picture cannot be written as {path.name}; name it .png"
      f" (or {', '.join(known)})"
    )
  if path.is_dir() or not path.parent.is_dir():
    raise UserError(
      f"{path.parent} is no folder for the picture {path.name}; make it, or"
      " write elsewhere"
    )
  if not os.access(path if path.exists() else path.parent, os.W_OK):
    raise UserError(f"no right to write {path}; write elsewhere")


def save_look(looked: Looked, path: str | os.PathLike, **options) -> None:
  """Writes `look_figure` to a file.

  Raises:
    UserError: the film cannot be read, or the file not be written.
  """
  figure = look_figure(looked, **options)
  try:
    with warnings.catch_warnings():
      # Letters that no font has are boxes; a line for each helps nobody.
      warnings.filterwarnings("ignore", "Glyph .* missing from font")
      figure.savefig(path, dpi=120)
  except OSError as error:
    raise UserError(f"cannot write {path}: {error.strerror}") from None
  finally:
    plt.close(figure)


def _moment(looked: Looked, edges, i: int) -> float:
  """The second within minute `i` that got most."""
  inside = (looked.edges[:-1] >= edges[i]) & (looked.edges[:-1] < edges[i + 1])
  if not inside.any():
    return float(edges[i])
  where = np.flatnonzero(inside)
  return float(looked.edges[where[np.argmax(looked.share[where])]])


def _frames(film, moments: Sequence[float]):
  return [(second, frame_at(film, second, _SIDE)) for second in moments]


def _short(text: str) -> str:
  text = " ".join(text.split())
  return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."
