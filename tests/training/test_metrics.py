import json
import math

import pytest

from hourjax import jsonl
from hourjax.training.metric_writer import MetricsFile, read_curve, read_metrics


def _write(workdir, start, steps):
  metrics = MetricsFile(workdir, start=start)
  for step in steps:
    metrics.write(step, {"loss": step / 2})
  metrics.close()


def _steps(workdir):
  return [row["step"] for row in read_metrics(workdir)]


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
  _write(tmp_path, 0, [1, 10, 20, 30])
  _write(tmp_path, 20, [])
  assert _steps(tmp_path) == [1, 10, 20]
  _write(tmp_path, 20, [30])
  assert _steps(tmp_path) == [1, 10, 20, 30]
  assert read_metrics(tmp_path)[-1] == {"step": 30, "loss": 15.0}


def test_a_torn_line_is_dropped(tmp_path):
  _write(tmp_path, 0, [1, 2])
  path = tmp_path / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 3, "lo')
  assert _steps(tmp_path) == [1, 2]
  _write(tmp_path, 2, [3])
  assert [json.loads(x)["step"] for x in path.open()] == [1, 2, 3]


def test_a_kill_at_the_start_loses_nothing(tmp_path, monkeypatch):
  """The old lines stay until the new file is whole."""
  _write(tmp_path, 0, [1, 2])
  with monkeypatch.context() as patch:
    patch.setattr(jsonl.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      MetricsFile(tmp_path, start=1)
  assert _steps(tmp_path) == [1, 2]


def test_a_line_is_there_at_once(tmp_path):
  metrics = MetricsFile(tmp_path, start=0)
  metrics.write(1, {"loss": 0.5})
  assert _steps(tmp_path) == [1]
  metrics.close()


def test_numbers_that_are_not_finite_are_json(tmp_path):
  metrics = MetricsFile(tmp_path, start=0)
  metrics.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
  metrics.close()
  text = (tmp_path / "metrics.jsonl").read_text()

  def refuse(constant):
    raise ValueError(f"{constant} is no JSON")

  row = json.loads(text, parse_constant=refuse)
  assert row["a"] == "NaN" and row["c"] == "-Infinity"
  (row,) = read_metrics(tmp_path)
  assert math.isnan(row["a"])
  assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 1.5)
  # They are kept by a restart.
  MetricsFile(tmp_path, start=1).close()
  assert (tmp_path / "metrics.jsonl").read_text() == text


def test_the_curve_goes_on_from_the_run_before(tmp_path):
  for name, before in [("one", ""), ("two", str(tmp_path / "one"))]:
    (tmp_path / name).mkdir()
    _write(tmp_path / name, 0, [1, 2])
    config = json.dumps({"init": before})
    (tmp_path / name / "config.json").write_text(config)
  rows = read_curve(tmp_path / "two")
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert [row["loss"] for row in rows] == [0.5, 1.0, 0.5, 1.0]
