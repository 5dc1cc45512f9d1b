"""The report of an evaluation: its data, its files, and reading it again."""

import collections
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pydantic

import hourjax
from hourjax import plots, schema
from hourjax.atomic_file import write_file
from hourjax.errors import UserError
from hourjax.evaluation import report_pages
from hourjax.evaluation.scoring import (
  Accuracy,
  Run,
  Scored,
  accuracy,
  compare,
  group,
  in_order,
)

WITHOUT = "without MemAug"
_EXAMPLES = 6  # wrong answers that a report quotes; as many unreadable ones
_FILE = "report.json"


@dataclasses.dataclass(frozen=True)
class Report:
  """Holds accuracies of one model, or of several on the same questions.

  Attributes:
    data: content of report.json, which `build` describes.
  """

  data: Mapping[str, Any]

  @property
  def names(self) -> list[str]:
    """Returns the names of the runs; the report is about the first."""
    return list(self.data["runs"])

  @property
  def left_out(self) -> int:
    """Returns the number of questions that the first run left out."""
    return self.data["left_out"]

  @property
  def complete(self) -> bool:
    """Returns whether every run asked every question."""
    return not any(run["left_out"] for run in self.data["runs"].values())

  def groups(self, key: str) -> Mapping[str, Mapping[str, Any]]:
    """Returns accuracies by a grouping: group -> run -> accuracy.

    Args:
      key: "task", "duration", "kind" or a text field of the questions' `extra`.
    """
    return self.data.get(f"by_{key}", {})

  def table(self) -> str:
    """Returns accuracies by every grouping as text for a terminal."""
    return report_pages.table(self.data)

  def summary(self) -> str:
    """Returns the report's main numbers in a few lines."""
    return report_pages.summary(self.data)

  def _repr_markdown_(self) -> str:
    """Returns what a notebook displays for the report."""
    return report_pages.page(self.data)


def build(runs: Mapping[str, Run]) -> Report:
  """Computes the report of one or more runs, as plain data.

  An accuracy is {"accuracy", "chance", "count", "interval", "unreadable"}, its
  numbers null where `count` is 0.

  Args:
    runs: the runs by name, all of one benchmark. The report is about the first;
      the others are compared with it.

  Returns:
    `benchmark` and `versions`; `runs`, each with what its answers depend on,
    its accuracy, `mean_of_tasks` (the mean of the tasks' accuracies) and what
    it left out; the first run's `accuracy`, `interval`,
    `chance`, `count`, `unreadable`, `unfinished`, `left_out`, `seconds`;
    `compared`, each other run against the first; `by_task`, `by_duration`,
    `by_kind` and one more for every text field of the questions' `extra`, such
    as `by_topic`: group -> run -> accuracy; `examples`. Where questions are
    marked as needles also `needle`, `needle_chance`, `needle_count`,
    `needle_hidden` (fraction of needles of which forgetting drops every frame),
    `needle_without_memaug`, `needle_by_duration`, `needle_by_format` and
    `needle_grid`: kind of needle -> length of video -> depth -> the first run's
    accuracy.

  Raises:
    UserError: a run answered nothing.
  """
  for name, run in runs.items():
    if not run.scored:
      raise UserError(_nothing_scored(name, run))
  first, *others = runs
  scored = runs[first].scored
  keys = _group_keys(item for run in runs.values() for item in run.scored)
  data = {
    "benchmark": runs[first].about.get("benchmark", ""),
    "versions": _versions(runs[first].about),
    "runs": {name: _run(run) for name, run in runs.items()},
    **_as_data(accuracy(scored)),
    "unfinished": sum(not item.finished for item in scored),
    "left_out": len(runs[first].left_out),
    "seconds": sum(i.seconds for run in runs.values() for i in run.scored),
    "compared": {
      name: dataclasses.asdict(compare(scored, runs[name].scored))
      for name in others
    },
    **{f"by_{key}": _accuracies(runs, _groups_of(key)) for key in keys},
    **_needles(runs),
    "examples": {
      "wrong": _examples(
        i for i in scored if i.parsed is not None and not i.correct
      ),
      "unreadable": _examples(i for i in scored if i.parsed is None),
    },
  }
  return Report(_without_nan(data))


def write(
  report: Report,
  folder: str | os.PathLike,
  curves: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
) -> list[str]:
  """Writes report.json, report.md and the plots.

  Args:
    report: the report.
    folder: folder of the files; it is made if it does not exist.
    curves: losses of the runs where they are known, as rows with "step" and
      "loss".

  Returns:
    Names of the files.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  figures = report_pages.figures(report.data)
  if curves:
    figures["loss.png"] = report_pages.losses(curves)
  for name, figure in figures.items():
    _write(folder / name, plots.png(figure))
  _write(folder / "report.md", report_pages.page(report.data, list(figures)))
  text = json.dumps(report.data, indent=2, allow_nan=False) + "\n"
  _write(folder / _FILE, text)
  return [_FILE, "report.md", *figures]


def _write(path: pathlib.Path, data: str | bytes) -> None:
  """Writes a file that other workers may be writing at the same time."""
  write_file(path, data, several_writers=True)


def load(folder: str | os.PathLike) -> Report:
  """Reads the report in a folder.

  Args:
    folder: folder that `write` wrote to.

  Raises:
    UserError: the folder has no report, or one of another version.
  """
  path = pathlib.Path(folder) / _FILE
  remedy = f"evaluate again with --out={folder}"
  try:
    data = schema.read_json(path, remedy=remedy)
    schema.validate(_Stored, data, _FILE, remedy=remedy)
  except UserError as error:
    if error.kind == "missing":
      raise UserError(
        f"{path} does not exist; run `python -m hourjax.evaluate"
        f" --out={folder}` or correct the folder"
      ) from None
    raise UserError(f"{path} is no report ({error})") from None
  return Report(data)


class _Stored(schema.Schema):
  """Describes the fields that every report.json has."""

  benchmark: str
  runs: dict[str, dict[str, Any]] = pydantic.Field(min_length=1)
  versions: dict[str, Any]
  by_task: dict[str, Any]


def _as_data(result: Accuracy) -> dict[str, Any]:
  """Returns an accuracy as it stands in report.json."""
  return {
    "accuracy": result.accuracy,
    "interval": [result.low, result.high],
    "chance": result.chance,
    "count": result.count,
    "unreadable": result.unreadable,
  }


def _run(run: Run) -> dict[str, Any]:
  """Returns what report.json says of one run."""
  reasons = collections.Counter(
    (item.video, item.reason) for item in run.left_out
  )
  return {
    **run.about,
    **_as_data(accuracy(run.scored)),
    "unfinished": sum(not item.finished for item in run.scored),
    "mean_of_tasks": _mean_of_tasks(run.scored),
    "seconds": sum(item.seconds for item in run.scored),
    "left_out": [
      {"video": video, "questions": count, "reason": reason}
      for (video, reason), count in reasons.items()
    ],
  }


def _mean_of_tasks(scored: Sequence[Scored]) -> float:
  """Returns the mean of the tasks' accuracies; NaN without tasks.

  Each task counts alike, however many questions it has.
  """
  tasks = group(scored, _groups_of("task")).values()
  return (
    sum(task.accuracy for task in tasks) / len(tasks) if tasks else math.nan
  )


def _versions(about: Mapping[str, Any]) -> dict[str, str]:
  """Returns the versions on which a score depends."""
  return {
    "benchmark": str(about.get("version", "")),
    "parser": str(about.get("parser", "")),
    "hourjax": hourjax.__version__,
    **{name: importlib.metadata.version(name) for name in ("jax", "numpy")},
  }


def _group_keys(scored: Iterable[Scored]) -> list[str]:
  """Returns the groupings: fields of a question, then texts in `extra`."""
  extra: set[str] = set()
  for item in scored:
    fields = item.question.extra.items()
    extra |= {key for key, value in fields if isinstance(value, str)}
  fixed = ("task", "duration", "kind")
  return [*fixed, *sorted(extra - set(fixed))]


def _groups_of(key: str) -> Callable[[Scored], Sequence[str]]:
  """Returns the function that gives a question's groups by `key`."""
  if key == "task":
    return lambda item: item.question.tasks

  def groups(item: Scored) -> Sequence[str]:
    question = item.question
    is_field = key in ("duration", "kind")
    name = getattr(question, key) if is_field else question.extra.get(key)
    return (str(name),) if name else ()

  return groups


def _accuracies(
  runs: Mapping[str, Run], groups: Callable[[Scored], Sequence[str]]
) -> dict[str, dict[str, dict[str, Any]]]:
  """Returns group -> run -> accuracy; runs without the group are absent."""
  tables = {name: group(run.scored, groups) for name, run in runs.items()}
  names = in_order({name for table in tables.values() for name in table})
  return {
    name: {
      run: _as_data(table[name])
      for run, table in tables.items()
      if name in table
    }
    for name in names
  }


def _needles(runs: Mapping[str, Run]) -> dict[str, Any]:
  """Computes accuracies on needles.

  A needle is a question about what a video shows for a few seconds only.
  """
  needles = {
    name: dataclasses.replace(
      run,
      scored=tuple(i for i in run.scored if i.question.extra.get("needle")),
    )
    for name, run in runs.items()
  }
  scored = next(iter(needles.values())).scored
  whole = accuracy(scored)
  without = needles[WITHOUT].scored if WITHOUT in needles else ()
  hidden = sum(bool(i.question.extra.get("hidden")) for i in scored)
  return {
    "needle": whole.accuracy,
    "needle_interval": [whole.low, whole.high],
    "needle_without_memaug": accuracy(without).accuracy,
    "needle_chance": whole.chance,
    "needle_count": whole.count,
    "needle_hidden": hidden / max(len(scored), 1),
    "needle_by_duration": _accuracies(needles, _groups_of("duration")),
    "needle_by_format": _accuracies(needles, _groups_of("format")),
    **({"needle_grid": grid} if (grid := _needle_grid(scored)) else {}),
  }


def _needle_grid(scored: Sequence[Scored]) -> dict[str, Any]:
  """Computes kind of needle -> length -> depth -> accuracy."""
  kinds: dict[str, dict[str, list[Scored]]] = {}
  for item in scored:
    extra = item.question.extra
    if item.question.duration and extra.get("depth"):
      kind = kinds.setdefault(extra.get("needle_kind") or "needle", {})
      kind.setdefault(item.question.duration, []).append(item)
  return {
    kind: {
      length: {
        depth: _as_data(found)
        for depth, found in group(items[length], _groups_of("depth")).items()
      }
      for length in in_order(items)
    }
    for kind, items in sorted(kinds.items())
  }


def _examples(scored: Iterable[Scored]) -> list[dict[str, Any]]:
  """Returns a few answers, spread evenly over all of them."""
  items = list(scored)
  step = max(1, math.ceil(len(items) / _EXAMPLES))
  return [
    {
      "id": item.question.id,
      "video": item.question.video,
      "prompt": item.question.prompt,
      "answer": item.answer,
      "parsed": item.parsed,
      "expected": item.question.expected,
    }
    for item in items[::step]
  ]


def _nothing_scored(name: str, run: Run) -> str:
  """Returns the message about a run that answered no question."""
  if not run.left_out:
    return f"{name} was asked no question: there is nothing to report"
  first = run.left_out[0]
  return (
    f"none of the {len(run.left_out)} questions could be asked of {name}, so"
    f" there is nothing to report; the first, {first.id}: {first.reason}"
  )


def _without_nan(value: Any) -> Any:
  """Replaces NaN by None, since JSON has no NaN."""
  if isinstance(value, dict):
    return {key: _without_nan(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_without_nan(item) for item in value]
  if isinstance(value, float) and math.isnan(value):
    return None
  return value
