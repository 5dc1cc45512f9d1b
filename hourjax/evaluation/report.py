"""The report of an evaluation: as data, in files, and read again."""

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
from hourjax import schema
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
_EXAMPLES = 6  # of wrong answers, and of unreadable ones
_FILE = "report.json"


@dataclasses.dataclass(frozen=True)
class Report:
  """Accuracies of one model, or of several on the same questions.

  Attributes:
    data: the content of report.json, described in `build`.
  """

  data: Mapping[str, Any]

  @property
  def names(self) -> list[str]:
    """The runs; the first is the one reported on."""
    return list(self.data["runs"])

  @property
  def left_out(self) -> int:
    """Questions that the first run could not ask."""
    return self.data["left_out"]

  @property
  def complete(self) -> bool:
    """Whether every run asked every question."""
    return not any(run["left_out"] for run in self.data["runs"].values())

  def groups(self, key: str) -> Mapping[str, Mapping[str, Any]]:
    """Group -> run -> its accuracy, by "task", "duration", "kind", ..."""
    return self.data.get(f"by_{key}", {})

  def table(self) -> str:
    """Accuracies by everything, as text for a terminal."""
    return report_pages.table(self.data)

  def summary(self) -> str:
    """The report in some lines."""
    return report_pages.summary(self.data)

  def _repr_markdown_(self) -> str:
    """What a notebook shows of it."""
    return report_pages.page(self.data)


def build(runs: Mapping[str, Run]) -> Report:
  """Scores of one or more runs as plain data.

  An accuracy is {"accuracy", "chance", "count", "interval", "unreadable"}.
  Null stands for shares of nothing.

  Args:
    runs: by name; the first one is reported on, the others are compared with
      it. All are of one benchmark.

  Returns:
    `benchmark` and `versions`; `runs`, each with what its answers depend on,
    its accuracy, `mean_of_tasks` (of their accuracies) and what it left out;
    the first run's `accuracy`, `interval`,
    `chance`, `count`, `unreadable`, `unfinished`, `left_out`, `seconds`;
    `compared`, each other run against the first; `by_task`, `by_duration`,
    `by_kind` and one more for every text in the questions' `extra`, such as
    `by_topic`: group -> run -> accuracy; `examples`. Where questions are
    marked as needles also `needle`, `needle_chance`, `needle_count`,
    `needle_hidden` (share of needles whose every frame forgetting drops),
    `needle_without_memaug`, `needle_by_duration` and `needle_by_format`.

  Raises:
    UserError: a run answered nothing.
  """
  for name, run in runs.items():
    if not run.scored:
      raise UserError(_nothing(name, run))
  first, *others = runs
  scored = runs[first].scored
  keys = _keys(item for run in runs.values() for item in run.scored)
  data = {
    "benchmark": runs[first].about.get("benchmark", ""),
    "versions": _versions(runs[first].about),
    "runs": {name: _run(run) for name, run in runs.items()},
    **_plain(accuracy(scored)),
    "unfinished": sum(not item.finished for item in scored),
    "left_out": len(runs[first].left_out),
    "seconds": sum(i.seconds for run in runs.values() for i in run.scored),
    "compared": {
      name: dataclasses.asdict(compare(scored, runs[name].scored))
      for name in others
    },
    **{f"by_{key}": _by(runs, _names(key)) for key in keys},
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
  """Writes report.json, report.md and the pictures.

  Args:
    report: to write.
    folder: is made if needed.
    curves: losses of the runs, rows with "step" and "loss", if known.

  Returns:
    Names of the files.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  pictures = report_pages.pictures(report.data)
  if curves:
    pictures["loss.png"] = report_pages.losses(curves)
  for name, figure in pictures.items():
    _write(folder / name, report_pages.png(figure))
  _write(folder / "report.md", report_pages.page(report.data, list(pictures)))
  text = json.dumps(report.data, indent=2, allow_nan=False) + "\n"
  _write(folder / _FILE, text)
  return [_FILE, "report.md", *pictures]


def _write(path: pathlib.Path, data: str | bytes) -> None:
  """Writes a file that other workers may be writing, too."""
  write_file(path, data, several_writers=True)


def load(folder: str | os.PathLike) -> Report:
  """The report in a folder.

  Raises:
    UserError: there is none, or it is not one of this version.
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
  """What report.json has at least."""

  benchmark: str
  runs: dict[str, dict[str, Any]] = pydantic.Field(min_length=1)
  versions: dict[str, Any]
  by_task: dict[str, Any]


def _plain(found: Accuracy) -> dict[str, Any]:
  return {
    "accuracy": found.accuracy,
    "interval": [found.low, found.high],
    "chance": found.chance,
    "count": found.count,
    "unreadable": found.unreadable,
  }


def _run(run: Run) -> dict[str, Any]:
  reasons = collections.Counter(
    (item.video, item.reason) for item in run.left_out
  )
  return {
    **run.about,
    **_plain(accuracy(run.scored)),
    "unfinished": sum(not item.finished for item in run.scored),
    "mean_of_tasks": _mean_of_tasks(run.scored),
    "seconds": sum(item.seconds for item in run.scored),
    "left_out": [
      {"video": video, "questions": count, "reason": reason}
      for (video, reason), count in reasons.items()
    ],
  }


def _mean_of_tasks(scored: Sequence[Scored]) -> float:
  """Each task counts alike, however many questions it has; NaN without."""
  shares = [found.accuracy for found in group(scored, _names("task")).values()]
  return sum(shares) / len(shares) if shares else math.nan


def _versions(about: Mapping[str, Any]) -> dict[str, str]:
  return {
    "benchmark": str(about.get("version", "")),
    "parser": str(about.get("parser", "")),
    "hourjax": hourjax.__version__,
    **{name: importlib.metadata.version(name) for name in ("jax", "numpy")},
  }


def _keys(scored: Iterable[Scored]) -> list[str]:
  """What questions are told apart by: their own fields, then `extra`'s."""
  known: dict[str, None] = {}
  for item in scored:
    extra = item.question.extra
    known |= {k: None for k, v in extra.items() if isinstance(v, str)}
  fixed = ("task", "duration", "kind")
  return [*fixed, *sorted(known.keys() - set(fixed))]


def _names(key: str) -> Callable[[Scored], Sequence[str]]:
  """What gives the groups by `key` that a question counts in."""
  if key == "task":
    return lambda item: item.question.tasks

  def name(item: Scored) -> Sequence[str]:
    question = item.question
    own = key in ("duration", "kind")
    found = getattr(question, key) if own else question.extra.get(key)
    return (str(found),) if found else ()

  return name


def _by(runs: Mapping[str, Run], groups: Callable[[Scored], Sequence[str]]):
  tables = {name: group(run.scored, groups) for name, run in runs.items()}
  names = in_order({name for table in tables.values() for name in table})
  return {
    name: {
      run: _plain(table[name]) for run, table in tables.items() if name in table
    }
    for name in names
  }


def _needles(runs: Mapping[str, Run]) -> dict[str, Any]:
  """Questions for what a video shows for a second or two only."""
  only = {
    name: dataclasses.replace(
      run,
      scored=tuple(i for i in run.scored if i.question.extra.get("needle")),
    )
    for name, run in runs.items()
  }
  scored = next(iter(only.values())).scored
  whole = accuracy(scored)
  without = only[WITHOUT].scored if WITHOUT in only else ()
  hidden = sum(bool(i.question.extra.get("hidden")) for i in scored)
  return {
    "needle": whole.accuracy,
    "needle_interval": [whole.low, whole.high],
    "needle_without_memaug": accuracy(without).accuracy,
    "needle_chance": whole.chance,
    "needle_count": whole.count,
    "needle_hidden": hidden / max(len(scored), 1),
    "needle_by_duration": _by(only, _names("duration")),
    "needle_by_format": _by(only, _names("format")),
  }


def _examples(scored: Iterable[Scored]) -> list[dict[str, Any]]:
  """Some, spread evenly over all of them."""
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


def _nothing(name: str, run: Run) -> str:
  if not run.left_out:
    return f"{name} was asked no question: there is nothing to report"
  first = run.left_out[0]
  return (
    f"none of the {len(run.left_out)} questions could be asked of {name}, so"
    f" there is nothing to report; the first, {first.id}: {first.reason}"
  )


def _without_nan(value: Any) -> Any:
  """JSON has no NaN: an empty group's accuracy is null."""
  if isinstance(value, dict):
    return {key: _without_nan(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_without_nan(item) for item in value]
  if isinstance(value, float) and math.isnan(value):
    return None
  return value
