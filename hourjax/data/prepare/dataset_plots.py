"""Plots of a dataset: sources, topics, durations and tasks."""

import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hourjax import plots

UNKNOWN = "not told"  # label of a value that the records do not state
MOST = 40  # bars of a plot; the last one joins all that follow
BIN = 5  # minutes of a bin of durations

_INK, _FAINT, _BAR = plots.INK, plots.FAINT, plots.BAR


def draw_plots(
  folder: pathlib.Path,
  summary: dict,
  reference: Mapping[str, Any] | None = None,
) -> dict[str, str]:
  """Draws sources.png, topics.png, durations.png and tasks.png.

  Args:
    folder: gets the files.
    summary: as `Report.summary` returns it.
    reference: shares of another dataset that are marked beside the bars, as far
      as it has them: its "name"; in percent by name its "topics" and "sources";
      in any unit its "videos_per_5_minutes".

  Returns:
    "drawn", or the reason why a plot is left out, by file name.
  """
  done = {"sources.png": "drawn"}
  reference = reference or {}
  _sources(summary, reference).savefig(folder / "sources.png")
  for kind in ("topics", "tasks"):
    name = f"{kind}.png"
    if not any(summary[kind].keys() - {""}):
      done[name] = f"left out: no record tells the {kind} of its questions"
      continue
    colours = summary["topic_of_task"] if kind == "tasks" else {}
    _questions(summary, kind, colours, reference).savefig(folder / name)
    done[name] = "drawn"
  if summary["videos_per_5_minutes"]:
    _durations(summary, reference).savefig(folder / "durations.png")
    done["durations.png"] = "drawn"
  else:
    reason = "no duration of a video is known; give --media or --features"
    done["durations.png"] = f"left out: {reason}"
  return done


def _sources(summary: dict, reference: Mapping[str, Any]) -> Figure:
  """Plots videos by source, or conversations if there are no videos."""
  videos = {n: c["videos"] for n, c in summary["sources"].items()}
  kept = summary["kept"]
  if kept["videos"]:
    return _bars(
      videos,
      "Videos by source",
      _subtitle(summary),
      "videos",
      shares=reference.get("sources"),
      reference=reference.get("name", ""),
    )
  counts = {n: c["conversations"] for n, c in summary["sources"].items()}
  title = "Conversations by source"
  return _bars(counts, title, _subtitle(summary), "conversations")


def _questions(
  summary: dict,
  kind: str,
  groups: Mapping[str, str],
  reference: Mapping[str, Any],
) -> Figure:
  """Plots questions by topic or task; `groups` gives a task's topic."""
  counts = {n.replace("_", " "): c for n, c in summary[kind].items()}
  groups = {
    task.replace("_", " "): topic.replace("_", " ")
    for task, topic in groups.items()
  }
  title = f"Questions by {kind[:-1]}"
  return _bars(
    counts,
    title,
    _subtitle(summary),
    "questions",
    groups,
    shares=reference.get(kind),
    reference=reference.get("name", ""),
  )


def _durations(summary: dict, reference: Mapping[str, Any]) -> Figure:
  """Plots a histogram of the videos' durations."""
  counts = summary["videos_per_5_minutes"]
  others = reference.get("videos_per_5_minutes", ())
  if others:
    scale = sum(counts) / sum(others)
    others = [scale * number for number in others]
    counts = counts + [0] * (len(others) - len(counts))
  width = min(14, 5 + 0.45 * len(counts))
  figure, axes = _page(width, 4.8, "Videos by duration", _subtitle(summary))
  middles = [BIN * (i + 0.5) for i in range(len(counts))]
  axes.bar(middles, counts, width=BIN * 0.88, color=_BAR)
  for middle, number in zip(middles, others):
    ends = [middle - 0.44 * BIN, middle + 0.44 * BIN]
    label = reference["name"] if middle == middles[0] else None
    axes.plot(ends, [number] * 2, ":", color=_INK, lw=1.4, label=label)
  if others:
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
  if len(counts) <= 24:
    for middle, count in zip(middles, counts):
      if count:
        axes.annotate(
          f"{count:,}",
          (middle, count),
          (0, 3),
          textcoords="offset points",
          ha="center",
          color=_INK,
          fontsize=9,
        )
  end = BIN * len(counts)
  axes.set_xticks(range(0, end + 1, BIN * max(1, len(counts) // 16)))
  axes.set_xlim(0, end)
  axes.set_xlabel("minutes", color=_FAINT)
  axes.set_ylabel("videos", color=_FAINT)
  axes.margins(y=0.1)
  axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
  axes.yaxis.set_major_formatter("{x:,.0f}")
  return figure


def _bars(
  counts: Mapping[str, int],
  title: str,
  subtitle: str,
  unit: str,
  groups: Mapping[str, str] | None = None,
  *,
  shares: Mapping[str, float] | None = None,
  reference: str = "",
) -> Figure:
  """Plots horizontal bars, the longest on top, with count and share.

  Args:
    counts: by name.
    title: of the plot.
    subtitle: below it.
    unit: of the counts.
    groups: of names, which colours tell apart.
    shares: of another dataset, in percent by name, which are marked.
    reference: its name.
  """
  total = sum(counts.values())
  pairs = sorted(counts.items(), key=lambda pair: -pair[1])
  if len(pairs) > MOST:
    rest = pairs[MOST - 1 :]
    others = f"{len(rest)} others"
    pairs = [*pairs[: MOST - 1], (others, sum(n for _, n in rest))]
  height = 1.5 + 0.32 * len(pairs) + (0.35 if groups else 0)
  figure, axes = _page(8.5, height, title, subtitle)
  names = [name or UNKNOWN for name, _ in pairs]
  present = sorted({groups[n] for n in names if n in groups} if groups else ())
  colours = dict(zip(present, plots.series_colours(len(present))))
  plain = _FAINT if present else _BAR
  fill = [
    colours[groups[name]] if groups and name in groups else plain
    for name in names
  ]
  lengths = [count for _, count in pairs]
  axes.barh(range(len(pairs)), lengths, color=fill, height=0.72)
  known = [
    total * (shares or {}).get(name, float("nan")) / 100 for name, _ in pairs
  ]
  for i, count in enumerate(lengths):
    share = 100 * count / max(total, 1)
    axes.annotate(
      f"{count:,}  {share:.1f} %",
      # Behind the mark, where there is one.
      (max(count, known[i]) if known[i] == known[i] else count, i),
      (5, 0),
      textcoords="offset points",
      va="center",
      color=_INK,
      fontsize=9,
    )
  plots.name_rows(axes, [_short(name) for name in names])
  longest = max(1, *lengths, *(each for each in known if each == each))
  axes.set_xlim(0, longest * 1.22)
  if any(each == each for each in known):
    plots.mark_rows(axes, known, label=reference)
    axes.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=_INK)
  axes.spines["bottom"].set_visible(False)
  axes.set_xticks([])
  axes.set_xlabel(f"{total:,} {unit}", color=_FAINT, loc="left")
  if present:
    handles = [Patch(color=colours[g], label=g or UNKNOWN) for g in present]
    figure.legend(
      handles=handles,
      loc="outside lower center",
      ncols=len(present),
      frameon=False,
      fontsize=9,
      handlelength=1,
      columnspacing=1.4,
    )
  return figure


def _page(
  width: float, height: float, title: str, subtitle: str
) -> tuple[Figure, Axes]:
  """Makes a figure of a size in inches, with title and empty axes."""
  layout = ConstrainedLayoutEngine(
    w_pad=0.2, h_pad=0.12, rect=(0, 0, 1, 1 - 0.72 / height)
  )
  figure = plots.new_figure(width, height, dpi=150, layout=layout)

  def write(text: str, inches: float, **style: Any) -> None:
    x, y = 0.2 / width, 1 - inches / height
    figure.text(x, y, text, va="top", ha="left", **style)

  write(title, 0.18, color=_INK, fontsize=15, fontweight="bold")
  write(subtitle, 0.5, color=_FAINT, fontsize=9.5)
  axes = figure.add_subplot()
  plots.keep_spines(axes, "bottom")
  axes.tick_params(colors=_INK, length=0)
  return figure, axes


def _subtitle(summary: dict) -> str:
  """Words the numbers of the whole dataset."""
  kept = summary["kept"]
  parts = [
    f"{kept['conversations']:,} conversations",
    f"{kept['questions']:,} questions",
    f"{kept['videos']:,} videos",
  ]
  unknown = kept["videos_of_unknown_duration"]
  if kept["videos"] > unknown:
    parts.append(f"{kept['hours']:,.1f} hours")
  if unknown:
    parts.append(f"{unknown:,} of unknown duration")
  return " · ".join(parts)


def _short(name: str) -> str:
  return name if len(name) <= 32 else f"{name[:31]}…"
