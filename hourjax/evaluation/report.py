"""report.json, its table and its pictures."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from hourjax.evaluation.scoring import (
  Scored,
  accuracy,
  duration_bin,
  group,
)

WITH, WITHOUT = "with MemAug", "without MemAug"


def build_report(
  runs: Mapping[str, Sequence[Scored]], seconds: float
) -> dict[str, Any]:
  """All accuracies of one evaluation as plain data.

  Args:
    runs: scored answers by name; the first run is the one reported on, a run
      named WITHOUT is the comparison.
    seconds: that the evaluation took.

  Returns:
    `accuracy`, `chance`, `count` over all questions; `needle`,
    `needle_chance`, `needle_count`, `needle_hidden` (share of needles whose
    every frame forgetting drops) and `needle_without_memaug`; `by_task`,
    `by_topic`, `by_duration`, `by_format`, `needle_by_duration` and
    `needle_by_format`, each name -> run -> accuracy, chance, count.
  """
  first = next(iter(runs.values()))
  needles = {name: [s for s in run if s.needle] for name, run in runs.items()}
  needle = accuracy(next(iter(needles.values())))
  whole = accuracy(first)
  hidden = [s.hidden for s in next(iter(needles.values()))]
  report = {
    "accuracy": whole.accuracy,
    "chance": whole.chance,
    "count": whole.count,
    "needle": needle.accuracy,
    "needle_without_memaug": accuracy(needles.get(WITHOUT, [])).accuracy,
    "needle_chance": needle.chance,
    "needle_count": needle.count,
    "needle_hidden": sum(hidden) / max(len(hidden), 1),
    "seconds": seconds,
    "by_task": _by(runs, lambda s: s.task),
    "by_topic": _by(runs, lambda s: s.topic),
    "by_duration": _by(runs, duration_bin),
    "by_format": _by(runs, lambda s: s.form),
    "needle_by_duration": _by(needles, duration_bin),
    "needle_by_format": _by(needles, lambda s: s.form),
  }
  return _without_nan(report)


def _by(runs, key):
  tables = {name: group(run, key) for name, run in runs.items()}
  names = sorted({name for table in tables.values() for name in table})
  return {
    name: {
      run: dataclasses.asdict(table[name])
      for run, table in tables.items()
      if name in table
    }
    for name in names
  }


def _without_nan(value):
  """JSON has no NaN: an empty group's accuracy is null."""
  if isinstance(value, dict):
    return {key: _without_nan(item) for key, item in value.items()}
  if isinstance(value, float) and math.isnan(value):
    return None
  return value


def write_report(report: Mapping[str, Any], folder: str | os.PathLike) -> None:
  """Writes report.json and the accuracy plots."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
  plot_accuracy(
    report["by_task"], "Accuracy by task", folder / "accuracy_by_task.png"
  )
  plot_accuracy(
    report["by_duration"],
    "Accuracy by length of video",
    folder / "accuracy_by_duration.png",
  )
  if report["needle_count"]:
    plot_accuracy(
      report["needle_by_duration"],
      "Needles (shown for 1-2 s) by length of video",
      folder / "needles_by_duration.png",
    )


def table(report: Mapping[str, Any]) -> str:
  """The report as text for a terminal."""
  runs = list(next(iter(report["by_task"].values())))
  head = f"{'':<28}{'n':>6}{'chance':>9}" + "".join(f"{r:>17}" for r in runs)
  lines = [head]
  for title, key in [
    ("topic", "by_topic"),
    ("task", "by_task"),
    ("length", "by_duration"),
    ("needles, by length", "needle_by_duration"),
    ("needles, by format", "needle_by_format"),
  ]:
    if not report[key]:
      continue
    lines += ["-" * len(head), title]
    for name, row in report[key].items():
      lines.append(_line("  " + name, row, runs))
  return "\n".join(lines)


def _line(name: str, row: Mapping[str, Any], runs: Sequence[str]) -> str:
  any_run = next(iter(row.values()))
  text = f"{name:<28}{any_run['count']:>6}{any_run['chance']:>9.0%}"
  for run in runs:
    shown = f"{row[run]['accuracy']:.0%}" if run in row else "-"
    text += f"{shown:>17}"
  return text


def plot_accuracy(
  groups: Mapping[str, Mapping[str, Any]], title: str, path: pathlib.Path
) -> None:
  """Bars of each run by group, a tick at chance, counts in the labels."""
  runs = list(next(iter(groups.values())))
  names = list(groups)
  figure, axes = plt.subplots(
    figsize=(7, 1.2 + 0.34 * len(names)), layout="constrained"
  )
  height = 0.8 / len(runs)
  colours = ["#1b6ca8", "#c9ced6"]
  for offset, (run, colour) in enumerate(zip(runs, colours)):
    places = [i + (offset - (len(runs) - 1) / 2) * height for i in
              range(len(names))]  # fmt: skip
    values = [groups[n].get(run, {}).get("accuracy") or 0 for n in names]
    axes.barh(places, values, height * 0.92, label=run, color=colour)
  for i, name in enumerate(names):
    chance = next(iter(groups[name].values()))["chance"]
    label = "chance" if not i else None
    axes.plot([chance] * 2, [i - 0.45, i + 0.45], "k:", lw=1.4, label=label)
  counts = [next(iter(groups[n].values()))["count"] for n in names]
  labels = [f"{n.replace('_', ' ')} ({c})" for n, c in zip(names, counts)]
  axes.set_yticks(range(len(names)), labels)
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.set_xlim(0, 1)
  axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
  axes.set_title(title, loc="left")
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower right", ncols=3, frameon=False)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def plot_losses(
  curves: Mapping[str, Sequence[Mapping[str, float]]], path: pathlib.Path
) -> None:
  """Loss by step of each run, from the rows of its metrics.jsonl."""
  figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
  for name, rows in curves.items():
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label=name)
  axes.set(xlabel="step", ylabel="cross entropy", yscale="log")
  axes.set_title("Training loss", loc="left")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def summary(report: Mapping[str, Any]) -> str:
  """The report in one or two lines."""
  lines = [
    f"accuracy {report['accuracy']:.1%} of {report['count']} questions"
    f" (chance {report['chance']:.1%})"
  ]
  if report["needle_count"]:
    line = (
      f"needles  {report['needle']:.1%} of {report['needle_count']} questions"
      f" (chance {report['needle_chance']:.1%}); {report['needle_hidden']:.0%}"
      " of them never reach the decoder directly"
    )
    if report["needle_without_memaug"] is not None:
      line += f"; without MemAug {report['needle_without_memaug']:.1%}"
    lines.append(line)
  return "\n".join(lines)
