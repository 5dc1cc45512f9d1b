"""The dataset's files: questions, conversations, captions, events, card, plots.

They are written anew from the results of all workers; each file is whole at any
time.
"""

import collections
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet

from hourjax.atomic_file import replace_file, write_file
from hourjax.construction.call_store import CallStore, Spent
from hourjax.construction.costs import Prices
from hourjax.construction.options import STAGES, Options
from hourjax.data.prepare import dataset_plots, question_tables

CONVERSATIONS = "videomarathon.json"
QUESTIONS = "questions.parquet"
FILES = (
  CONVERSATIONS,
  QUESTIONS,
  "captions.parquet",
  "events.parquet",
  "dropped.jsonl",
  "videos.jsonl",
  "summary.json",
  "README.md",
)
_TEXT, _NUMBER = pyarrow.string(), pyarrow.float64()
_COLUMNS = {
  QUESTIONS: {
    "video": _TEXT,
    "question": _TEXT,
    "answer": _TEXT,
    "options": pyarrow.list_(_TEXT),
    "topic": _TEXT,
    "task": _TEXT,
    "format": _TEXT,
    "data_source": _TEXT,
    "duration": _NUMBER,
    "answered_blind": pyarrow.bool_(),
  },
  "captions.parquet": {
    "video": _TEXT,
    "start": _NUMBER,
    "end": _NUMBER,
    **dict.fromkeys(
      ("temporality", "spatiality", "object", "action", "scene", "summary"),
      _TEXT,
    ),
  },
  "events.parquet": {
    "video": _TEXT,
    "start": _NUMBER,
    "end": _NUMBER,
    "title": _TEXT,
    "description": _TEXT,
  },
}
_ROWS = 20_000  # of a parquet file's row group
# Shares of VideoMarathon, in percent, which the plots show beside ours
# (hourjax/README.md, VideoMarathon).
PAPER = {
  "name": "VideoMarathon, by the paper",
  "topics": {
    "object": 30.2,
    "temporality": 25.3,
    "action": 20.1,
    "spatiality": 10.1,
    "event": 7.6,
    "scene": 6.7,
  },
  "sources": {
    "panda": 62.3,
    "ego4d": 21.3,
    "activitynet": 8.2,
    "youcook2": 5.5,
    "moviechat": 2.7,
  },
  # Thousands of videos in each five minutes of duration.
  "videos_per_5_minutes": (
    4.0, 4.9, 3.4, 3.1, 3.1, 2.75, 2.05, 1.05, 0.85, 1.3, 1.0, 0.4,
  ),
}  # fmt: skip


def source_of(name: str) -> str:
  """Returns the source of a video: the first folder of its path."""
  first, slash, _ = name.partition("/")
  return first if slash else "videos"


def write(
  store: CallStore,
  plan: str,
  out: str | os.PathLike,
  *,
  options: Options,
  prices: Prices,
  names: Collection[str],
) -> dict[str, Any]:
  """Writes all files from the results in the store.

  Args:
    store: of the construction.
    plan: of the results that are used.
    out: folder of the dataset, which exists.
    options: of the construction, for the card.
    prices: of tokens, for the card.
    names: of the videos that there are. What earlier starts made of others is
      in the dataset as well.

  Returns:
    The summary, as summary.json holds it.
  """
  folder = pathlib.Path(out)
  counts = _Counts(names)
  tables = {name: _Table(folder / name, _COLUMNS[name]) for name in _COLUMNS}
  with (
    replace_file(folder / CONVERSATIONS) as conversations,
    replace_file(folder / "dropped.jsonl") as dropped,
    replace_file(folder / "videos.jsonl") as videos,
    open(conversations, "w", encoding="utf-8") as conversations_file,
    open(dropped, "w", encoding="utf-8") as dropped_file,
    open(videos, "w", encoding="utf-8") as videos_file,
  ):
    separator = "["
    for name, state, row, result in store.results(plan):
      duration = float(row.info["duration"])
      line = {
        "video": name,
        "duration": duration,
        "state": state,
        "kind": result.get("kind"),
        "reason": result.get("reason"),
        "questions": len(result.get("questions", ())),
        "unusable": result.get("unusable", []),
      }
      videos_file.write(_line(line))
      counts.add(name, state, duration, result)
      for item in result.get("dropped", ()):
        dropped_file.write(_line({"video": name, **item}))
      if state not in ("done", "partial"):
        continue
      _write_tables(tables, name, duration, result)
      for record in _records(name, duration, result["questions"]):
        text = json.dumps(record, ensure_ascii=False)
        conversations_file.write(f"{separator}{text}")
        separator = ",\n"
    conversations_file.write("]\n" if separator != "[" else "[]\n")
  for table in tables.values():
    table.close()
  summary = counts.summary(store.spent_by_all(), prices)
  text = json.dumps(summary, indent=1, ensure_ascii=False)
  write_file(folder / "summary.json", text)
  _draw(folder, summary)
  write_file(folder / "README.md", card(summary, options))
  return summary


def is_whole(summary: Mapping[str, Any]) -> bool:
  """Returns whether all videos are done or dropped."""
  videos = summary["videos"]
  return videos["done"] + videos["dropped"] == videos["all"]


def table(summary: Mapping[str, Any], out: str) -> str:
  """Formats what a construction returned as lines of text.

  Args:
    summary: of the dataset, with `ended` and `failures`.
    out: folder of the dataset.
  """
  videos, kept = summary["videos"], summary["kept"]
  lines = []
  if summary["failures"]:
    listed = [
      f"{count:,} {kind}" for kind, count in summary["failures"].items()
    ]
    lines.append(f"calls that failed or could not be used: {', '.join(listed)}")
  lines.append(
    f"{videos['done']:,} of {videos['all']:,} videos in {out},"
    f" {videos['dropped']:,} dropped, {videos['failed']:,} failed"
    + (f", {videos['partial']:,} in part" if videos["partial"] else "")
    + ";"
    f" {kept['questions']:,} questions in {kept['conversations']:,}"
    f" conversations, {sum(summary['questions_dropped'].values()):,} dropped"
  )
  for title, counts in (
    ("videos left out", summary["videos_left_out"]),
    ("questions dropped", summary["questions_dropped"]),
    ("answers given up", summary["answers_unusable"]),
  ):
    for why, count in counts.items():
      example = summary["examples"].get(why, "")
      such = f" ({example[:160]})" if example else ""
      lines.append(f"  {count:>7,} {title}: {why}{such}")
  if summary["ended"]:
    lines.append(summary["ended"])
  elif not is_whole(summary) and not videos["failed"] + videos["partial"]:
    lines.append("the rest is the other workers'; the last to end has it all")
  return "\n".join(lines)


def _line(value: Mapping[str, Any]) -> str:
  return json.dumps(value, ensure_ascii=False) + "\n"


class _Table:
  """Writes a parquet file row by row, and gives it its name in the end."""

  def __init__(self, path: pathlib.Path, columns: Mapping[str, Any]):
    self._schema = pyarrow.schema(list(columns.items()))
    self._replacing = replace_file(path)
    partial = self._replacing.__enter__()
    self._file = pyarrow.parquet.ParquetWriter(partial, self._schema)
    self._rows: list[dict[str, Any]] = []

  def add(self, row: dict[str, Any]) -> None:
    """Adds a row."""
    self._rows.append(row)
    if len(self._rows) == _ROWS:
      self._flush()

  def _flush(self) -> None:
    self._file.write_table(
      pyarrow.Table.from_pylist(self._rows, schema=self._schema)
    )
    self._rows = []

  def close(self) -> None:
    """Writes the rest, and renames the file."""
    self._flush()
    self._file.close()
    self._replacing.__exit__(None, None, None)


def _write_tables(
  tables: Mapping[str, _Table], name: str, duration: float, result: Any
) -> None:
  """Adds a video's rows to the tables."""
  for row in _question_rows(name, duration, result["questions"]):
    tables[QUESTIONS].add(row)
  for clip in result["captions"]:
    tables["captions.parquet"].add(
      {
        "video": name,
        "start": clip["start"],
        "end": clip["end"],
        **clip["aspects"],
      }
    )
  for event in result["events"]:
    tables["events.parquet"].add({"video": name, **event})


def _question_rows(
  name: str, duration: float, questions: Any
) -> Iterator[dict[str, Any]]:
  """Yields the rows of the question table about one video."""
  for item in questions:
    yield {
      "video": name,
      "question": item["question"],
      "answer": item["answer"],
      "options": item["options"],
      "topic": item["topic"],
      "task": item["task"],
      "format": item["format"],
      "data_source": source_of(name),
      "duration": duration,
      "answered_blind": item["blind"],
    }


def _records(
  name: str, duration: float, questions: Any
) -> Iterator[dict[str, Any]]:
  """Yields the conversations that `prepare` would make of the same rows."""
  rows = list(_question_rows(name, duration, questions))
  if not rows:
    return
  columns = question_tables.find_columns(list(rows[0]), {}, QUESTIONS)
  read = [
    question_tables.read_row(row, columns) | {"where": ""} for row in rows
  ]
  for _, record in question_tables.conversations(read):
    yield record


class _Counts:
  """Counts what the dataset holds."""

  def __init__(self, names: Collection[str]):
    """Counts nothing yet.

    Args:
      names: of the videos that there are.
    """
    self._names = set(names)
    self._others = 0
    self._states: collections.Counter[str] = collections.Counter()
    self._reasons: collections.Counter[str] = collections.Counter()
    self._examples: dict[str, str] = {}
    self._dropped: collections.Counter[str] = collections.Counter()
    self._unusable: collections.Counter[str] = collections.Counter()
    self._by: dict[str, collections.Counter[str]] = {
      name: collections.Counter() for name in ("topic", "task", "format")
    }
    self._topic_of: dict[str, str] = {}
    self._sources: dict[str, dict[str, Any]] = {}
    self._bins: collections.Counter[int] = collections.Counter()
    self._letters: collections.Counter[str] = collections.Counter()
    self._numbers: collections.Counter[str] = collections.Counter()
    self._hours = 0.0

  def add(
    self, name: str, state: str, duration: float, result: dict[str, Any]
  ) -> None:
    """Counts one video."""
    if name in self._names:
      self._states[state] += 1
    else:
      self._others += state in ("done", "partial")
    if "kind" in result:
      self._reasons[result["kind"]] += 1
      self._examples.setdefault(result["kind"], result["reason"])
    self._dropped.update(item["reason"] for item in result.get("dropped", ()))
    self._unusable.update(item["kind"] for item in result.get("unusable", ()))
    self._numbers["clips"] += len(result.get("captions", ()))
    if state not in ("done", "partial"):
      return
    self._numbers["videos"] += 1
    questions = result["questions"]
    self._hours += duration / 3600
    self._numbers["events"] += len(result["events"])
    self._numbers["questions"] += len(questions)
    count = -(-len(questions) // question_tables.TURNS)
    self._numbers["conversations"] += count
    self._numbers["answered blind"] += sum(item["blind"] for item in questions)
    source = self._sources.setdefault(
      source_of(name), {"videos": 0, "conversations": 0}
    )
    source["videos"] += 1
    source["conversations"] += count
    self._bins[int(duration // (60 * dataset_plots.BIN))] += 1
    for item in questions:
      for key, counter in self._by.items():
        counter[item[key]] += 1
      self._topic_of[item["task"]] = item["topic"]
      if item["options"]:
        self._letters["ABCD"[item["options"].index(item["answer"])]] += 1

  def summary(
    self, spent: Mapping[tuple[str, str], Spent], prices: Prices
  ) -> dict[str, Any]:
    """Returns all numbers as JSON values."""
    return {
      "videos": {
        "all": len(self._names),
        "done": self._states["done"],
        "partial": self._states["partial"],
        "dropped": self._states["dropped"],
        "failed": self._states["failed"],
        "of earlier starts": self._others,
      },
      "kept": {
        "videos": self._numbers["videos"],
        "hours": round(self._hours, 3),
        "questions": self._numbers["questions"],
        "conversations": self._numbers["conversations"],
        "videos_of_unknown_duration": 0,
      },
      "clips": self._numbers["clips"],
      "events": self._numbers["events"],
      "answered_blind": self._numbers["answered blind"],
      "videos_left_out": dict(self._reasons.most_common()),
      "examples": self._examples,
      "questions_dropped": dict(self._dropped.most_common()),
      "answers_unusable": dict(self._unusable.most_common()),
      "topics": dict(self._by["topic"].most_common()),
      "tasks": dict(self._by["task"].most_common()),
      "formats": dict(self._by["format"].most_common()),
      "letters": dict(sorted(self._letters.items())),
      "topic_of_task": self._topic_of,
      "sources": self._sources,
      "videos_per_5_minutes": [
        self._bins[i] for i in range(max(self._bins, default=-1) + 1)
      ],
      "calls": [
        {
          "stage": stage,
          "model": model,
          "calls": each.calls,
          "tokens_in": each.tokens_in,
          "tokens_out": each.tokens_out,
          "dollars": round(prices.cost(stage, each), 4),
        }
        for (stage, model), each in sorted(
          spent.items(), key=lambda item: STAGES.index(item[0][0])
        )
      ],
    }


def _draw(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
  """Draws the plots that `prepare` draws, with the paper's shares."""
  if summary["kept"]["questions"]:
    dataset_plots.draw_plots(folder, dict(summary), PAPER)


def card(summary: Mapping[str, Any], options: Options) -> str:
  """Returns the dataset card, in the form that the Hugging Face hub reads."""
  kept, videos = summary["kept"], summary["videos"]
  models = {role: model.name for role, model in options.models.items()}
  lines = [
    "---",
    "task_categories: [video-text-to-text, visual-question-answering]",
    "language: [en]",
    "tags: [long-video, video-question-answering]",
    "configs:",
    "- config_name: questions",
    f"  data_files: {QUESTIONS}",
    "- config_name: captions",
    "  data_files: captions.parquet",
    "- config_name: events",
    "  data_files: events.parquet",
    "---",
    "",
    "# Questions about long videos",
    "",
    f"{kept['questions']:,} questions about {kept['videos']:,} videos of"
    f" {kept['hours']:,.1f} hours, written by language models from captions of"
    " the videos, in VideoMarathon's format. No human has checked them.",
    "",
    f"Of {videos['all']:,} videos {videos['done'] + videos['partial']:,} are in"
    f" the dataset and {videos['dropped']:,} were left out"
    f" ({_listed(summary['videos_left_out'])}).",
    "",
    "| file | what it holds |",
    "|---|---|",
    f"| `{CONVERSATIONS}` | {kept['conversations']:,} conversations of up to"
    f" {question_tables.TURNS} questions |",
    f"| `{QUESTIONS}` | the same questions, one a row |",
    f"| `captions.parquet` | {summary['clips']:,} captions of clips of"
    f" {options.clip.seconds:g} s |",
    f"| `events.parquet` | {summary['events']:,} events with descriptions |",
    "| `dropped.jsonl` | questions that a check left out, with the reason |",
    "| `videos.jsonl` | each video, and answers about it that were unusable |",
    "",
    "`python -m hourjax.prepare` reads either of the first two.",
    "",
    "## How it was made",
    "",
    f"- Captions: {models['captioner']}, on frames of"
    f" {options.clip.size} pixels, {options.clip.rate:g} a second.",
    f"- Events, descriptions, questions: {models['writer']};"
    f" {options.count} questions for each task and format.",
    f"- Checks ({', '.join(options.checks) or 'none'}): judge"
    f" {models['judge']}. A multiple-choice question was"
    f" {'marked' if options.mark else 'dropped'} that {models['writer']}"
    f" answered {options.blind_tries} times of {options.blind_tries} without"
    " captions.",
    "",
    "| dropped because | questions |",
    "|---|---|",
    *(
      f"| {reason} | {count:,} |"
      for reason, count in summary["questions_dropped"].items()
    ),
    "",
    "| stage | model | calls | tokens in | tokens out | $ |",
    "|---|---|---|---|---|---|",
    *(
      f"| {c['stage']} | {c['model']} | {c['calls']:,} | {c['tokens_in']:,} |"
      f" {c['tokens_out']:,} | {c['dollars']:,.2f} |"
      for c in summary["calls"]
    ),
    "",
  ]
  return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
  """Returns counts as words."""
  found = [f"{count:,}: {reason}" for reason, count in counts.items()]
  return "; ".join(found) or "none"
