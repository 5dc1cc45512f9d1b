import re

import pytest

from hourjax.errors import UserError
from hourjax.evaluation import benchmarks
from hourjax.evaluation.parsing import parse
from tests.evaluation.benchmarks import layouts
from tests.evaluation.benchmarks.layouts import TEMPCOMPASS

PROMPTS = {
  "multi-choice": """\
What is the man doing in the video?
A. dunking a basketball
B. dribbling a basketball
C. passing a basketball
Please directly give the best option:""",
  "yes_no": "Is the man dunking?\nPlease answer yes or no:",
  "caption_matching": """\
Which caption matches the video better?
Caption A: A man is passing.
Caption B: A man is dunking.
Please directly give the best option:""",
}


def _read(root, form="caption_matching", **change):
  items = [TEMPCOMPASS[form] | change]
  layouts.write_json(
    root / f"questions/{form}.json", {"1034419625": {"action": items}}
  )
  return benchmarks.read("tempcompass", root)


def _all(root):
  for form in TEMPCOMPASS:
    _read(root, form)
  return benchmarks.read("tempcompass", root)


def test_formats(tmp_path):
  layouts.touch(tmp_path, "videos/1034419625.mp4")
  loaded = _all(tmp_path)
  assert loaded.notes == ()
  assert [q.prompt for q in loaded.questions] == list(PROMPTS.values())
  assert [q.id for q in loaded.questions] == [
    f"{form}/1034419625/action/0" for form in PROMPTS
  ]
  assert {q.video for q in loaded.questions} == {"1034419625.mp4"}
  assert {q.tasks for q in loaded.questions} == {("action",)}
  choice, yes_no, match = loaded.questions
  assert (choice.kind, choice.expected) == ("choice", "A")
  assert (yes_no.kind, yes_no.expected) == ("yes_no", "yes")
  assert (match.kind, match.expected) == ("match", "2")
  assert choice.options[2] == "passing a basketball"
  assert match.options == ("A man is passing.", "A man is dunking.")
  assert [q.chance for q in loaded.questions] == [1 / 3, 0.5, 0.5]
  assert [q.extra["format"] for q in loaded.questions] == [
    "multi_choice",
    "yes_no",
    "caption_matching",
  ]


def test_the_published_answers_are_right(tmp_path):
  for question, item in zip(_all(tmp_path).questions, TEMPCOMPASS.values()):
    assert parse(item["answer"], question) == question.expected


def test_tables(tmp_path):
  for form, item in TEMPCOMPASS.items():
    row = item | {"video_id": "1034419625", "dim": "action"}
    layouts.write_parquet(tmp_path / f"{form}/test-00000.parquet", [row])
  row = {"video_id": "1", "dim": "x", "question": "Say.", "answer": ""}
  layouts.write_parquet(
    tmp_path / "captioning/test-00000.parquet", [row | {"mc_answer": "A"}]
  )
  loaded = benchmarks.read("tempcompass", tmp_path)
  assert loaded.questions == _all(tmp_path / "json").questions


def test_numbered_options(tmp_path):
  loaded = _read(
    tmp_path,
    question="Which description is a more suitable match for the video?\n"
    "Option 1: From here: a man.\nOption 2: A dog.",
    answer="Option 1: From here: a man.",
  )
  (question,) = loaded.questions
  assert question.expected == "1"
  assert question.options == ("From here: a man.", "A dog.")
  assert parse("2", question) == "2"
  assert parse("B", question) is None


def test_questions_of_an_aspect_are_counted(tmp_path):
  items = [TEMPCOMPASS["yes_no"]] * 2
  layouts.write_json(
    tmp_path / "questions/yes_no.json",
    {"1": {"action": items, "speed": items}, "2": {"action": items}},
  )
  loaded = benchmarks.read("tempcompass", tmp_path)
  assert [q.id for q in loaded.questions] == [
    f"yes_no/{part}/{i}"
    for part in ("1/action", "1/speed", "2/action")
    for i in (0, 1)
  ]


@pytest.mark.parametrize(
  ("form", "change", "message"),
  [
    ("multi-choice", {"answer": "D. x"}, r"'D. x', but there are 3 options"),
    ("multi-choice", {"question": "What?"}, r"no options below.*'What\?'"),
    ("yes_no", {"answer": "maybe"}, r"'maybe', expected yes or no"),
    ("yes_no", {"question": ""}, r"question is empty"),
    ("caption_matching", {"answer": "Caption C: x"}, r"Caption A, Caption B"),
    ("caption_matching", {"question": "Which?"}, r"no options"),
  ],
)
def test_questions_that_cannot_be_scored(form, change, message, tmp_path):
  name = f"question {form}/1034419625/action/0"
  with pytest.raises(UserError, match=rf"{name}: .*{message}"):
    _read(tmp_path, form, **change)


def test_a_file_of_no_format(tmp_path):
  path = layouts.write_json(
    tmp_path / "mine.json", {"1": {"action": [TEMPCOMPASS["yes_no"]]}}
  )
  with pytest.raises(UserError, match=r"mine\.json.*yes_no"):
    benchmarks.read("tempcompass", path)


@pytest.mark.parametrize("aspects", [3, {"action": 3}])
def test_a_video_without_aspects(aspects, tmp_path):
  good = {"action": [TEMPCOMPASS["yes_no"]]}
  layouts.write_json(
    tmp_path / "questions/yes_no.json", {"1": good, "2": aspects}
  )
  loaded = benchmarks.read("tempcompass", tmp_path)
  assert [q.id for q in loaded.questions] == ["yes_no/1/action/0"]
  (lost,) = loaded.left_out
  assert re.search(r"video 2.* is 3, expected", lost.reason)
