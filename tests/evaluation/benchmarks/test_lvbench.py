import dataclasses

import pytest

from hourjax.errors import UserError
from hourjax.evaluation import benchmarks
from tests.evaluation.benchmarks import layouts
from tests.evaluation.benchmarks.layouts import LVBENCH, LVBENCH_QA

PROMPT = """\
What year appears in the opening caption of the video?
(A) 1636
(B) 1366
(C) 1363
(D) 1633
Answer the question with the option letter"""


def _read(root, **change):
  row = LVBENCH | {"qa": [LVBENCH_QA | change]}
  layouts.write_json(root / "video_info.meta.jsonl", [row])
  return benchmarks.read("lvbench", root)


def test_question(tmp_path):
  layouts.touch(tmp_path, "videos/Cm73ma6Ibcs.webm")
  loaded = _read(tmp_path)
  (question,) = loaded.questions
  assert question.prompt == PROMPT
  assert question.id == "Cm73ma6Ibcs/55"
  assert question.video == "Cm73ma6Ibcs.webm"
  assert question.expected == "D"
  assert question.options == ("1636", "1366", "1363", "1633")
  assert question.tasks == ("key information retrieval", "entity recognition")
  assert question.duration == "30-60 min"
  assert question.chance == 0.25
  assert question.extra == {"type": "cartoon"}


@pytest.mark.parametrize("as_text", [False, True])
def test_table(as_text, tmp_path):
  kinds = LVBENCH_QA["question_type"]
  row = LVBENCH_QA | {
    "key": "Cm73ma6Ibcs",
    "type": "cartoon",
    "video_path": "Cm73ma6Ibcs.mp4",
    "question_type": str(kinds) if as_text else kinds,
  }
  path = tmp_path / "table/data/train-00000-of-00001.parquet"
  layouts.write_parquet(path, [row])
  loaded = benchmarks.read("lvbench", tmp_path / "table")
  (told,) = _read(tmp_path).questions  # the table has no lengths
  assert loaded.questions == (dataclasses.replace(told, duration=""),)


def test_one_task_as_text(tmp_path):
  (question,) = _read(tmp_path, question_type="reasoning").questions
  assert question.tasks == ("reasoning",)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"answer": "E"}, r"Cm73ma6Ibcs/55.*'E', but there are 4 options"),
    ({"question": "Which year?"}, r"Cm73ma6Ibcs/55.*no options"),
    ({"question": ""}, r"Cm73ma6Ibcs/55: question is empty"),
  ],
)
def test_questions_that_cannot_be_scored(change, message, tmp_path):
  with pytest.raises(UserError, match=message):
    _read(tmp_path, **change)


def test_video_without_questions(tmp_path):
  row = LVBENCH | {"qa": "none"}
  layouts.write_json(tmp_path / "video_info.meta.jsonl", [row])
  with pytest.raises(UserError, match=r"video Cm73ma6Ibcs: qa is 'none'"):
    benchmarks.read("lvbench", tmp_path)
