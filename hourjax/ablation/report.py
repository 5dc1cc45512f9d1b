"""The results of a table: means over seeds, beside the paper's figures."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pydantic
from scipy import stats

from hourjax import plots, schema
from hourjax.ablation.plan import Job
from hourjax.ablation.tables import Row, Table
from hourjax.atomic_file import write_file

if TYPE_CHECKING:
  from matplotlib.figure import Figure


class Result(schema.Schema):
  """Describes the result.json of one training and its evaluation.

  Attributes:
    config: configuration of the training.
    questions: fingerprint of what was asked, and how many questions.
    accuracy: share of right answers.
    count: number of questions that were answered.
    chance: expected accuracy of guessing.
    left_out: number of questions that could not be asked.
    by_task: accuracy of each task.
    chance_by_task: expected accuracy of guessing, of each task; results of
      older code lack it.
    count_by_task: number of questions of each task, likewise.
    seconds: that training and evaluation took.
  """

  config: dict[str, Any]
  questions: str
  accuracy: float
  count: int = pydantic.Field(gt=0)
  chance: float
  left_out: int
  by_task: dict[str, float]
  chance_by_task: dict[str, float] = pydantic.Field(default_factory=dict)
  count_by_task: dict[str, int] = pydantic.Field(default_factory=dict)
  seconds: float

  def task_name(self, task: str) -> str | None:
    """Returns the name of a task here; None if there is no such task."""
    for name in self.by_task:
      if name.lower().replace("_", " ") == task:
        return name
    return None


class Estimate(NamedTuple):
  """Holds a mean over seeds.

  Attributes:
    mean: of the values.
    margin: half of the 95 % interval of the mean; None for a single value.
    count: number of values.
  """

  mean: float
  margin: float | None
  count: int


def estimate(values: Sequence[float]) -> Estimate:
  """Returns the mean of values, with the 95 % interval of Student's t.

  The interval of [1, 2, 3] is 2 +- 4.303 * 1 / sqrt(3).
  """
  count, mean = len(values), sum(values) / len(values)
  if count == 1:
    return Estimate(mean, None, 1)
  spread = math.sqrt(sum((x - mean) ** 2 for x in values) / (count - 1))
  quantile = float(stats.t.ppf(0.975, count - 1))
  return Estimate(mean, quantile * spread / math.sqrt(count), count)


@dataclasses.dataclass(frozen=True)
class Line:
  """Holds the results of one row; accuracies are in percent.

  Attributes:
    row: the row.
    values: accuracy by seed.
    accuracy: their mean.
    difference: mean of the differences to the default row with the same seed;
      None for that row itself.
    paper_difference: the same of the paper's figures, averaged over its
      benchmarks; None where it gives none.
  """

  row: Row
  values: Mapping[int, float]
  accuracy: Estimate
  difference: Estimate | None
  paper_difference: float | None

  @property
  def agrees(self) -> bool | None:
    """Returns whether both differences have one sign; None if not known."""
    expected = self.paper_difference or self.row.direction
    if self.difference is None or not expected or not self.difference.mean:
      return None
    return (self.difference.mean > 0) == (expected > 0)

  @property
  def is_clear(self) -> bool:
    """Returns whether the interval of the difference leaves out 0."""
    found = self.difference
    if found is None or found.margin is None:
      return False
    return abs(found.mean) > found.margin


@dataclasses.dataclass(frozen=True)
class Results:
  """Holds the results of a table.

  Attributes:
    table: the table.
    lines: one for each of its rows.
    task: the task that accuracies are about; empty for all questions.
    chance: expected accuracy of guessing at these questions, in percent.
    count: number of questions.
    left_out: most questions that a run left out.
    about: what all runs have in common.
  """

  table: Table
  lines: tuple[Line, ...]
  task: str
  chance: float
  count: int
  left_out: int
  about: Mapping[str, Any]

  def summary(self) -> str:
    """Returns in a sentence how often the direction agrees."""
    known = [line for line in self.lines if line.agrees is not None]
    if not known:
      return "The paper states no figures to compare the direction with."
    right = [line for line in known if line.agrees]
    clear = [line for line in known if line.is_clear]
    return (
      f"The direction agrees with the paper in {len(right)} of {len(known)}"
      f" rows; in {len(clear)} of them the 95 % interval of our difference"
      " leaves out 0."
    )


def collect(
  table: Table,
  runs: Sequence[tuple[Job, Result]],
  config: Mapping[str, Any],
  benchmark: str,
) -> Results:
  """Computes the results of a table.

  Args:
    table: the table.
    runs: of all rows, with their results.
    config: configuration of the last stage, without the rows' changes.
    benchmark: name of the benchmark.
  """
  task = table.task
  if any(result.task_name(task) is None for _, result in runs):
    task = ""
  values: dict[str, dict[int, float]] = {}
  for job, result in runs:
    name = result.task_name(task) if task else None
    share = result.by_task[name] if name else result.accuracy
    values.setdefault(job.row.label, {})[job.seed] = 100 * share
  rows = {row.label: row for row in table.rows}
  default, usual = rows[table.default], values[table.default]
  lines = []
  for label, own in values.items():
    row, difference, paper = rows[label], None, None
    if label != table.default:
      difference = estimate([own[seed] - usual[seed] for seed in own])
      if row.paper and default.paper:
        gaps = [a - b for a, b in zip(row.paper, default.paper, strict=True)]
        # Sums of decimals such as 0.1 are not exact; figures have one digit.
        paper = round(sum(gaps) / len(gaps), 6)
    lines.append(
      Line(row, own, estimate(list(own.values())), difference, paper)
    )
  some = runs[0][1]
  name = some.task_name(task) if task else None
  return Results(
    table,
    tuple(lines),
    task,
    100 * some.chance_by_task.get(name or "", some.chance),
    some.count_by_task.get(name or "", some.count),
    max(result.left_out for _, result in runs),
    {
      "benchmark": benchmark,
      "dataset": config["data"]["dataset"],
      **{key: config[key] for key in ("init", "steps", "epochs")},
    },
  )


def page(results: Results, picture: str = "") -> str:
  """Returns the table in Markdown.

  Args:
    results: to show.
    picture: name of the picture's file; empty for none.
  """
  table = results.table
  head = ["row", "n", "accuracy", "difference", *_paper_heads(table),
          "direction agrees"]  # fmt: skip
  lines = [f"# {table.title}", "", _conditions(results), ""]
  lines += [f"| {' | '.join(head)} |"]
  lines += ["|---|" + "---:|" * (len(head) - 2) + "---|"]
  for line in results.lines:
    found = [
      line.row.label,
      str(line.accuracy.count),
      _with_margin(line.accuracy),
      _with_margin(line.difference, sign=True),
      *_paper_cells(line, table),
      _agreement(line),
    ]
    lines.append(f"| {' | '.join(found)} |")
  lines += ["", results.summary()]
  if table.note:
    lines += ["", table.note]
  if picture:
    lines += ["", f"![{table.title}]({picture})"]
  return "\n".join(lines) + "\n"


def _paper_heads(table: Table) -> list[str]:
  """Returns the heads of the paper's columns."""
  if not any(row.paper for row in table.rows):
    return []
  return [*(f"paper: {name}" for name in table.columns), "paper: difference"]


def _paper_cells(line: Line, table: Table) -> list[str]:
  """Returns the paper's figures of a row."""
  if not any(row.paper for row in table.rows):
    return []
  figures = line.row.paper or ("",) * len(table.columns)
  gap = line.paper_difference
  return [*map(str, figures), "" if gap is None else f"{gap:+.1f}"]


def _agreement(line: Line) -> str:
  """Returns "yes" or "no", and whether the difference is clear."""
  if line.agrees is None:
    return ""
  return ("yes" if line.agrees else "no") + (
    "" if line.is_clear else ", unclear"
  )


def _with_margin(found: Estimate | None, sign: bool = False) -> str:
  """Returns a mean with its margin, such as "54.0 ± 0.8"."""
  if found is None:
    return ""
  mean = f"{found.mean:+.1f}" if sign else f"{found.mean:.1f}"
  return mean if found.margin is None else f"{mean} ± {found.margin:.1f}"


def _conditions(results: Results) -> str:
  """Returns in sentences what was trained and asked."""
  about, seeds = results.about, max(x.accuracy.count for x in results.lines)
  length = f"{about['epochs']:g} epochs"
  if about["steps"]:
    length = f"{about['steps']:,} steps"
  start = "fresh weights"
  if about["init"]:
    start = f"{about['init']} (shared by the rows that have its model)"
  what = f"the task {results.task!r} of " if results.task else ""
  text = (
    f"Accuracy in percent on {what}{about['benchmark']}, {results.count:,}"
    f" questions, chance {results.chance:.1f}: mean and 95 % interval"
    f" (Student's t) over n = {seeds} seed{'s' * (seeds > 1)}. Trained on"
    f" {about['dataset']} for {length} from {start}. Differences are to"
    f" {results.table.default!r} with the same seed."
  )
  if results.table.task and not results.task:
    text += f" The paper's are on {results.table.task} alone."
  if results.left_out:
    text += f" Up to {results.left_out:,} questions were left out of a run."
  return text


def as_data(results: Results) -> dict[str, Any]:
  """Returns the results as JSON values; accuracies are in percent."""
  return {
    "table": results.table.title,
    "default": results.table.default,
    "note": results.table.note,
    "task": results.task,
    "chance": results.chance,
    "questions": results.count,
    "left_out": results.left_out,
    "about": dict(results.about),
    "rows": [
      {
        "label": line.row.label,
        "accuracy": line.accuracy._asdict(),
        "by_seed": {str(seed): x for seed, x in line.values.items()},
        "difference": line.difference and line.difference._asdict(),
        "paper": dict(zip(results.table.columns, line.row.paper)),
        "paper_difference": line.paper_difference,
        "agrees": line.agrees,
        "clear": line.is_clear,
      }
      for line in results.lines
    ],
    "summary": results.summary(),
  }


def figure(results: Results) -> "Figure":
  """Draws accuracies with their intervals, beside the paper's figures.

  Dots are single seeds.
  """
  lines, table = results.lines, results.table
  has_paper = any(line.row.paper for line in lines)
  made = plots.new_figure(9 if has_paper else 6, 1.6 + 0.42 * len(lines))
  axes = made.subplots(1, 1 + has_paper, squeeze=False)[0]
  for y, line in enumerate(lines):
    chosen = line.row.label == table.default
    axes[0].barh(
      y,
      line.accuracy.mean,
      height=0.6,
      xerr=line.accuracy.margin,
      color=plots.PEAK_BAR if chosen else plots.PALE_BAR,
      ecolor=plots.INK,
      capsize=3,
    )
    axes[0].plot(
      list(line.values.values()),
      [y] * len(line.values),
      "o",
      ms=3,
      color=plots.INK,
    )
  axes[0].axvline(results.chance, color=plots.FAINT, lw=1, ls=":")
  plots.name_rows(axes[0], [line.row.label for line in lines])
  count = max(line.accuracy.count for line in lines)
  about = results.task or "all questions"
  axes[0].set_xlabel(
    f"accuracy, %, on {about}\nn = {count}, 95 % interval; dotted: chance"
  )
  axes[0].set_xlim(0, None)
  if has_paper:
    colours = plots.series_colours(len(table.columns))
    for number, name in enumerate(table.columns):
      points = [
        (line.row.paper[number], y)
        for y, line in enumerate(lines)
        if line.row.paper
      ]
      axes[1].plot(*zip(*points), "o", color=colours[number], label=name)
    plots.name_rows(axes[1], [""] * len(lines))
    axes[1].set_xlabel("accuracy, %, in the paper")
    axes[1].legend(frameon=False, fontsize=8)
  for each in axes:
    plots.keep_spines(each, "bottom")
  made.suptitle(table.title, color=plots.INK)
  return made


def write(results: Results, folder: str | os.PathLike, name: str) -> list[str]:
  """Writes the table as Markdown and JSON, and the picture.

  Args:
    results: to write.
    folder: of the files.
    name: of the table: the files of "4" are called table4.

  Returns:
    Names of the files.
  """
  folder = pathlib.Path(folder)
  name = name if name.startswith("figure") else f"table{name}"
  names = [f"{name}.{ending}" for ending in ("md", "json", "png")]
  text = json.dumps(as_data(results), indent=2, ensure_ascii=False) + "\n"
  contents = page(results, names[2]), text, plots.png(figure(results))
  for each, content in zip(names, contents, strict=True):
    write_file(folder / each, content)
  return names
