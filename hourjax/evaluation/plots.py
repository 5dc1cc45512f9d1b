"""Pictures of reports: accuracies with their intervals, losses."""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_TITLES = {
  "task": "Accuracy by task",
  "duration": "Accuracy by length of video",
  "needle": "Needles (shown for 1-2 s) by length of video",
}
_FILES = {
  "by_task": ("accuracy_by_task.png", _TITLES["task"]),
  "by_duration": ("accuracy_by_duration.png", _TITLES["duration"]),
  "needle_by_duration": ("needles_by_duration.png", _TITLES["needle"]),
}
# Told apart by people with colour-blindness too (Okabe and Ito's colours).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
_INK, _FAINT = "#22303c", "#8895a0"
_ROW = 0.3  # inches of a group with one bar
_BAR = 0.16  # of each further one
_TWO_LINES = 0.4  # of a group whose label has two lines
_LABEL = 34  # characters of a line of a label

Groups = Mapping[str, Mapping[str, Any]]


def accuracy(
  reports: Iterable[Any], by: str = "task", title: str | None = None
) -> Figure:
  """Accuracies of one or more reports with their 95 % intervals.

  Args:
    reports: `report.Report`s; every run of each becomes a colour.
    by: "task", "duration", "kind" or another group of the reports.
    title: of the picture.

  Raises:
    ValueError: no report has such groups.
  """
  groups = _merged([report.groups(by) for report in reports])
  if not groups:
    raise ValueError(f"no report tells accuracies by {by!r}")
  words = by.replace("_", " ")
  return _bars(groups, title or _TITLES.get(by, f"Accuracy by {words}"))


def pictures(data: Mapping[str, Any]) -> dict[str, Figure]:
  """The pictures of one report by file name."""
  return {
    name: _bars(data[key], title)
    for key, (name, title) in _FILES.items()
    if data.get(key)
  }


def losses(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
  """Loss by step of each run, from the rows of its metrics.jsonl."""
  figure, axes = _page(7, 3.4, "Training loss")
  for (name, rows), colour in zip(curves.items(), _cycle(len(curves))):
    steps, values = [r["step"] for r in rows], [r["loss"] for r in rows]
    axes.plot(steps, values, label=name, color=colour, linewidth=1.2)
  axes.set(xlabel="step", ylabel="cross entropy", yscale="log")
  axes.legend(frameon=False)
  return figure


def png(figure: Figure) -> bytes:
  """A picture as the bytes of a PNG file."""
  file = io.BytesIO()
  figure.savefig(file, dpi=130, format="png")
  return file.getvalue()


def _merged(tables: Sequence[Groups]) -> Groups:
  """Groups of several reports in one; a run's name that comes again counts on.

  [{"ocr": {"3b": x}}, {"ocr": {"3b": y}}] -> {"ocr": {"3b": x, "3b (2)": y}}
  """
  merged: dict[str, dict[str, Any]] = {}
  used: set[str] = set()
  for table in tables:
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    renamed = {name: _new(name, used) for name in names}
    used |= set(renamed.values())
    for group, row in table.items():
      mine = merged.setdefault(group, {})
      mine |= {renamed[name]: value for name, value in row.items()}
  return merged


def _new(name: str, used: set[str]) -> str:
  number, new = 1, name
  while new in used:
    number += 1
    new = f"{name} ({number})"
  return new


def _bars(groups: Groups, title: str) -> Figure:
  """A bar a run in each group, its interval, and a tick at chance."""
  runs = list(dict.fromkeys(name for row in groups.values() for name in row))
  names = list(groups)
  labels = [_label(name, groups[name]) for name in names]
  room = _ROW + _BAR * (len(runs) - 1)
  if any("\n" in label for label in labels):
    room = max(room, _TWO_LINES)
  figure, axes = _page(7.6, 1.5 + room * len(names), title)
  height = 0.8 / len(runs)
  for number, (run, colour) in enumerate(zip(runs, _cycle(len(runs)))):
    shown = [
      (i + (number - (len(runs) - 1) / 2) * height, groups[name][run])
      for i, name in enumerate(names)
      if run in groups[name] and groups[name][run]["count"]
    ]
    values = [found["accuracy"] for _, found in shown]
    places = [place for place, _ in shown]
    ends = [found["interval"] for _, found in shown]
    # Not below zero: where all are right the interval's end is rounded.
    below = [max(0, v - low) for v, (low, _) in zip(values, ends)]
    above = [max(0, high - v) for v, (_, high) in zip(values, ends)]
    axes.barh(places, values, height * 0.9, label=run, color=colour)
    axes.errorbar(
      values, places, xerr=[below, above], fmt="none", ecolor=_INK,
      elinewidth=0.9, capsize=min(2.5, 8 * height),
    )  # fmt: skip
  _chance(axes, groups)
  axes.set_yticks(range(len(names)), labels)
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.set_xlim(0, 1)
  axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
  letters = sum(len(run) + 8 for run in [*runs, "chance"])
  columns = 1 if letters > 90 else len(runs) + 1
  figure.legend(loc="outside lower right", ncols=columns, frameon=False)
  return figure


def _chance(axes, groups: Groups) -> None:
  for i, row in enumerate(groups.values()):
    chance = next(iter(row.values()))["chance"]
    label = "chance" if not i else None
    ends = [i - 0.45, i + 0.45]
    axes.plot([chance] * 2, ends, ":", color=_INK, lw=1.4, label=label)


def _label(name: str, row: Mapping[str, Any]) -> str:
  count = next(iter(row.values()))["count"]
  words = f"{name.replace('_', ' ')} ({count:,})"
  return textwrap.fill(words, _LABEL, max_lines=2, placeholder=" ...")


def _cycle(count: int) -> list[str]:
  return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _page(width: float, height: float, title: str):
  figure = Figure(figsize=(width, height), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  axes.set_title(title, loc="left", color=_INK)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(_FAINT)
  return figure, axes
