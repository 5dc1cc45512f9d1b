"""The look of plots: one palette, figures without a screen, rows of bars.

Matplotlib takes a second to import, so it is imported where a figure is made.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import LayoutEngine

# Text and lines that matter, and those that stay in the background.
INK, FAINT = "#22303c", "#8895a0"
BAR = "#3b78a8"  # a lone series of bars
# Bars among which a few stand out, and those few.
PALE_BAR, PEAK_BAR = "#9db8cf", "#1b6ca8"
# Okabe and Ito's colours, which people with colour blindness can tell apart;
# their yellow is darker here, to be seen on white.
SERIES = (
  "#0072b2",
  "#e69f00",
  "#009e73",
  "#cc79a7",
  "#d55e00",
  "#56b4e9",
  "#b8a800",
)


def series_colours(count: int) -> list[str]:
  """Returns a colour for each of several series; they repeat after SERIES.

  Args:
    count: number of series.
  """
  return [SERIES[i % len(SERIES)] for i in range(count)]


def new_figure(
  width: float,
  height: float,
  *,
  dpi: float | None = None,
  layout: "LayoutEngine | None" = None,
) -> "Figure":
  """Creates an empty figure that can be drawn without a screen.

  Args:
    width: in inches.
    height: in inches.
    dpi: dots per inch; matplotlib's default if None.
    layout: places what the figure holds; matplotlib's "constrained" if None.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(
    figsize=(width, height), dpi=dpi, layout=layout or "constrained"
  )
  FigureCanvasAgg(figure)
  return figure


def keep_spines(axes: "Axes", *sides: str) -> None:
  """Hides the frame of a plot but for some sides, which become faint.

  Args:
    axes: the plot.
    *sides: "left", "right", "top" or "bottom".
  """
  for side, spine in axes.spines.items():
    spine.set_visible(side in sides)
    spine.set_color(FAINT)


def name_rows(axes: "Axes", names: Sequence[str]) -> None:
  """Names the rows of a chart of horizontal bars, the first row on top.

  Args:
    axes: the plot, whose bars lie at 0, 1, 2, ... on its vertical axis.
    names: one for each row. A dollar sign in one does not begin a formula.
  """
  axes.set_yticks(range(len(names)), names, parse_math=False)
  axes.set_ylim(len(names) - 0.4, -0.6)


def png(figure: "Figure", dpi: float = 130) -> bytes:
  """Returns a figure as the bytes of a PNG file.

  Args:
    figure: the figure.
    dpi: dots per inch.
  """
  file = io.BytesIO()
  figure.savefig(file, dpi=dpi, format="png")
  return file.getvalue()
