"""The report of a fine-tuning: what was read, what it took, what it gained."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from hourjax import plots, progress
from hourjax.atomic_file import write_file
from hourjax.evaluation import report as evaluation_report
from hourjax.evaluation.report_pages import losses
from hourjax.finetuning.questions import Questions, Skip
from hourjax.finetuning.stages import Took
from hourjax.training.faults import LOSS, best_of, overfitting
from hourjax.training.metric_writer import read_metrics

_LISTED = 20  # videos or reasons in the report


def describe_questions(
  found: Questions, held_out: Sequence[dict[str, Any]]
) -> list[str]:
  """Returns what was read, in lines.

  Args:
    found: all questions.
    held_out: those of them that are held out.
  """
  held = {item["video"] for item in held_out}
  trained = len(found.found) - len(held_out)
  videos = len({i["video"] for i in found.found if not i["held_out"]})
  lines = [
    f"{len(found.found):,} questions of {found.rows:,} rows:"
    f" {trained:,} about {videos:,} videos to train on, {len(held_out):,} about"
    f" {len(held):,} videos held out"
  ]
  lines += [f"note: {text}" for text in found.notes]
  for kind, (count, first) in found.counts().items():
    rows = "1 row" if count == 1 else f"{count:,} rows"
    lines.append(f"left out: {rows}, {kind}; the first: {first}")
  if found.missing:
    names = [f"{name} ({rows})" for name, rows in found.missing.items()]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    lines.append(
      f"missing videos ({len(names)}): {', '.join(names[:_LISTED])}{more}"
    )
  return lines


def skipped_rows(skipped: Sequence[Skip]) -> str:
  """Returns the rows that were left out as lines of a table."""
  rows = ["place\tkind\treason"]
  rows += ["\t".join(" ".join(x.split()) for x in item) for item in skipped]
  return "\n".join(rows) + "\n"


def write(
  out: pathlib.Path,
  *,
  command: str,
  read: Sequence[str],
  took: Mapping[str, Took],
  ask: str,
) -> list[str]:
  """Writes report.md and loss.png.

  Args:
    out: folder of the fine-tuning, whose stages have ended.
    command: that made it.
    read: what was read, in lines.
    took: times of the stages.
    ask: command that asks the new model.

  Returns:
    The lines that are also printed: the result in short.
  """
  rows = read_metrics(out / "model")
  short = [*_scores(out), *_training(rows)]
  page = ["# A model adapted to your videos", ""]
  page += [*(f"- {line}" for line in short), ""]
  page += ["Ask it:", "", f"    {ask}", ""]
  page += ["## What was read", "", *(f"- {line}" for line in read), ""]
  page += ["## Times", "", "| stage | forecast | took |", "|---|---|---|"]
  page += [
    f"| {name} | {_time(each.forecast)} | {_time(each.seconds)} |"
    for name, each in took.items()
  ]
  page += ["", "## Held-out loss", "", *_curve(rows), ""]
  if rows:
    write_file(out / "loss.png", plots.png(losses({"training": rows})))
    page += ["![Loss in training and on held-out answers](loss.png)", ""]
  page += [f"The same by this command: `{command}`", ""]
  write_file(out / "report.md", "\n".join(page))
  return short


def _time(seconds: float | None) -> str:
  """Returns a time, or "" if it is not known."""
  return "" if seconds is None else progress.duration(seconds)


def _scores(out: pathlib.Path) -> list[str]:
  """Returns lines on the accuracy before and after."""
  if not (out / "after" / "report.json").exists():
    return ["Nothing was held out, so there is no score."]
  data = [
    evaluation_report.load(out / name).data for name in ("before", "after")
  ]
  before, after = data
  lines = []
  for name, each in zip(("before", "after"), data):
    low, high = each["interval"]
    lines.append(
      f"{name}: {each['accuracy']:.1%} right [{low:.1%}, {high:.1%}] of"
      f" {each['count']:,} held-out questions (chance {each['chance']:.1%},"
      f" {each['unreadable']:,} unreadable)"
    )
  if after["accuracy"] < before["accuracy"]:
    lines.append(
      "WARNING: the new model is worse on held-out questions than the one that"
      " it began with; keep that one, or add data"
    )
  elif after["interval"][0] <= before["accuracy"]:
    lines.append(
      "note: so few held-out questions do not tell whether this is a gain; more"
      " questions would"
    )
  return lines


def _training(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns lines on the training: its best step, and over-fitting."""
  held_out = {row["step"]: row[LOSS] for row in rows if LOSS in row}
  best, last = best_of(held_out), max((row["step"] for row in rows), default=0)
  lines = []
  if best is not None:
    lines.append(
      f"held-out loss: {held_out[best]:.3f} at step {best}, which is used; the"
      f" last step was {last}"
    )
  if text := overfitting(rows):
    lines.append(f"WARNING: {text}")
  return lines


def _curve(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns a table of the losses at each evaluation."""
  lines = ["| step | held-out answers | training |", "|---|---|---|"]
  since: collections.deque[float] = collections.deque()
  for row in rows:
    since.append(row.get("loss", float("nan")))
    if LOSS in row:
      mean = sum(since) / len(since)
      lines.append(f"| {row['step']:.0f} | {row[LOSS]:.3f} | {mean:.3f} |")
      since.clear()
  return lines if len(lines) > 2 else ["Nothing was held out."]
