"""Numbers, files, page and plots of a report."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from hourjax import plots
from hourjax.errors import UserError
from hourjax.evaluation import report, report_pages
from hourjax.evaluation.scoring import LeftOut, Run, score, wilson
from tests.evaluation.fakes import question

WITH = "with MemAug"
ABOUT = {
  "model": "stage2@240",
  "benchmark": "records",
  "version": "records-1-abc",
  "parser": 1,
  "subtitles": False,
  "videos": "features",
  "frames": "one a second",
  "max_tokens": 16,
}


def _run(answers, needles=True, left_out=(), about=None):
  """Four questions whose answer is B; the last two are for needles."""
  scored = []
  for n, answer in enumerate(answers):
    item = question(
      1,
      id=f"q{n}",
      tasks=(("order", "colour")[n % 2],),
      duration=("00-05 min", "10-20 min", "00-05 min", "30-60 min")[n % 4],
      chance=0.5 if n == 0 else 0.25,
      extra={
        "topic": ("time", "object")[n % 2],
        "format": ("open", "multiple_choice")[n % 2],
        "needle": needles and n >= 2,
        "hidden": needles and n == 3,
      },
    )
    scored.append(score(item, {"answer": answer, "seconds": 2.0}))
  return Run({**ABOUT, **(about or {})}, tuple(scored), tuple(left_out))


@pytest.fixture
def built():
  return report.build({WITH: _run("BBBC"), report.WITHOUT: _run("CBCC")})


def _part(right, count, chance, unreadable=0):
  return {
    "accuracy": right / count,
    "interval": list(wilson(right, count)),
    "chance": chance,
    "count": count,
    "unreadable": unreadable,
  }


def test_numbers(built):
  data = built.data
  assert data["accuracy"] == 0.75 and data["count"] == 4
  assert data["interval"] == list(wilson(3, 4))
  assert data["chance"] == 0.3125
  assert data["needle"] == 0.5 and data["needle_count"] == 2
  assert data["needle_without_memaug"] == 0
  assert data["needle_chance"] == 0.25 and data["needle_hidden"] == 0.5
  assert data["seconds"] == 16
  assert data["by_task"]["order"] == {
    WITH: _part(2, 2, 0.375),
    report.WITHOUT: _part(0, 2, 0.375),
  }
  lengths = ["00-05 min", "10-20 min", "30-60 min"]
  assert list(data["by_duration"]) == lengths
  assert list(data["needle_by_duration"]) == ["00-05 min", "30-60 min"]
  assert data["needle_by_format"]["open"][WITH] == _part(1, 1, 0.25)
  assert data["by_topic"].keys() == {"time", "object"}
  assert data["by_format"].keys() == {"open", "multiple_choice"}
  assert data["compared"][report.WITHOUT]["only_ours"] == 2
  assert data["runs"][WITH]["model"] == "stage2@240"
  assert data["benchmark"] == "records"
  assert data["versions"].keys() >= {"benchmark", "parser", "hourjax", "jax"}


def test_alone_and_without_needles():
  data = report.build({"m": _run("BBBB", needles=False)}).data
  assert data["accuracy"] == 1 and data["compared"] == {}
  for key in ("needle", "needle_chance", "needle_without_memaug"):
    assert data[key] is None
  assert data["needle_count"] == data["needle_hidden"] == 0
  assert data["needle_by_duration"] == data["needle_by_format"] == {}
  assert "needles" not in report_pages.summary(data) + report_pages.table(data)


def test_tasks_count_alike_in_their_mean():
  """One of two and none of one: 1/4, though one of three is right."""
  run = _run("BCC")
  data = report.build({"m": run}).data
  assert data["accuracy"] == 1 / 3
  assert data["runs"]["m"]["mean_of_tasks"] == 0.25
  assert "mean of its 2 tasks 25.0%" in report_pages.summary(data)
  assert "| accuracy, mean of tasks | 25.0% |" in report_pages.page(data)


def test_a_question_counts_in_each_of_its_tasks():
  one, two, three = _run("BBC").scored
  both = dataclasses.replace(
    three, question=dataclasses.replace(three.question, tasks=("a", "order"))
  )
  data = report.build({"m": Run(ABOUT, (one, two, both), ())}).data
  assert data["count"] == 3
  assert {k: v["m"]["count"] for k, v in data["by_task"].items()} == {
    "a": 1,
    "colour": 1,
    "order": 2,
  }
  assert data["runs"]["m"]["mean_of_tasks"] == (0 + 1 + 0.5) / 3


def test_no_tasks():
  scored = _run("B").scored[0]
  item = dataclasses.replace(scored.question, tasks=())
  run = Run(ABOUT, (dataclasses.replace(scored, question=item),), ())
  data = report.build({"m": run}).data
  assert data["runs"]["m"]["mean_of_tasks"] is None
  assert "mean of its" not in report_pages.summary(data)
  assert "| accuracy, mean of tasks |  |" in report_pages.page(data)


def test_nothing_to_report():
  lost = LeftOut("q9", "z.mp4", "z.mp4 is gone")
  with pytest.raises(UserError, match=r"none of the 1 questions .* is gone"):
    report.build({"m": _run("", left_out=[lost])})
  with pytest.raises(UserError, match="asked no question"):
    report.build({"m": _run("")})


def test_written_and_read_again(built, tmp_path):
  names = report.write(built, tmp_path / "out")
  assert sorted(names) == sorted(p.name for p in (tmp_path / "out").iterdir())
  assert sorted(names) == [
    "accuracy_by_duration.png",
    "accuracy_by_task.png",
    "needles_by_duration.png",
    "report.json",
    "report.md",
  ]
  written = json.loads((tmp_path / "out" / "report.json").read_text())
  assert written == built.data
  again = report.load(tmp_path / "out")
  assert again == built and again.names == [WITH, report.WITHOUT]
  assert again.groups("task") == built.data["by_task"]
  assert again.groups("weather") == {}
  page = (tmp_path / "out" / "report.md").read_text()
  for name in names:
    assert (f"![]({name})" in page) == name.endswith(".png")


def test_no_report(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    report.load(tmp_path)
  (tmp_path / "report.json").write_text('{"accuracy": 0.5}')
  with pytest.raises(UserError, match="is no report"):
    report.load(tmp_path)


def test_page(built):
  page = report_pages.page(built.data)
  for part in (
    "# records: with MemAug, without MemAug",
    "| model | stage2@240 | stage2@240 |",
    "| version of questions and prompts | records-1-abc | records-1-abc |",
    "| subtitles | no | no |",
    "accuracy 75.0% [30.1, 95.4] of 4 questions (chance 31.2%)",
    "| order | 2 | 38% | 100% [34, 100] | 0% [0, 66] |",
    "Nothing: all of these questions were asked.",
    "said 'C'\n    read as 'C', expected 'B'",
  ):
    assert part in page
  assert "unreadable answers, counted" not in page
  # Every table has as many cells as its head.
  for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_page_tells_what_is_left_out_and_unreadable():
  lost = [LeftOut(f"x{n}", f"v{n // 3}.mp4", "it | is gone") for n in range(6)]
  run = _run(["B", "C", "mumble | `grumble`", "B"], left_out=lost)
  data = report.build({"m": run}).data
  page = report_pages.page(data)
  assert "10 questions, 4 asked, 6 left out: 2 videos" in page
  assert "- v1.mp4 (3): it \\| is gone" in page
  assert "unreadable answers, counted as wrong: 1" in page
  assert "Examples of unreadable answers" in page
  assert "    said 'mumble | `grumble`'\n    read as nothing" in page
  assert "10 questions, 4 asked" in report_pages.summary(data)


def test_runs_over_different_questions():
  lost = [LeftOut("q3", "v.mp4", "gone")]
  data = report.build({"a": _run("BBBB"), "b": _run("BBC", left_out=lost)}).data
  (line,) = [x for x in report_pages.table(data).splitlines() if "colour" in x]
  assert line.split() == [
    *("colour", "2", "25%", "100%", "[34,", "100]"),
    *("100%", "of", "1", "[21,", "100]"),
  ]
  assert "scored on what they asked" in report_pages.summary(data)
  assert "30-60 min" in report_pages.table(data)


def test_long_prompts_are_cut_in_the_middle():
  item = question(1, prompt="start " + "x" * 5000 + " end")
  run = Run(ABOUT, (score(item, {"answer": "C"}),), ())
  page = report_pages.page(report.build({"m": run}).data)
  assert "    start xxx" in page and "xxx end\n" in page
  assert "[... 3,810 characters ...]" in page and len(page) < 4000


def test_table_and_summary(built):
  (line,) = [x for x in built.table().splitlines() if "order" in x]
  cells = ["order", "2", "38%", "100%", "[34,", "100]", "0%", "[0,", "66]"]
  assert line.split() == cells
  text = built.summary()
  assert text.startswith(
    "records records-1-abc, parser 1\nwith MemAug: stage2@240\n"
  )
  assert "needles  50.0% of 2" in text and "without MemAug 0.0%" in text
  assert "against without MemAug: +50.0 points [" in text
  assert "2 right here alone, 0 there alone" in text


def _inked(figure, tmp_path):
  path = tmp_path / "picture.png"
  path.write_bytes(plots.png(figure))
  pixels = np.asarray(Image.open(path).convert("RGB"))
  assert min(pixels.shape[:2]) > 100
  return (pixels.min(axis=-1) < 200).mean()


def test_figures(built, tmp_path):
  figures = report_pages.figures(built.data)
  assert len(figures) == 3
  curves = {
    name: [{"step": s, "loss": 3.0 / (s + n)} for s in range(1, 20)]
    for n, name in enumerate(built.names)
  }
  for figure in [*figures.values(), report_pages.losses(curves)]:
    assert 0.005 < _inked(figure, tmp_path) < 0.9


def test_needles_by_depth_and_length(tmp_path):
  """Of the first run: a cell for each kind, length and depth that there is."""
  places = [
    ("card", "60-120 min", "0-20 %", "B"),
    ("card", "60-120 min", "0-20 %", "C"),
    ("card", "5-10 min", "80-100 %", "B"),
    ("clip, word", "5-10 min", "20-40 %", "C"),
    (None, "5-10 min", "", "B"),  # one that says neither kind nor depth
  ]
  scored = []
  for kind, length, depth, answer in places:
    extra = {"needle": True, "hidden": True}
    extra |= {"needle_kind": kind, "depth": depth} if kind else {}
    item = question(1, duration=length, chance=0.25, extra=extra)
    scored.append(score(item, {"answer": answer, "seconds": 1.0}))
  built = report.build({"m": Run(ABOUT, tuple(scored), ())})
  grid = built.data["needle_grid"]
  assert list(grid) == ["card", "clip, word"]
  assert list(grid["card"]) == ["5-10 min", "60-120 min"]
  assert grid["card"]["60-120 min"] == {"0-20 %": _part(1, 2, 0.25)}
  assert grid["clip, word"]["5-10 min"]["20-40 %"]["accuracy"] == 0
  figure = report_pages.figures(built.data)["needles_by_depth.png"]
  assert [axes.get_title() for axes in figure.axes] == [
    "card (chance 25%)", "clip, word (chance 25%)"
  ]  # fmt: skip
  card = figure.axes[0]
  assert {text.get_text() for text in card.texts} == {"50%\nof 2", "100%\nof 1"}
  assert card.images[0].get_array().shape == (3, 2)  # depths, lengths
  assert 0.005 < _inked(figure, tmp_path) < 0.9


def test_held_out_answers_are_drawn_beside_the_training_loss(tmp_path):
  rows = [{"step": s, "loss": 3.0 / s} for s in range(1, 20)]
  for row in rows[4::5]:
    row["eval/answer_loss"] = 2 * row["loss"]
  figure = report_pages.losses({"3b": rows, "7b": rows[:4]})
  (axes,) = figure.axes
  lines = {line.get_label(): line.get_xydata() for line in axes.lines}
  assert list(lines) == ["3b", "3b, held-out answers", "7b"]
  assert lines["3b, held-out answers"].tolist() == [
    [s, 6.0 / s] for s in (5, 10, 15)
  ]
  assert 0.005 < _inked(figure, tmp_path) < 0.9


def _texts(figure):
  """Boxes of the labels of groups, in pixels."""
  figure.canvas.draw()
  (axes,) = figure.axes
  return [label.get_window_extent() for label in axes.get_yticklabels()]


@pytest.mark.parametrize(
  ("runs", "count"),
  [
    (1, 1),
    (5, 1),
    (2, 6),
    pytest.param(1, 45, marks=pytest.mark.slow),
    pytest.param(5, 45, marks=pytest.mark.slow),
  ],
)
def test_labels_do_not_collide(runs, count):
  names = [f"a rather long name of task {n} that wraps twice" for n in
           range(count)]  # fmt: skip
  part = _part(1, 3, 0.25)
  groups = {n: {f"model-{r}@200": part for r in range(runs)} for n in names}
  (figure,) = report_pages.figures({"by_task": groups}).values()
  boxes = _texts(figure)
  assert len(boxes) == count
  for above, below in itertools.pairwise(boxes):
    assert above.y0 >= below.y1
  width, height = figure.canvas.get_width_height()
  for box in boxes:
    assert box.x0 >= 0 and box.x1 <= width
    assert box.y0 >= 0 and box.y1 <= height
  legend = figure.legends[0].get_window_extent()
  assert legend.x0 >= 0 and legend.x1 <= width
  assert legend.y1 <= boxes[-1].y0


def test_two_reports_side_by_side(built):
  other = report.build({WITH: _run("CCCC")})
  figure = report_pages.accuracy([built, other], by="duration")
  (axes,) = figure.axes
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  assert labels == [
    "chance", WITH, report.WITHOUT, f"{WITH} (2)"
  ]  # fmt: skip
  bars = {c.get_label(): c for c in axes.containers if c.get_label() in labels}
  widths = [bar.get_width() for bar in bars[WITH]]
  assert widths == [1.0, 1.0, 0.0]
  assert axes.get_title(loc="left") == "Accuracy by length of video"
  with pytest.raises(ValueError, match="by 'weather'"):
    report_pages.accuracy([built], by="weather")
