import pytest

from hourjax.errors import UserError
from hourjax.evaluation import benchmarks
from tests.evaluation.benchmarks import layouts
from tests.evaluation.benchmarks.layouts import LONGVIDEOBENCH

PROMPT = """\
Which subtitles appear with the man on stage?
A. a crown
B. a world of souls
C. captain of the godson
Answer with the option's letter from the given choices directly."""


def _read(root, *rows, **options):
  layouts.write_json(root / "lvb_val.json", rows or [LONGVIDEOBENCH])
  return benchmarks.read("longvideobench", root, **options)


def _table_row(**change):
  row = {k: v for k, v in LONGVIDEOBENCH.items() if k != "candidates"}
  options = [*LONGVIDEOBENCH["candidates"], "N/A", "N/A"]
  return row | {f"option{i}": o for i, o in enumerate(options)} | change


def test_question(tmp_path):
  (question,) = _read(tmp_path).questions
  assert question.prompt == PROMPT
  assert question.id == "86CxyhFV9MI_0"
  assert question.video == "86CxyhFV9MI.mp4"
  assert question.expected == "B"
  assert question.options == tuple(LONGVIDEOBENCH["candidates"])
  assert question.tasks == ("TOS",)
  assert question.duration == "180-600 s"
  assert question.chance == pytest.approx(1 / 3)
  assert question.extra == {
    "topic_category": "NP-News-Programs",
    "level": "L2-Relation",
  }


def test_table(tmp_path):
  layouts.write_parquet(
    tmp_path / "validation-00000-of-00001.parquet", [_table_row()]
  )
  layouts.write_parquet(
    tmp_path / "test-00000-of-00001.parquet", [_table_row(correct_choice=-1)]
  )
  loaded = benchmarks.read("longvideobench", tmp_path)
  assert loaded.questions == _read(tmp_path / "json").questions


@pytest.mark.parametrize(
  ("group", "duration"),
  [(15, "8-15 s"), (60, "15-60 s"), (600, "180-600 s"), (3600, "900-3600 s")],
)
def test_durations(group, duration, tmp_path):
  loaded = _read(tmp_path, LONGVIDEOBENCH | {"duration_group": group})
  assert loaded.questions[0].duration == duration


@pytest.mark.parametrize("choice", [None, -1, "@"])
def test_the_test_split_has_no_answers(choice, tmp_path):
  row = LONGVIDEOBENCH | {"correct_choice": choice}
  layouts.write_json(tmp_path / "lvb_test_wo_gt.json", [row])
  message = r"86CxyhFV9MI_0: correct_choice.*test split.*lvb_val\.json"
  with pytest.raises(UserError, match=message):
    benchmarks.read("longvideobench", tmp_path)


def test_choice_beyond_the_options(tmp_path):
  row = LONGVIDEOBENCH | {"correct_choice": 3}
  with pytest.raises(UserError, match=r"86CxyhFV9MI_0.*'D'.*3 options"):
    _read(tmp_path, row)


# In the clip from 60 s to 250.16 s: the second to the fourth.
SPOKEN = [
  {"start": "00:00:50.000", "end": "00:00:59.900", "line": "too early"},
  {"start": "00:00:59.000", "end": "00:01:02.000", "line": "at the start"},
  {"start": "00:02:00.000", "end": "00:02:01.500", "line": "<i>middle</i>"},
  {"start": "00:04:10.000", "end": "00:04:12.000", "line": "at the end"},
  {"start": "00:04:11.000", "end": "00:04:12.000", "line": "too late"},
]
WHISPERED = [
  {"timestamp": [50.0, 59.9], "text": "too early"},
  {"timestamp": [59.0, 62.0], "text": " at the start"},
  {"timestamp": [120.0, 121.5], "text": " middle"},
  {"timestamp": [250.0, None], "text": " at the end"},
]


@pytest.mark.parametrize("entries", [SPOKEN, WHISPERED])
def test_subtitles_of_the_clip(entries, tmp_path):
  layouts.write_json(tmp_path / "subtitles/86CxyhFV9MI_en.json", entries)
  row = LONGVIDEOBENCH | {"starting_timestamp_for_subtitles": 60}
  loaded = _read(tmp_path, row, subtitles=True)
  assert loaded.questions[0].prompt == (
    "This video's subtitles are listed below:\n"
    "at the start\nmiddle\nat the end\n" + PROMPT
  )
  assert loaded.questions[0].extra["subtitles"] == "given"
  assert loaded.notes == ()


@pytest.mark.parametrize("path", ["86CxyhFV9MI_en.json", None])
def test_without_subtitle_file(path, tmp_path):
  row = LONGVIDEOBENCH | {"subtitle_path": path}
  with pytest.raises(UserError, match="has none for any of the 1 questions"):
    _read(tmp_path, row, subtitles=True)
  layouts.write_json(tmp_path / "subtitles/other.json", SPOKEN)
  other = LONGVIDEOBENCH | {"id": "other", "subtitle_path": "other.json"}
  loaded = _read(tmp_path, row, other, subtitles=True)
  assert loaded.questions[0].prompt == PROMPT
  assert loaded.questions[0].extra["subtitles"] == "missing"
  assert loaded.questions[1].extra["subtitles"] == "given"
  assert len(loaded.notes) == 1


@pytest.mark.parametrize(
  "content",
  [
    {"a": 1},
    [1],
    [{"start": 1}],
    [{}],
    [{"timestamp": [None, 1.0], "text": "x"}],
    [{"timestamp": [1.0], "text": "x"}],
  ],
)
def test_damaged_subtitles(content, tmp_path):
  layouts.write_json(tmp_path / "subtitles/86CxyhFV9MI_en.json", content)
  with pytest.raises(UserError, match=r"MI_en\.json is damaged"):
    _read(tmp_path, subtitles=True)
