"""The look of plots: one palette, figures without a screen, rows of bars.

Matplotlib takes a second to import, so it is imported where a figure is made.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def new_chart(width: float, height: float, title: str) -> "tuple[Figure, Axes]":
  """Creates a figure with one plot, its title and two of its spines.

  Args:
    width: in inches.
    height: in inches.
    title: of the plot.
  """
  figure = new_figure(width, height)
  axes = figure.subplots()
  axes.set_title(title, loc="left", color=INK)
  keep_spines(axes, "left", "bottom")
  return figure, axes


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


def grouped_bars(
  axes: "Axes",
  series: Mapping[str, Mapping[int, tuple[float, float, float]]],
) -> None:
  """Draws the bars of several series side by side, with their intervals.

  Args:
    axes: the plot.
    series: name -> row, from 0 on -> value and both ends of its interval.
  """
  height = 0.8 / max(len(series), 1)
  colours = series_colours(len(series))
  for number, (name, bars) in enumerate(series.items()):
    # The bars of a row lie side by side, their middle at the row's number.
    offset = (number - (len(series) - 1) / 2) * height
    places = [row + offset for row in bars]
    values = [value for value, _, _ in bars.values()]
    # Lengths must not be negative, and an end may lie on the wrong side of its
    # value by a rounding error.
    below = [max(0, value - low) for value, low, _ in bars.values()]
    above = [max(0, high - value) for value, _, high in bars.values()]
    axes.barh(places, values, height * 0.9, label=name, color=colours[number])
    axes.errorbar(
      values, places, xerr=[below, above], fmt="none", ecolor=INK,
      elinewidth=0.9, capsize=min(2.5, 8 * height),
    )  # fmt: skip


def mark_rows(axes: "Axes", values: Sequence[float], *, label: str) -> None:
  """Draws a dotted tick in each row of a chart of horizontal bars.

  Args:
    axes: the plot.
    values: one for each row.
    label: what the ticks are, for the legend.
  """
  for row, value in enumerate(values):
    ends = [row - 0.45, row + 0.45]
    name = None if row else label
    axes.plot([value] * 2, ends, ":", color=INK, lw=1.4, label=name)


def heat_maps(
  maps: Mapping[str, Sequence[Sequence[Mapping[str, Any] | None]]],
  *,
  rows: Sequence[str],
  columns: Sequence[str],
) -> "Figure":
  """Draws tables of accuracies side by side, the higher the darker.

  Args:
    maps: title -> rows of cells: {"accuracy", "count"}; None leaves a cell
      empty.
    rows: their names.
    columns: their names; the unit stands below the number.
  """
  width = 1.2 + (0.4 + 0.58 * len(columns)) * len(maps)
  figure = new_figure(width, 1.3 + 0.46 * len(rows))
  places = figure.subplots(1, len(maps), squeeze=False)[0]
  missing = float("nan")
  for axes, (title, table) in zip(places, maps.items()):
    shares = [
      [cell["accuracy"] if cell else missing for cell in row] for row in table
    ]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(table):
      for x, cell in enumerate(row):
        if cell:
          text = f"{cell['accuracy']:.0%}\nof {cell['count']}"
          ink = "white" if cell["accuracy"] > 0.55 else INK
          axes.text(
            x, y, text, ha="center", va="center", fontsize=6.5, color=ink
          )
    first = axes is places[0]
    axes.set_yticks(range(len(rows)), rows if first else [""] * len(rows))
    names = [name.replace(" ", "\n", 1) for name in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=7)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9, color=INK)
    keep_spines(axes)
  return figure


def png(figure: "Figure", dpi: float = 130) -> bytes:
  """Returns a figure as the bytes of a PNG file.

  Args:
    figure: the figure.
    dpi: dots per inch.
  """
  file = io.BytesIO()
  figure.savefig(file, dpi=dpi, format="png")
  return file.getvalue()
