import pytest

from hourjax.errors import UserError
from hourjax.evaluation import benchmarks
from hourjax.evaluation.parsing import parse
from tests.evaluation.benchmarks import layouts
from tests.evaluation.benchmarks.layouts import VIDEOMME

PROMPT = """\
Select the best answer to the following multiple-choice question based on the \
video. Respond with only the letter (A, B, C, or D) of the correct option.
Which kind of decoration has the largest number?
A. Apples.
B. Candles.
C. Berries.
D. All the same.
The best answer is:"""


def _read(root, rows=(VIDEOMME,), **options):
  layouts.write_parquet(root / "videomme/test-00000-of-00001.parquet", rows)
  return benchmarks.read("videomme", root, **options)


def test_question(tmp_path):
  layouts.touch(tmp_path, "data/fFjv93ACGo8.mp4")
  loaded = _read(tmp_path)
  (question,) = loaded.questions
  assert question.prompt == PROMPT
  assert question.id == "001-1"
  assert question.video == "fFjv93ACGo8.mp4"
  assert loaded.videos == tmp_path / "data"
  assert (question.kind, question.expected) == ("choice", "C")
  assert question.options == (
    "Apples.",
    "Candles.",
    "Berries.",
    "All the same.",
  )
  assert question.tasks == ("Counting Problem",)
  assert question.duration == "short"
  assert question.chance == 0.25
  assert question.extra == {
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
  }
  assert parse("Berries", question) == "C"
  assert loaded.notes == ()


def test_authors_file(tmp_path):
  layouts.write_json(
    tmp_path / "Video-MME.json",
    [
      {
        "video_id": "001",
        "duration_category": "short",
        "video_category": "Knowledge",
        "video_sub_category": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
        "questions": [
          {
            "question_id": f"001-{i}",
            "task_type": "Counting Problem",
            "question": VIDEOMME["question"],
            "choices": VIDEOMME["options"],
            "answer": "C",
          }
          for i in (1, 2, 3)
        ],
      }
    ],
  )
  loaded = benchmarks.read("videomme", tmp_path)
  assert [q.id for q in loaded.questions] == ["001-1", "001-2", "001-3"]
  assert loaded.questions[0] == _read(tmp_path / "table").questions[0]


def test_an_older_table_is_refused(tmp_path):
  row = {
    "id": "001",
    "duration_category": "short",
    "video_category": "Knowledge",
    "video_sub_category": "History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "questions": ["Which?"],
    "answers": ["C"],
  }
  with pytest.raises(UserError, match=r"fFjv93ACGo8: questions is \['Which"):
    _read(tmp_path, [row])


SRT = """\
1
00:00:00,000 --> 00:00:02,500
<font color="white" size=".72c">Hi guys, I'm going to show you</font>

2
00:00:02,500 --> 00:00:05,000
<font color="white" size=".72c">how to prepare a tree.</font>
"""


def test_subtitles(tmp_path):
  path = tmp_path / "subtitle/fFjv93ACGo8.srt"
  path.parent.mkdir()
  path.write_text(SRT)
  other = VIDEOMME | {"videoID": "mute", "question_id": "002-1"}
  loaded = _read(tmp_path, [VIDEOMME, other], subtitles=True)
  spoken, mute = loaded.questions
  assert spoken.prompt == (
    "This video's subtitles are listed below:\n"
    "Hi guys, I'm going to show you\nhow to prepare a tree.\n" + PROMPT
  )
  assert mute.prompt == PROMPT
  assert spoken.extra["subtitles"] == "given"
  assert mute.extra["subtitles"] == "missing"
  assert loaded.notes == (
    "1 of 2 questions are asked without subtitles: their videos have no"
    " subtitle file.",
  )


def test_without_subtitles_none_are_read(tmp_path):
  path = tmp_path / "subtitle/fFjv93ACGo8.srt"
  path.parent.mkdir()
  path.write_text(SRT)
  assert _read(tmp_path).questions[0].prompt == PROMPT


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"answer": "E"}, r"question 001-1.*'E', but there are 4 options, A to D"),
    ({"answer": ""}, r"question 001-1: answer is empty"),
    ({"answer": None}, r"question 001-1: answer is None"),
    ({"question": " \n"}, r"question 001-1: question is empty"),
    ({"options": ["A. Apples."]}, r"question 001-1: options.*2 to 10 options"),
    ({"options": ["A. Apples.", ""]}, r"question 001-1: options\[1\] is empty"),
    ({"question_id": ""}, r"test-00000.*question_id is empty"),
  ],
)
def test_questions_that_cannot_be_scored(change, message, tmp_path):
  with pytest.raises(UserError, match=message):
    _read(tmp_path, [VIDEOMME | change])


def test_options_without_letters_get_them(tmp_path):
  options = ["Apples", "Candles", "Berries", "None"]
  (question,) = _read(tmp_path, [VIDEOMME | {"options": options}]).questions
  assert "\nA. Apples\nB. Candles\nC. Berries\nD. None\n" in question.prompt
  assert question.options == tuple(options)
