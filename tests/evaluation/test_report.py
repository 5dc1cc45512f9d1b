import json

import numpy as np
import pytest
from PIL import Image

from hourjax.evaluation import report
from hourjax.evaluation.scoring import Scored


def _run(rights, needles=True):
  """Four questions, of which the last two are for needles."""
  out = []
  for n, right in enumerate(rights):
    out.append(
      Scored(
        id=str(n),
        task=("order", "colour")[n % 2],
        topic=("time", "object")[n % 2],
        form=("open", "multiple_choice")[n % 2],
        needle=needles and n >= 2,
        hidden=needles and n == 3,
        minutes=(3.0, 20.0, 3.0, 60.0)[n],
        chance=(0.5, 0.25, 0.25, 0.25)[n],
        answer="red",
        expected="red",
        correct=right,
      )
    )
  return out


@pytest.fixture
def built():
  runs = {
    report.WITH: _run([True, True, True, False]),
    report.WITHOUT: _run([False, True, False, False]),
  }
  return report.build_report(runs, 12.5)


def test_numbers(built):
  assert built["accuracy"] == 0.75 and built["count"] == 4
  assert built["chance"] == 0.3125
  assert built["needle"] == 0.5 and built["needle_count"] == 2
  assert built["needle_without_memaug"] == 0
  assert built["needle_chance"] == 0.25 and built["needle_hidden"] == 0.5
  assert built["seconds"] == 12.5
  assert built["by_task"]["order"] == {
    report.WITH: {"accuracy": 1.0, "chance": 0.375, "count": 2},
    report.WITHOUT: {"accuracy": 0.0, "chance": 0.375, "count": 2},
  }
  assert list(built["by_duration"]) == ["00-05 min", "10-20 min", "30-60 min"]
  assert list(built["needle_by_duration"]) == ["00-05 min", "30-60 min"]


def test_without_a_comparison_or_needles():
  alone = report.build_report({report.WITH: _run([True] * 4, False)}, 1.0)
  assert alone["accuracy"] == 1
  for key in ("needle", "needle_chance", "needle_without_memaug"):
    assert alone[key] is None
  assert alone["needle_count"] == alone["needle_hidden"] == 0
  assert "needles" not in report.summary(alone)
  assert "order" in report.table(alone)


def _assert_drawn(path):
  pixels = np.asarray(Image.open(path).convert("RGB"))
  assert min(pixels.shape[:2]) > 100
  inked = (pixels.min(axis=-1) < 200).mean()
  assert 0.005 < inked < 0.9, (path, inked)


def test_written_files(built, tmp_path):
  report.write_report(built, tmp_path / "out")
  written = json.loads((tmp_path / "out" / "report.json").read_text())
  assert written == built
  assert written.keys() >= {
    "accuracy",
    "needle",
    "needle_without_memaug",
    "chance",
    "seconds",
    "by_task",
    "by_duration",
  }
  names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
  assert names == [
    "accuracy_by_duration.png",
    "accuracy_by_task.png",
    "needles_by_duration.png",
  ]
  for name in names:
    _assert_drawn(tmp_path / "out" / name)


def test_report_without_needles_is_written(tmp_path):
  alone = report.build_report({report.WITH: _run([True] * 4, False)}, 1.0)
  report.write_report(alone, tmp_path)
  assert json.loads((tmp_path / "report.json").read_text())["needle"] is None
  assert not (tmp_path / "needles_by_duration.png").exists()


def test_loss_curves(tmp_path):
  curves = {
    name: [{"step": s, "loss": 3.0 / (s + n)} for s in range(1, 20)]
    for n, name in enumerate([report.WITH, report.WITHOUT])
  }
  report.plot_losses(curves, tmp_path / "loss.png")
  _assert_drawn(tmp_path / "loss.png")


def test_table_and_summary(built):
  text = report.table(built)
  (line,) = [x for x in text.splitlines() if x.strip().startswith("order")]
  assert line.split() == ["order", "2", "38%", "100%", "0%"]
  text = report.summary(built)
  assert "accuracy 75.0% of 4 questions (chance 31.2%)" in text
  assert "needles  50.0% of 2" in text and "without MemAug 0.0%" in text
