"""A report as plots, as a page in Markdown and as text for a terminal.

The functions read the data of a report (`report.build`) and write no files.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hourjax import plots
from hourjax.evaluation.scoring import in_order

if TYPE_CHECKING:
  from matplotlib.figure import Figure

# A report's data, one of its accuracies or one of its runs: see `report.build`.
Data = Mapping[str, Any]
Groups = Mapping[str, Data]  # group -> run -> accuracy

# --- Plots -------------------------------------------------------------------

_TITLES = {
  "task": "Accuracy by task",
  "duration": "Accuracy by length of video",
  "needle": "Needles by length of video",
}
_FILES = {
  "by_task": ("accuracy_by_task.png", _TITLES["task"]),
  "by_duration": ("accuracy_by_duration.png", _TITLES["duration"]),
  "needle_by_duration": ("needles_by_duration.png", _TITLES["needle"]),
}
# Heights in inches: of a group with one bar, of each further bar in it, and of
# a group whose label has two lines.
_ROW, _BAR, _TWO_LINES = 0.3, 0.16, 0.4
_LABEL = 34  # characters of a line of a label


def accuracy(
  reports: Iterable[Any], by: str = "task", title: str | None = None
) -> "Figure":
  """Draws accuracies of one or more reports with their 95 % intervals.

  Args:
    reports: `report.Report`s; every run of each gets a colour.
    by: "task", "duration", "kind" or another grouping of the reports.
    title: title of the figure.

  Raises:
    ValueError: no report has accuracies by this grouping.
  """
  groups = _merged([report.groups(by) for report in reports])
  if not groups:
    raise ValueError(f"no report has accuracies by {by!r}")
  words = by.replace("_", " ")
  return _bars(groups, title or _TITLES.get(by, f"Accuracy by {words}"))


def figures(data: Data) -> dict[str, "Figure"]:
  """Draws the plots of one report.

  Args:
    data: data of the report.

  Returns:
    File name -> figure. A plot whose accuracies the report lacks is absent.
  """
  made = {
    name: _bars(data[key], title)
    for key, (name, title) in _FILES.items()
    if data.get(key)
  }
  if data.get("needle_grid"):
    made["needles_by_depth.png"] = needle_grid(data["needle_grid"])
  return made


def needle_grid(grid: Mapping[str, Mapping[str, Data]]) -> "Figure":
  """Draws the accuracy on needles by length of video and depth.

  Args:
    grid: `needle_grid` of a report: kind of needle -> length -> depth ->
      accuracy.
  """
  lengths = in_order({length for kind in grid.values() for length in kind})
  depths = sorted({d for k in grid.values() for row in k.values() for d in row})
  maps = {}
  for kind, found in grid.items():
    chance = next(iter(next(iter(found.values())).values()))["chance"]
    maps[f"{kind} (chance {chance:.0%})"] = [
      [found.get(length, {}).get(depth) for length in lengths]
      for depth in depths
    ]
  figure = plots.heat_maps(maps, rows=depths, columns=lengths)
  figure.suptitle("Needles by depth and length of video", color=plots.INK)
  return figure


def losses(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> "Figure":
  """Draws the loss of each run over the steps, and that on held-out answers.

  Args:
    curves: run -> rows of its metrics.jsonl, with "step" and "loss", and some
      of them with "eval/answer_loss".
  """
  figure, axes = plots.new_chart(7, 3.4, "Training loss")
  colours = plots.series_colours(len(curves))
  for (name, rows), colour in zip(curves.items(), colours):
    for key, label, style in (
      ("loss", name, "-"),
      ("eval/answer_loss", f"{name}, held-out answers", ".--"),
    ):
      points = [(row["step"], row[key]) for row in rows if key in row]
      if points:
        axes.plot(
          *zip(*points), style, label=label, color=colour, linewidth=1.2
        )
  axes.set(xlabel="step", ylabel="cross entropy", yscale="log")
  axes.legend(frameon=False)
  return figure


def _merged(tables: Sequence[Groups]) -> Groups:
  """Merges the groups of several reports.

  A name that two reports share gets a number in the second:

  [{"ocr": {"3b": x}}, {"ocr": {"3b": y}}] -> {"ocr": {"3b": x, "3b (2)": y}}
  """
  merged: dict[str, dict[str, Any]] = {}
  used: set[str] = set()
  for table in tables:
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    renamed = {name: _unused(name, used) for name in names}
    used |= set(renamed.values())
    for group, row in table.items():
      merged.setdefault(group, {}).update(
        (renamed[name], value) for name, value in row.items()
      )
  return merged


def _unused(name: str, used: set[str]) -> str:
  """Returns a name, with a number behind it if it is used already."""
  number, new = 1, name
  while new in used:
    number += 1
    new = f"{name} ({number})"
  return new


def _bars(groups: Groups, title: str) -> "Figure":
  """Draws a bar for each run in each group, its interval, and chance."""
  runs = list(dict.fromkeys(name for row in groups.values() for name in row))
  names = list(groups)
  labels = [_label(name, groups[name]) for name in names]
  row_height = _ROW + _BAR * (len(runs) - 1)
  if any("\n" in label for label in labels):
    row_height = max(row_height, _TWO_LINES)
  figure, axes = plots.new_chart(7.6, 1.5 + row_height * len(names), title)
  plots.grouped_bars(
    axes,
    {
      run: {
        i: (row[run]["accuracy"], *row[run]["interval"])
        for i, row in enumerate(groups.values())
        if run in row and row[run]["count"]
      }
      for run in runs
    },
  )
  chances = [next(iter(row.values()))["chance"] for row in groups.values()]
  plots.mark_rows(axes, chances, label="chance")
  plots.name_rows(axes, labels)
  axes.set_xlim(0, 1)
  axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
  letters = sum(len(run) + 8 for run in [*runs, "chance"])
  columns = 1 if letters > 90 else len(runs) + 1
  figure.legend(loc="outside lower right", ncols=columns, frameon=False)
  return figure


def _label(name: str, row: Data) -> str:
  """Returns a group's name and number of questions, in at most two lines."""
  count = next(iter(row.values()))["count"]
  words = f"{name.replace('_', ' ')} ({count:,})"
  return textwrap.fill(words, _LABEL, max_lines=2, placeholder=" ...")


# --- Text --------------------------------------------------------------------

# Keys of a run's run.json that the page shows, and their words on the page.
_ABOUT = {
  "model": "model",
  "benchmark": "benchmark",
  "version": "version of questions and prompts",
  "parser": "version of the parser",
  "subtitles": "subtitles",
  "videos": "videos read from",
  "frames": "frames",
  "max_tokens": "longest answer, in tokens",
}
_NOTE = (
  "Intervals are Wilson's at 95 % and take questions as independent. Chance is"
  " what guessing would reach. Answers that could not be read count as wrong."
)
_LISTED = 50  # videos left out that a page names; all are in report.json
_LONGEST = 1200  # characters of an example's prompt


def page(data: Data, images: Sequence[str] = ()) -> str:
  """Writes the whole report in Markdown.

  Args:
    data: data of the report.
    images: file names of plots that lie beside the page.
  """
  parts = [
    f"# {data['benchmark']}: {', '.join(data['runs'])}",
    "```\n" + summary(data) + "\n```",
    "## What was run",
    _about(data),
    "## Scores",
    _NOTE,
  ]
  for title, groups in tables(data):
    parts += [f"### {title[0].upper()}{title[1:]}", _scores(data, groups)]
  parts += [f"![]({name})" for name in images]
  parts += ["## Left out", _left_out(data)]
  for kind, items in data["examples"].items():
    if items:
      parts.append(f"## Examples of {kind} answers")
      parts += [_example(item) for item in items]
  return "\n\n".join(parts) + "\n"


def table(data: Data) -> str:
  """Writes accuracies by every grouping as text for a terminal.

  Args:
    data: data of the report.

  Returns:
    A row for each group, with accuracy and interval of each run in percent.
  """
  names = list(data["runs"])
  all_tables = tables(data)
  cells = {
    (title, group): _cells(row, names)
    for title, groups in all_tables
    for group, row in groups.items()
  }
  width = 3 + max(len(text) for row in [names, *cells.values()] for text in row)

  def line(first: str, count: str, chance: str, row: Sequence[str]) -> str:
    start = f"{first:<28}{count:>6}{chance:>9}"
    return start + "".join(f"{text:>{width}}" for text in row)

  head = line("", "n", "chance", names)
  lines = [head]
  for title, groups in all_tables:
    lines += ["-" * len(head), title]
    for group, row in groups.items():
      count, chance, *row = cells[title, group]
      lines.append(line(f"  {_words(group)}", count, chance, row))
  return "\n".join(lines)


def summary(data: Data) -> str:
  """Writes the report's main numbers in a few lines.

  Args:
    data: data of the report.
  """
  runs, versions = data["runs"], data["versions"]
  lines = [
    f"{data['benchmark']} {versions['benchmark']}, parser {versions['parser']}",
    *(
      name if name == run["model"] else f"{name}: {run['model']}"
      for name, run in runs.items()
    ),
    f"accuracy {data['accuracy']:.1%} [{_interval(data)}] of"
    f" {data['count']:,} questions (chance {data['chance']:.1%})"
    + _mean_of_tasks(data),
  ]
  if data["unreadable"]:
    lines.append(
      f"unreadable answers, counted as wrong: {data['unreadable']:,}"
    )
  for name, run in runs.items():
    if run["left_out"]:
      lines.append(f"{name}: {_coverage(run)}")
  if data["needle_count"]:
    lines.append(_needles(data))
  for name, pair in data["compared"].items():
    low, high = (100 * end for end in (pair["low"], pair["high"]))
    lines.append(
      f"against {name}: {100 * pair['difference']:+.1f} points [{low:+.1f},"
      f" {high:+.1f}] on {pair['count']:,} questions; {pair['only_ours']:,}"
      f" right here alone, {pair['only_theirs']:,} there alone"
    )
  if len(runs) > 1 and any(run["left_out"] for run in runs.values()):
    lines.append("runs that left something out are scored on what they asked")
  lines += _notes(data)
  return "\n".join(lines)


def tables(data: Data) -> list[tuple[str, Mapping[str, Data]]]:
  """Returns the tables of a report: title and groups of each.

  A table of a single group is left out, since it would repeat the whole; if all
  tables have a single group, the first one is kept.

  Args:
    data: data of the report.
  """
  keys = [key for key in data if key.startswith("by_")]
  order = ["by_topic", "by_task", "by_duration"]
  keys = [k for k in order if k in keys] + [k for k in keys if k not in order]
  named = [(_title(key), data[key]) for key in keys]
  named += [
    (f"needles, by {_title(key[len('needle_') :])}", data[key])
    for key in ("needle_by_duration", "needle_by_format")
    if data[key]
  ]
  kept = [item for item in named if len(item[1]) > 1 or "needles" in item[0]]
  return kept or [item for item in named if item[1]][:1]


def _title(key: str) -> str:
  """Returns a table's title: "by_task" -> "task"."""
  name = _words(key[len("by_") :])
  return "length" if name == "duration" else name


def _words(name: str) -> str:
  return name.replace("_", " ")


def _interval(accuracy: Data) -> str:
  """Returns an accuracy's interval in percent: "30.1, 95.4"."""
  low, high = accuracy["interval"]
  return f"{100 * low:.1f}, {100 * high:.1f}"


def _cells(row: Data, names: Sequence[str]) -> list[str]:
  """Returns the number of questions, chance, and a cell for each run.

  A run's cell is "28% [25, 31]", or "28% of 90 [25, 31]" where it was asked
  another number of questions than the first run.
  """
  first = next(iter(row.values()))
  cells = [f"{first['count']:,}", f"{first['chance']:.0%}"]
  for name in names:
    if name not in row:
      cells.append("-")
      continue
    result = row[name]
    low, high = (round(100 * end) for end in result["interval"])
    other = result["count"] != first["count"]
    count = f" of {result['count']:,}" if other else ""
    cells.append(f"{result['accuracy']:.0%}{count} [{low}, {high}]")
  return cells


def _coverage(run: Data) -> str:
  """Returns how much of its questions a run was asked.

  An example: "2,700 questions, 2,688 asked, 12 left out: 4 videos".
  """
  count = sum(item["questions"] for item in run["left_out"])
  videos = len({item["video"] for item in run["left_out"]})
  return (
    f"{run['count'] + count:,} questions, {run['count']:,} asked, {count:,}"
    f" left out: {videos:,} {'video' if videos == 1 else 'videos'}, see"
    " report.md"
  )


def _mean_of_tasks(data: Data) -> str:
  """Returns the mean of the tasks, by which some benchmarks are scored."""
  if len(data["by_task"]) < 2:
    return ""
  first = next(iter(data["runs"].values()))
  return (
    f"; mean of its {len(data['by_task'])} tasks {first['mean_of_tasks']:.1%}"
  )


def _needles(data: Data) -> str:
  """Returns the summary's line on needles."""
  line = (
    f"needles  {data['needle']:.1%} of {data['needle_count']} questions"
    f" (chance {data['needle_chance']:.1%}); {data['needle_hidden']:.0%}"
    " of them never reach the decoder directly"
  )
  if data["needle_without_memaug"] is not None:
    line += f"; without MemAug {data['needle_without_memaug']:.1%}"
  return line


def _about(data: Data) -> str:
  """Writes the table of what was run, with what and how long it took."""
  runs = data["runs"]
  lines = ["| | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
  for key, words in _ABOUT.items():
    cells = [_text(run.get(key)) for run in runs.values()]
    lines.append(f"| {words} | " + " | ".join(cells) + " |")
  rows = {
    "questions asked": "count",
    "unreadable": "unreadable",
    "not finished in that length": "unfinished",
  }
  for words, key in rows.items():
    cells = [f"{run[key]:,}" for run in runs.values()]
    lines.append(f"| {words} | " + " | ".join(cells) + " |")
  means = [_share(run["mean_of_tasks"]) for run in runs.values()]
  lines.append("| accuracy, mean of tasks | " + " | ".join(means) + " |")
  spent = [f"{run['seconds'] / 60:.1f} min" for run in runs.values()]
  lines.append("| time, all workers' | " + " | ".join(spent) + " |")
  versions = ", ".join(
    f"{name} {data['versions'][name]}" for name in ("hourjax", "jax", "numpy")
  )
  notes = " ".join(_notes(data))
  return "\n".join(lines) + f"\n\nWith {versions}. {notes}".rstrip()


def _share(value: float | None) -> str:
  return "" if value is None else f"{value:.1%}"


def _notes(data: Data) -> Sequence[str]:
  """Returns the sentences on how the questions were asked."""
  return next(iter(data["runs"].values())).get("notes", ())


def _text(value: Any) -> str:
  """Returns a value as text that may stand in a cell of a Markdown table."""
  if isinstance(value, bool):
    return "yes" if value else "no"
  return str("" if value is None else value).replace("|", "\\|")


def _scores(data: Data, groups: Mapping[str, Data]) -> str:
  """Writes one table of accuracies in Markdown."""
  names = list(data["runs"])
  lines = [
    "| | n | chance | " + " | ".join(names) + " |",
    "|---|---:|---:" + "|---:" * len(names) + "|",
  ]
  for group, row in groups.items():
    cells = " | ".join([_text(_words(group)), *_cells(row, names)])
    lines.append(f"| {cells} |")
  return "\n".join(lines)


def _left_out(data: Data) -> str:
  """Lists the videos that each run left out, with the reasons."""
  parts = []
  for name, run in data["runs"].items():
    if not run["left_out"]:
      continue
    lines = [f"{name}: {_coverage(run).removesuffix(', see report.md')}."]
    lines += [
      f"- {item['video']} ({item['questions']}): {_text(item['reason'])}"
      for item in run["left_out"][:_LISTED]
    ]
    more = len(run["left_out"]) - _LISTED
    if more > 0:
      lines.append(f"- and {more:,} more, listed in report.json")
    parts.append("\n".join([lines[0], "", *lines[1:]]))
  return "\n\n".join(parts) or "Nothing: all of these questions were asked."


def _example(item: Data) -> str:
  """Writes one question with its answer, indented as a quotation."""
  parsed = "nothing" if item["parsed"] is None else repr(item["parsed"])
  # Indented, so that no answer is taken for Markdown.
  return (
    f"**{_text(item['id'])}**, {_text(item['video'])}\n\n"
    + textwrap.indent(_short(item["prompt"]), "    ", lambda _: True)
    + "\n\n"
    + textwrap.indent(
      f"said {item['answer']!r}\nread as {parsed},"
      f" expected {item['expected']!r}",
      "    ",
    )
  )


def _short(prompt: str) -> str:
  """Returns a prompt's start and end; long subtitles stand between them."""
  if len(prompt) <= _LONGEST:
    return prompt
  half = _LONGEST // 2
  left = len(prompt) - 2 * half
  return f"{prompt[:half]}\n[... {left:,} characters ...]\n{prompt[-half:]}"
