"""Where in a video the model looked, as shares of attention over time."""
# MERGED hourjax.inference.picture:
# Where the model looked, as a picture.

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.figure import Figure

from hourjax.data.media.video import frame_at
from hourjax.errors import UserError

_BARS = " ▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class AttentionMap:
  """Attention that MemAug pays to a video's moments for one question.

  Attributes:
    edges: seconds at which moments begin and the last one ends, ascending.
    share: of each moment; they sum to 1.
  """

  edges: Float[np.ndarray, "edges"]
  share: Float[np.ndarray, "n"]

  @property
  def duration(self) -> float:
    """Seconds."""
    return float(self.edges[-1])

  def binned(
    self, edges: Sequence[float] | np.ndarray
  ) -> Float[np.ndarray, "m"]:
    """Shares of other spans of time; a moment is divided as time is."""
    total = np.append(0.0, np.cumsum(self.share))
    return np.diff(np.interp(edges, self.edges, total))

  def minutes(self) -> tuple[np.ndarray, np.ndarray]:
    """(edges in seconds, shares) of minutes; of tenths below five minutes.

    Nothing is finer than a second.
    """
    if self.duration < 300:
      edges = np.linspace(
        0, self.duration, max(1, min(10, int(self.duration))) + 1
      )
    else:
      edges = np.append(np.arange(0, self.duration, 60.0), self.duration)
    return edges, self.binned(edges)

  def peaks(self, count: int = 3) -> list[tuple[float, float, float]]:
    """(start, end, share) of the minutes that got most, most first.

    Seconds; of videos below five minutes, tenths instead of minutes.
    """
    edges, share = self.minutes()
    order = np.argsort(-share, kind="stable")[:count]
    return [
      (float(edges[i]), float(edges[i + 1]), float(share[i])) for i in order
    ]

  def text(self, width: int = 60) -> str:
    """A bar over time for a terminal, and the minutes that got most."""
    share = self.binned(np.linspace(0, self.duration, width + 1))
    level = np.ceil(share / max(share.max(), 1e-12) * (len(_BARS) - 1))
    bar = "".join(_BARS[int(n)] for n in level)
    ends = clock(0) + clock(self.duration).rjust(width - len(clock(0)))
    most = ", ".join(
      f"{clock(start)}-{clock(end)} {share:.0%}"
      for start, end, share in self.peaks()
    )
    return f"{bar}\n{ends}\nlooked most at {most}"


def attention_over_time(
  shares: Float[np.ndarray, "blocks S"],
  frame: np.ndarray,
  duration: float,
) -> AttentionMap:
  """From attention by memory token.

  Args:
    shares: weights by block and place, in any unit.
    frame: number of the frame at each place; -1 is padding.
    duration: of the video in seconds. Frames lie evenly over it: by every
      frame rule the n-th of N is shown in the n-th of N equal parts.
  """
  there = frame >= 0
  weight = shares[:, there] / shares[:, there].sum(1, keepdims=True)
  share = np.bincount(frame[there], weights=weight.mean(0))
  edges = np.linspace(0, duration, len(share) + 1)
  return AttentionMap(edges, share / share.sum())


def clock(seconds: float) -> str:
  """1:02:03, or 02:03 below an hour."""
  whole = round(seconds)
  hours, minutes = whole // 3600, whole // 60 % 60
  tail = f"{minutes:02d}:{whole % 60:02d}"
  return f"{hours}:{tail}" if hours else tail


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


def attention_figure(
  looked: AttentionMap,
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
  """Raises a UserError where `save_attention_figure` could not write, before any work."""
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


def save_attention_figure(
  looked: AttentionMap, path: str | os.PathLike, **options
) -> None:
  """Writes `attention_figure` to a file.

  Raises:
    UserError: the film cannot be read, or the file not be written.
  """
  figure = attention_figure(looked, **options)
  try:
    with warnings.catch_warnings():
      # Letters that no font has are boxes; a line for each helps nobody.
      warnings.filterwarnings("ignore", "Glyph .* missing from font")
      figure.savefig(path, dpi=120)
  except OSError as error:
    raise UserError(f"cannot write {path}: {error.strerror}") from None
  finally:
    plt.close(figure)


def _moment(looked: AttentionMap, edges, i: int) -> float:
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
