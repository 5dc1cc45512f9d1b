"""Report on a prepared dataset: counts, dropped records, plots.

The four plots show sources, topics, durations and tasks.
"""

import array
import collections
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hourjax import plots
from hourjax.data.columns import Columns
from hourjax.data.prepare.convert import Dropped, Kept
from hourjax.data.records.questions import FACTS

UNKNOWN = "not told"  # label of a value that the records do not state
MOST = 40  # bars of a plot; the last one joins all that follow
EXAMPLES = 3  # examples that are shown of each reason
BIN = 5  # minutes of a bin of durations

SKIPPED = "skipped.jsonl"
REPAIRED = "repaired.jsonl"
# Repairs that half of LLaVA's records need: counted, but not listed.
_USUAL = {"marker moved to the front", "no marker: put in front"}

_INK, _FAINT, _BAR = plots.INK, plots.FAINT, plots.BAR


def draw_plots(folder: pathlib.Path, summary: dict) -> dict[str, str]:
  """Draws sources.png, topics.png, durations.png and tasks.png.

  Args:
    folder: gets the files.
    summary: as `Report.summary` returns it.

  Returns:
    "drawn", or the reason why a plot is left out, by file name.
  """
  done = {"sources.png": "drawn"}
  _sources(summary).savefig(folder / "sources.png")
  for kind in ("topics", "tasks"):
    name = f"{kind}.png"
    if not any(summary[kind].keys() - {""}):
      done[name] = f"left out: no record tells the {kind} of its questions"
      continue
    colours = summary["topic_of_task"] if kind == "tasks" else {}
    _questions(summary, kind, colours).savefig(folder / name)
    done[name] = "drawn"
  if summary["videos_per_5_minutes"]:
    _durations(summary).savefig(folder / "durations.png")
    done["durations.png"] = "drawn"
  else:
    reason = "no duration of a video is known; give --media or --features"
    done["durations.png"] = f"left out: {reason}"
  return done


def _sources(summary: dict) -> Figure:
  """Plots videos by source, or conversations if there are no videos."""
  videos = {n: c["videos"] for n, c in summary["sources"].items()}
  kept = summary["kept"]
  if kept["videos"]:
    return _bars(videos, "Videos by source", _subtitle(summary), "videos")
  counts = {n: c["conversations"] for n, c in summary["sources"].items()}
  title = "Conversations by source"
  return _bars(counts, title, _subtitle(summary), "conversations")


def _questions(summary: dict, kind: str, groups: Mapping[str, str]) -> Figure:
  """Plots questions by topic or task; `groups` gives a task's topic."""
  counts = {n.replace("_", " "): c for n, c in summary[kind].items()}
  groups = {
    task.replace("_", " "): topic.replace("_", " ")
    for task, topic in groups.items()
  }
  title = f"Questions by {kind[:-1]}"
  return _bars(counts, title, _subtitle(summary), "questions", groups)


def _durations(summary: dict) -> Figure:
  """Plots a histogram of the videos' durations."""
  counts = summary["videos_per_5_minutes"]
  width = min(14, 5 + 0.45 * len(counts))
  figure, axes = _page(width, 4.8, "Videos by duration", _subtitle(summary))
  middles = [BIN * (i + 0.5) for i in range(len(counts))]
  axes.bar(middles, counts, width=BIN * 0.88, color=_BAR)
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
) -> Figure:
  """Plots horizontal bars, the longest on top, with count and share."""
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
  for i, count in enumerate(lengths):
    share = 100 * count / max(total, 1)
    axes.annotate(
      f"{count:,}  {share:.1f} %",
      (count, i),
      (5, 0),
      textcoords="offset points",
      va="center",
      color=_INK,
      fontsize=9,
    )
  plots.name_rows(axes, [_short(name) for name in names])
  axes.set_xlim(0, max(1, *lengths) * 1.22)
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


class Report:
  """Counts conversations; lists dropped and repaired records in files."""

  def __init__(self, file: TextIO, repaired: TextIO):
    """Starts with empty counts.

    Args:
      file: the file SKIPPED, open for writing.
      repaired: the file REPAIRED, open for writing.
    """
    self._file, self._repaired_file = file, repaired
    self._repaired: dict[str, dict[str, Any]] = {}
    self._dropped: dict[str, dict[str, Any]] = {}
    self._seen: set[int] = set()
    self._ids: set[int] = set()
    self._repeated = 0
    self._numbers, self._questions = array.array("d"), array.array("i")
    self._by: dict[str, collections.Counter] = {
      name: collections.Counter() for name in ("sources", "streams", *FACTS)
    }
    self._topic_of: dict[str, str] = {}

  def keep(self, item: Kept) -> bool:
    """Counts a conversation; returns False if it repeats an earlier one."""
    if item.content in self._seen:
      reason = f"record {item.id}: {item.where} repeats an earlier one"
      self.drop(Dropped(item.where, item.id, "duplicate", reason))
      return False
    self._seen.add(item.content)
    # The same id with another text is another conversation, which is kept.
    name = item.id.encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
    self._repeated += number in self._ids
    self._ids.add(number)
    self._repair(item)
    self._numbers.append(item.number)
    self._questions.append(len(item.questions))
    self._by["sources"][item.source] += len(item.questions)
    self._by["streams"][item.stream] += len(item.questions)
    for question in item.questions:
      for name, value in zip(FACTS, question):
        self._by[name][value] += 1
      topic, task, _ = question
      self._topic_of.setdefault(task, topic)
    return True

  def drop(self, item: Dropped) -> None:
    """Counts and lists a record or row that is left out."""
    kind = self._dropped.setdefault(item.kind, {"count": 0, "examples": []})
    kind["count"] += 1
    if len(kind["examples"]) < EXAMPLES:
      kind["examples"].append(item.reason)
    # ASCII, since a reason may quote text that is not valid UTF-8.
    self._file.write(json.dumps(item._asdict()) + "\n")

  def _repair(self, item: Kept) -> None:
    """Counts and lists the repairs of a record."""
    for name in item.repairs:
      kind = self._repaired.setdefault(name, {"count": 0, "examples": []})
      kind["count"] += 1
      if len(kind["examples"]) < EXAMPLES:
        kind["examples"].append(f"{item.where}: record {item.id}")
    if not _USUAL.issuperset(item.repairs):
      listed = {"where": item.where, "id": item.id, "repairs": item.repairs}
      self._repaired_file.write(json.dumps(listed) + "\n")

  @property
  def dropped(self) -> dict[str, dict[str, Any]]:
    """Returns {"count", "examples"} by reason, most frequent first."""
    return _frequent(self._dropped)

  @property
  def numbers(self) -> np.ndarray:
    """Returns the `record_number` of each conversation, float [N]."""
    return np.array(self._numbers)

  def count(self, columns: Columns, chosen: np.ndarray) -> dict:
    """Returns the numbers of the chosen conversations.

    Args:
      columns: columns of the conversations that were kept.
      chosen: whether each of them is counted, bool [N].
    """
    questions = int(np.array(self._questions)[chosen].sum())
    return _count(columns, chosen, questions)

  def summary(self, columns: Columns, unstored: set[str] | None) -> dict:
    """Returns all numbers as JSON values.

    Args:
      columns: columns of the conversations that were kept.
      unstored: videos that the feature store lacks; None without a store.
    """
    whole = np.ones(len(columns), bool)
    questions = self._by["sources"].total()
    summary = {
      "kept": _count(columns, whole, questions),
      "dropped": self.dropped,
      "repaired": _frequent(self._repaired),
      "repeated_ids": self._repeated,
      "tokens": int(columns.tokens.sum(dtype=np.int64)),
    }
    if unstored is not None:
      summary["videos_without_features"] = _without_features(columns, unstored)
    for kind, column in (
      ("sources", columns.source),
      ("streams", columns.stream),
    ):
      summary[kind] = {
        name: _count(columns, column == i, self._by[kind][name])
        for i, name in enumerate(getattr(columns, kind))
      }
    for name in FACTS:
      summary[f"{name}s"] = dict(self._by[name].most_common())
    summary["topic_of_task"] = self._topic_of
    known = columns.duration[~np.isnan(columns.duration)]
    bins = np.bincount((known // (60 * BIN)).astype(np.int64))
    summary["videos_per_5_minutes"] = bins.tolist()
    return summary


def table(summary: dict) -> str:
  """Formats a summary as a few lines of text."""
  head = ("", "conversations", "questions", "videos", "hours")
  rows = [head, ("all", *_cells(summary["kept"]))]
  held_out = summary.get("held_out")
  if held_out:
    rows.append(("held out of these", *_cells(held_out)))
  for kind in ("sources", "streams"):
    groups = sorted(
      summary[kind].items(), key=lambda item: -item[1]["conversations"]
    )
    rows += [(f"{kind[:-1]} {name}", *_cells(n)) for name, n in groups]
  width = max(len(row[0]) for row in rows)
  lines = [
    f"{row[0]:<{width}}" + "".join(f"{cell:>15}" for cell in row[1:])
    for row in rows
  ]
  if held_out and not held_out["conversations"]:
    lines.append("nothing is held out; give a larger --holdout, or a number")
  kept = summary["kept"]
  if kept["videos_of_unknown_duration"]:
    count = kept["videos_of_unknown_duration"]
    lines.append(f"{count:,} videos are of unknown duration and add no hours")
  lines += _unstored_lines(summary.get("videos_without_features", {}))
  if summary["repeated_ids"]:
    count = summary["repeated_ids"]
    lines.append(f"{count:,} kept records have the id of another one")
  lines += _repaired_lines(summary.get("repaired", {}))
  return "\n".join(lines + _dropped_lines(summary["dropped"]))


def _without_features(columns: Columns, unstored: set[str]) -> dict[str, Any]:
  """Counts the videos that the feature store lacks.

  Those whose number of frames is known come as pixels; examples are of the
  others, if there are any.
  """
  missing = [
    (known > 0, name)
    for name, known in zip(columns.videos, columns.num_frames.tolist())
    if name in unstored
  ]
  missing.sort()
  return {
    "count": len(missing),
    "as_pixels": sum(pixels for pixels, _ in missing),
    "examples": [name for _, name in missing[:EXAMPLES]],
  }


def _unstored_lines(found: dict[str, Any]) -> list[str]:
  """Says how many videos are not in the feature store, and what that means.

  Args:
    found: as `_without_features` returns it; older versions counted no pixels.
  """
  pixels = found.get("as_pixels", 0)
  unusable = found.get("count", 0) - pixels
  lines = []
  if pixels:
    lines.append(
      f"{pixels:,} videos are not in the feature store and come as pixels: set"
      " config.data.media, and config.rows.frames for their frames"
    )
  if unusable:
    lines.append(
      f"{unusable:,} videos are not in the feature store and their frames were"
      f" not counted, such as {found['examples'][0]}; extract them before"
      " training, or prepare with --media so that they come as pixels"
    )
  return lines


def _repaired_lines(repaired: dict[str, dict]) -> list[str]:
  """Formats the counts of repairs."""
  if not repaired:
    return []
  lines = [f"kept, and read otherwise than written, see {REPAIRED}:"]
  for name, kind in repaired.items():
    example = kind["examples"][0]
    lines.append(f"  {kind['count']:>9,} {name}, such as {example}")
  return lines


def _frequent(kinds: dict[str, dict]) -> dict[str, dict]:
  """Sorts counts by reason, the most frequent first."""
  return dict(sorted(kinds.items(), key=lambda pair: -pair[1]["count"]))


def _dropped_lines(dropped: dict[str, dict]) -> list[str]:
  """Formats the counts of dropped records."""
  if not dropped:
    return ["nothing was dropped"]
  total = sum(kind["count"] for kind in dropped.values())
  lines = [f"dropped {total:,}, listed in {SKIPPED}:"]
  for name, kind in dropped.items():
    lines.append(f"  {kind['count']:>9,} {name}")
    lines += [f"{'':12}{reason}" for reason in kind["examples"]]
  return lines


def _cells(count: dict) -> tuple[str, ...]:
  names = ("conversations", "questions", "videos")
  return (*(f"{count[n]:,}" for n in names), f"{count['hours']:,.1f}")


def _count(columns: Columns, chosen: np.ndarray, questions: int) -> dict:
  """Returns the numbers of the chosen conversations."""
  videos = np.unique(columns.video[chosen & (columns.video >= 0)])
  seconds = columns.duration[videos]
  return {
    "conversations": int(chosen.sum()),
    "questions": questions,
    "videos": len(videos),
    "hours": round(float(np.nansum(seconds)) / 3600, 3),
    "videos_of_unknown_duration": int(np.isnan(seconds).sum()),
  }
