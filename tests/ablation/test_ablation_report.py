"""Means, intervals and directions of a table, against scipy and by hand."""

import json
import pathlib

import pytest
from scipy import stats

from configs import demo
from hourjax.ablation import report
from hourjax.ablation.plan import Job, Training
from hourjax.ablation.report import Result, collect, estimate
from hourjax.ablation.tables import TABLES, Row, Table
from hourjax.training.config import build_experiment

DEMO = demo.get_config("stage=3").to_dict()
TABLE = Table(
  "Table 0",
  (
    Row("usual", {}, (50.0, 40.0)),
    Row("worse", {}, (49.0, 39.0)),
    Row("better", {}, (50.5, 40.0)),
    Row("drawn", {}, direction=-1),
    Row("not known", {}),
  ),
  default="usual",
  columns=("A", "B"),
)
VALUES = {
  "usual": (0.5, 0.6, 0.7),
  "worse": (0.3, 0.41, 0.5),
  "better": (0.4, 0.7, 0.6),
  "drawn": (0.6, 0.72, 0.79),
  "not known": (0.1, 0.2, 0.3),
}
CONFIG = {
  "data": {"dataset": "data"},
  "init": "work/stage1",
  "steps": 1200,
  "epochs": 1.0,
}


def _result(accuracy, **changes):
  given = {
    "config": {},
    "questions": "x",
    "accuracy": accuracy,
    "count": 80,
    "chance": 0.25,
    "left_out": 0,
    "by_task": {},
    "seconds": 1.0,
  }
  return Result(**{**given, **changes})


def _collected(seeds=3):
  runs = [
    (_job(row, seed), _result(VALUES[row.label][seed]))
    for seed in range(seeds)
    for row in TABLE.rows
  ]
  return collect(TABLE, runs, CONFIG, "records")


def _job(row, seed=0):
  """A run of which only the row and the seed matter here."""
  training = Training("x", pathlib.Path("x"), build_experiment(DEMO))
  return Job(row, seed, (), training)


@pytest.mark.parametrize("values", [[1, 2, 3], [50.0, 51.5], [3, 3, 4, 9, 1]])
def test_interval(values):
  mean, margin, count = estimate(values)
  spread = stats.sem(values)
  low, high = stats.t.interval(0.95, len(values) - 1, mean, spread)
  assert (mean - margin, mean + margin) == pytest.approx((low, high))
  assert count == len(values)


def test_one_seed_has_no_interval():
  assert estimate([4.0]) == (4.0, None, 1)


def test_directions():
  lines = {line.row.label: line for line in _collected().lines}
  usual = lines["usual"]
  assert usual.accuracy.mean == pytest.approx(60)
  assert usual.difference is usual.agrees is None
  worse = lines["worse"]
  assert worse.difference.mean == pytest.approx(-59 / 3)
  assert worse.paper_difference == -1 and worse.agrees and worse.is_clear
  # Paired by seed: -10, +10, -10.
  better = lines["better"]
  assert better.difference.mean == pytest.approx(-10 / 3)
  assert better.paper_difference == 0.25
  assert better.agrees is False and not better.is_clear
  assert lines["drawn"].agrees is False and lines["drawn"].is_clear
  assert lines["not known"].agrees is None


def test_a_single_seed_is_never_clear():
  lines = _collected(seeds=1).lines
  assert lines[1].agrees and not lines[1].is_clear


def test_page():
  text = report.page(_collected(), "table0.png")
  assert "n = 3 seeds" in text and "1,200 steps" in text
  assert "records, 80 questions, chance 25.0" in text
  assert "| row | n | accuracy | difference | paper: A | paper: B |" in text
  (row,) = [x for x in text.splitlines() if x.startswith("| worse")]
  assert row.endswith("| 49.0 | 39.0 | -1.0 | yes |")
  assert "| -19.7 ± " in row
  (row,) = [x for x in text.splitlines() if x.startswith("| better")]
  assert row.endswith("| 50.5 | 40.0 | +0.2 | no, unclear |")
  assert "in 1 of 3 rows; in 2 of them" in text
  assert "![Table 0](table0.png)" in text
  widths = {x.count("|") for x in text.splitlines() if x.startswith("|")}
  assert len(widths) == 1


def test_page_without_figures_of_the_paper():
  table = TABLES["figure4"]
  runs = [(_job(row), _result(0.5)) for row in table.rows]
  text = report.page(collect(table, runs, CONFIG, "records"))
  assert "paper:" not in text and "direction agrees" in text


def test_a_task_alone_where_there_is_one():
  table = TABLES["9"]
  own = {"temporal_reasoning": 0.75, "other": 0.1}
  of_tasks = {
    "by_task": own,
    "chance_by_task": {"temporal_reasoning": 0.5, "other": 0.1},
    "count_by_task": {"temporal_reasoning": 39, "other": 41},
  }
  runs = [(_job(row), _result(0.5, **of_tasks)) for row in table.rows]
  found = collect(table, runs, CONFIG, "records")
  assert found.lines[0].accuracy.mean == 75
  assert "39 questions, chance 50.0" in report.page(found)
  assert "on the task 'temporal reasoning' of records" in report.page(found)
  runs[1] = (runs[1][0], _result(0.5))
  found = collect(table, runs, CONFIG, "records")
  assert found.lines[0].accuracy.mean == 50
  assert "80 questions, chance 25.0" in report.page(found)
  assert "The paper's are on temporal reasoning alone" in report.page(found)


@pytest.mark.slow
def test_files(tmp_path):
  names = report.write(_collected(), tmp_path, "0")
  assert names == ["table0.md", "table0.json", "table0.png"]
  assert (tmp_path / "table0.png").read_bytes().startswith(b"\x89PNG")
  data = json.loads((tmp_path / "table0.json").read_text())
  rows = {row["label"]: row for row in data["rows"]}
  assert rows["worse"]["paper"] == {"A": 49.0, "B": 39.0}
  assert rows["worse"]["by_seed"] == {"0": 30.0, "1": 41.0, "2": 50.0}
  assert rows["worse"]["difference"]["count"] == 3
  assert rows["usual"]["difference"] is None


@pytest.mark.slow
def test_picture_shows_rows_intervals_and_the_paper():
  ours, papers = report.figure(_collected()).axes
  assert [t.get_text() for t in ours.get_yticklabels()] == list(VALUES)
  assert len(ours.patches) == 5 and "n = 3, 95 %" in ours.get_xlabel()
  names = [t.get_text() for t in papers.get_legend().get_texts()]
  assert names == ["A", "B"]
  assert papers.lines[0].get_xdata().tolist() == [50.0, 49.0, 50.5]
