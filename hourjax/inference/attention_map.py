"""Attention maps: MemAug's attention over the seconds of a video.

Matplotlib takes a second to import, so it is imported where a figure is drawn.
"""

import dataclasses
import os
import pathlib
import types
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from hourjax import plots
from hourjax.data.media.video import frame_at
from hourjax.errors import UserError

if TYPE_CHECKING:
  import matplotlib.figure

_LEVELS = " ▁▂▃▄▅▆▇█"
_FRAME_SIDE = 192  # pixels of a video frame in a figure
_TITLE_LENGTH = 110  # characters of a question or an answer
# The first font comes with matplotlib; the others have characters it lacks.
_FONTS = (
  "DejaVu Sans",
  "Noto Sans CJK SC",
  "Noto Sans CJK JP",
  "Microsoft YaHei",
  "PingFang SC",
  "Arial Unicode MS",
)


@dataclasses.dataclass(frozen=True)
class AttentionMap:
  """Holds MemAug's attention over a video for one question.

  Attributes:
    edges: seconds at which the spans begin, and the end of the last one,
      ascending. Each span belongs to one frame.
    attention: fraction of the attention that each span gets; sums to 1.
  """

  edges: Float[np.ndarray, "edges"]
  attention: Float[np.ndarray, "n"]

  @property
  def duration(self) -> float:
    """Returns the length of the video in seconds."""
    return float(self.edges[-1])

  def binned(
    self, edges: Sequence[float] | np.ndarray
  ) -> Float[np.ndarray, "m"]:
    """Returns the attention of other spans of time.

    A span that lies in two bins is divided between them in proportion to time.

    Args:
      edges: seconds at which bins begin, and the end of the last one.
    """
    total = np.append(0.0, np.cumsum(self.attention))
    return np.diff(np.interp(edges, self.edges, total))

  def minutes(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the attention by minute.

    A video below five minutes is divided into tenths instead, which are not
    shorter than a second.

    Returns:
      Edges of the bins in seconds, and the attention of each.
    """
    if self.duration < 300:
      edges = np.linspace(
        0, self.duration, max(1, min(10, int(self.duration))) + 1
      )
    else:
      edges = np.append(np.arange(0, self.duration, 60.0), self.duration)
    return edges, self.binned(edges)

  def peaks(self, count: int = 3) -> list[tuple[float, float, float]]:
    """Returns the minutes with most attention, as `minutes` divides them.

    Args:
      count: how many.

    Returns:
      (start, end, attention), start and end in seconds, the highest first.
    """
    edges, attention = self.minutes()
    order = np.argsort(-attention, kind="stable")[:count]
    return [
      (float(edges[i]), float(edges[i + 1]), float(attention[i])) for i in order
    ]

  def text(self, width: int = 60) -> str:
    """Returns a bar over time for a terminal, and the highest minutes.

    Args:
      width: characters of the bar.
    """
    attention = self.binned(np.linspace(0, self.duration, width + 1))
    level = np.ceil(attention / max(attention.max(), 1e-12) * 8)
    bar = "".join(_LEVELS[int(n)] for n in level)
    ends = clock(0) + clock(self.duration).rjust(width - len(clock(0)))
    most = ", ".join(
      f"{clock(start)}-{clock(end)} {attention:.0%}"
      for start, end, attention in self.peaks()
    )
    return f"{bar}\n{ends}\nmost attention at {most}"


def attention_over_time(
  weights: Float[np.ndarray, "blocks S"],
  frame: np.ndarray,
  duration: float,
) -> AttentionMap:
  """Computes an attention map from the attention of memory tokens.

  Blocks count equally: each one's weights are divided by their sum.

  Args:
    weights: attention of each memory token in each block, in any unit.
    frame: index of the frame of each memory token; -1 is padding.
    duration: length of the video in seconds. Every frame rule takes the n-th
      of N frames from the n-th of N equal parts of the video.
  """
  is_token = frame >= 0
  weights = weights[:, is_token]
  weights = weights / weights.sum(1, keepdims=True)
  attention = np.bincount(frame[is_token], weights=weights.mean(0))
  edges = np.linspace(0, duration, len(attention) + 1)
  return AttentionMap(edges, attention / attention.sum())


def clock(seconds: float) -> str:
  """Returns a time as 1:02:03, or as 02:03 below an hour."""
  whole = round(seconds)
  hours, minutes = whole // 3600, whole // 60 % 60
  tail = f"{minutes:02d}:{whole % 60:02d}"
  return f"{hours}:{tail}" if hours else tail


def attention_figure(
  attention: AttentionMap,
  *,
  question: str = "",
  answer: str = "",
  video: str | os.PathLike | None = None,
  num_frames: int = 5,
) -> "matplotlib.figure.Figure":
  """Draws attention over time; with a video also its frames at the peaks.

  Args:
    attention: attention map of an answer.
    question: question for the title.
    answer: answer for the title.
    video: video file to take frames from.
    num_frames: how many frames are drawn.

  Raises:
    UserError: the video cannot be read.
  """
  plt = _pyplot()
  from matplotlib import font_manager

  edges, values = attention.minutes()
  count = min(num_frames, len(values))
  best = np.argsort(-values, kind="stable")[:count].tolist()
  figure = plt.figure(figsize=(9, 4.8 if video else 2.9), layout="constrained")
  grid = figure.add_gridspec(
    2 if video else 1, count, height_ratios=[1.15, 1] if video else [1]
  )
  if video:
    seconds = sorted(_peak_second(attention, edges, i) for i in best)
    for column, second in enumerate(seconds):
      axes = figure.add_subplot(grid[0, column])
      axes.imshow(frame_at(video, second, _FRAME_SIDE))
      axes.set_title(clock(second), fontsize=9)
      axes.set_axis_off()
  axes = figure.add_subplot(grid[-1, :])
  colours = [
    plots.PEAK_BAR if i in best else plots.PALE_BAR for i in range(len(values))
  ]
  axes.bar(
    edges[:-1] / 60, values, np.diff(edges) / 60 * 0.92, align="edge",
    color=colours,
  )  # fmt: skip
  axes.set_xlim(0, attention.duration / 60)
  axes.set(xlabel="minutes", ylabel="attention")
  digits = 0 if values.max() > 0.05 else 1
  axes.yaxis.set_major_formatter(lambda value, _: f"{value:.{digits}%}")
  axes.spines[["top", "right"]].set_visible(False)
  title = [_shortened(text) for text in (question, answer) if text]
  installed = set(font_manager.get_font_names())
  # parse_math: "$5 or $6" in a question is not a formula.
  figure.suptitle(
    "\n".join(title), x=0.01, ha="left", fontsize=10, parse_math=False,
    family=[font for font in _FONTS if font in installed],
  )  # fmt: skip
  return figure


def check_figure_path(path: str | os.PathLike) -> None:
  """Checks that `save_attention_figure` can write a file, before any work.

  Args:
    path: the file.

  Raises:
    UserError: matplotlib does not know the file's ending, the folder does not
      exist, or the file may not be written.
  """
  plt = _pyplot()
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
  attention: AttentionMap, path: str | os.PathLike, **options: Any
) -> None:
  """Writes the figure that `attention_figure` draws to a file.

  Args:
    attention: attention map of an answer.
    path: the file; its ending names the format.
    **options: as `attention_figure` takes them.

  Raises:
    UserError: the video cannot be read, or the file cannot be written.
  """
  figure = attention_figure(attention, **options)
  try:
    with warnings.catch_warnings():
      # A character that no font has becomes a box. Matplotlib would warn of
      # each one.
      warnings.filterwarnings("ignore", "Glyph .* missing from font")
      figure.savefig(path, dpi=120)
  except OSError as error:
    raise UserError(f"cannot write {path}: {error.strerror}") from None
  finally:
    _pyplot().close(figure)


def _pyplot() -> types.ModuleType:
  """Imports matplotlib, which draws without a screen."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  return plt


def _peak_second(attention: AttentionMap, edges: np.ndarray, i: int) -> float:
  """Returns the second with most attention within bin `i`."""
  starts = attention.edges[:-1]
  inside = np.flatnonzero((starts >= edges[i]) & (starts < edges[i + 1]))
  if not len(inside):
    return float(edges[i])
  return float(starts[inside[np.argmax(attention.attention[inside])]])


def _shortened(text: str) -> str:
  text = " ".join(text.split())
  if len(text) <= _TITLE_LENGTH:
    return text
  return f"{text[: _TITLE_LENGTH - 3]}..."
