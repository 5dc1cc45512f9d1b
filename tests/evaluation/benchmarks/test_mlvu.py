import pytest

from hourjax.errors import UserError
from hourjax.evaluation import benchmarks
from hourjax.evaluation.scoring import is_right
from tests.evaluation.benchmarks import layouts
from tests.evaluation.benchmarks.layouts import MLVU

PROMPT = """\
What color is the main male character in the video?
(A) Yellow
(B) Red
(C) Green
(D) Blue
Only give the best option.
Best option: ("""


def _read(root, *rows, task="1_plotQA"):
  layouts.write_json(root / f"json/{task}.json", rows or [MLVU])
  return benchmarks.read("mlvu", root)


def test_question(tmp_path):
  layouts.touch(tmp_path, "video/1_plotQA/movie101_66.mp4")
  loaded = _read(tmp_path)
  (question,) = loaded.questions
  assert question.prompt == PROMPT
  assert question.id == "1_plotQA/0"
  assert question.video == "1_plotQA/movie101_66.mp4"
  assert loaded.videos == tmp_path / "video"
  assert question.expected == "A"
  assert question.options == ("Yellow", "Red", "Green", "Blue")
  assert question.tasks == ("plotQA",)
  assert question.duration == "0-5 min"
  assert question.chance == 0.25


def test_tasks_of_a_download(tmp_path):
  """Multiple-choice tasks by number; the two of free text are left out."""
  root = tmp_path / "MLVU"
  for task in ("7_topic_reasoning", "2_needle", "1_plotQA"):
    layouts.write_json(root / f"json/{task}.json", [MLVU, MLVU])
  summary = {"video": "a.mp4", "question": "Sum up.", "answer": "A man."}
  layouts.write_json(root / "json/9_summary.json", [summary])
  layouts.touch(root, "video/2_needle/movie101_66.mp4")
  loaded = benchmarks.read("mlvu", tmp_path)
  assert [q.id for q in loaded.questions] == [
    f"{task}/{i}"
    for task in ("1_plotQA", "2_needle", "7_topic_reasoning")
    for i in (0, 1)
  ]
  assert loaded.videos == root / "video"
  (note,) = loaded.notes
  assert "3_ego" in note and "1_plotQA" not in note and "9_" not in note


def test_folders_without_numbers(tmp_path):
  layouts.touch(tmp_path, "video/plotQA/movie101_66.mp4")
  (question,) = _read(tmp_path).questions
  assert question.video == "plotQA/movie101_66.mp4"


def test_a_name_in_the_folder_of_another_task(tmp_path):
  """Tasks have other videos of the same name; the wrong one is not asked."""
  for folder in ("9_summary", "count", "4_count"):
    layouts.touch(tmp_path, f"video/{folder}/movie101_66.mp4")
    (question,) = _read(tmp_path).questions
    assert question.video == "1_plotQA/movie101_66.mp4"  # missing
    (tmp_path / f"video/{folder}/movie101_66.mp4").unlink()
  names = ("plotQA", "count")
  layouts.touch(tmp_path, *(f"video/{n}/movie101_66.mp4" for n in names))
  assert _read(tmp_path).questions[0].video == "plotQA/movie101_66.mp4"


def test_a_name_in_two_folders(tmp_path):
  layouts.touch(
    tmp_path, "video/old/movie101_66.mp4", "video/b/movie101_66.mp4"
  )
  message = r"movie101_66.mp4 is asked .* b/movie.* and old/movie.* leave one"
  with pytest.raises(UserError, match=message):
    _read(tmp_path)
  (tmp_path / "video/old/movie101_66.mp4").unlink()
  assert _read(tmp_path).questions[0].video == "b/movie101_66.mp4"


def test_table(tmp_path):
  row = {
    "video_name": "movie101_66.mp4",
    "duration": 246.0,
    "question": PROMPT.rsplit("\n", 2)[0],
    "candidates": MLVU["candidates"],
    "answer": "A",
    "task_type": "plotQA",
  }
  layouts.write_parquet(tmp_path / "mlvu/test-00000-of-00001.parquet", [row])
  layouts.touch(tmp_path, "video/1_plotQA/movie101_66.mp4")
  (question,) = benchmarks.read("mlvu", tmp_path).questions
  (json_question,) = _read(tmp_path / "json").questions
  assert question.prompt == json_question.prompt
  assert question.expected == "A"
  assert question.video == "1_plotQA/movie101_66.mp4"
  assert question.id == "test-00000-of-00001/0"
  layouts.touch(tmp_path, "video/2_needle/movie101_66.mp4")
  (question,) = benchmarks.read("mlvu", tmp_path).questions
  assert question.video == "1_plotQA/movie101_66.mp4"
  table = tmp_path / "mlvu/test-00000-of-00001.parquet"
  layouts.write_parquet(table, [row | {"task_type": "findNeedle"}])
  (question,) = benchmarks.read("mlvu", tmp_path).questions
  assert question.video == "2_needle/movie101_66.mp4"


def test_table_answers_are_letters(tmp_path):
  row = {
    "video_name": "a.mp4",
    "question": "Which letter?\n(A) B\n(B) A",
    "candidates": ["B", "A"],
    "answer": "A",
    "task_type": "plotQA",
  }
  layouts.write_parquet(tmp_path / "test-0.parquet", [row])
  (question,) = benchmarks.read("mlvu", tmp_path).questions
  assert question.expected == "A"
  assert question.prompt.startswith("Which letter?\n(A) B\n(B) A\nOnly")


def test_answers_are_texts_of_options(tmp_path):
  row = MLVU | {"candidates": ["B", "A", "3", "5"], "answer": "A"}
  assert _read(tmp_path, row).questions[0].expected == "B"
  row = MLVU | {"candidates": [3, 5, 7, 9], "answer": 5}
  assert _read(tmp_path, row).questions[0].expected == "B"


@pytest.mark.parametrize(
  ("seconds", "duration"),
  [(300, "0-5 min"), (301, "5-10 min"), (4000, "60-120 min"),
   (9000, "120-240 min"), (30000, "over 480 min"), (None, "")],
)  # fmt: skip
def test_durations(seconds, duration, tmp_path):
  loaded = _read(tmp_path, MLVU | {"duration": seconds})
  assert loaded.questions[0].duration == duration


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"answer": None}, r"1_plotQA/0: has no answer.*MLVU-Test"),
    ({"candidates": []}, r"1_plotQA/0: candidates is \[\]"),
    ({"video": ""}, r"1_plotQA/0: video is empty"),
  ],
)
def test_questions_that_cannot_be_asked(change, message, tmp_path):
  with pytest.raises(UserError, match=message):
    _read(tmp_path, MLVU | change)


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    ({"answer": "Pink"}, ""),
    ({"answer": "E"}, ""),
    ({"answer": None}, ""),
    ({"answer": "Yellow "}, "A"),
    ({"candidates": ["Yellow", "", "Green", "Blue"]}, "A"),
    ({"candidates": ["Yellow", None, "Green", "Blue"]}, "A"),
    ({"question": ""}, "A"),
    ({"question": "", "candidates": [""] * 4, "answer": ""}, "D"),
  ],
)
def test_rows_that_the_authors_ask_all_the_same(change, expected, tmp_path):
  """Their code takes the last option that is the answer, or none."""
  loaded = _read(tmp_path, MLVU, MLVU | change)
  _, question = loaded.questions
  options = (MLVU | change)["candidates"]
  shown = "".join(f"({a}) {o or ''}\n" for a, o in zip("ABCD", options))
  assert question.prompt == (
    f"{(MLVU | change)['question']}\n{shown}Only give the best option.\n"
    "Best option: ("
  )
  assert question.expected == expected
  assert question.chance == (0.25 if expected else 0)
  assert loaded.left_out == ()
  asked = [note for note in loaded.notes if "no right option" in note]
  assert len(asked) == (not expected)
  for letter in "ABCD":
    assert is_right(letter, question) == (letter == expected)


def test_an_answer_that_stands_twice(tmp_path):
  row = MLVU | {"candidates": ["Red", "Yellow", "Blue", "Yellow"]}
  (question,) = _read(tmp_path, row).questions
  right = [letter for letter in "ABCD" if is_right(letter, question)]
  assert right == ["B", "D"] and question.chance == 0.5


def test_the_authors_file_of_the_test_set(tmp_path):
  row = MLVU | {
    "video": "test_AR-1.mp4",
    "question_type": "anomaly_reco",
    "question_id": "AR_0",
    "candidates": ["Yellow", "Red", "Green", "Blue", "Black", "White"],
    "answer": "White",
  }
  unanswered = {k: v for k, v in row.items() if k != "answer"}
  questions = tmp_path / "test_multi_choice_tasks.json"
  layouts.write_json(questions, [unanswered])
  message = r"has no answer.*test-ground-truth/test_mcq_gt\.json"
  with pytest.raises(UserError, match=message):
    benchmarks.read("mlvu", tmp_path)
  layouts.write_json(tmp_path / "test-ground-truth/test_mcq_gt.json", [row])
  layouts.touch(tmp_path, "MLVU_Test/video/test_AR-1.mp4")
  loaded = benchmarks.read("mlvu", tmp_path)
  (question,) = loaded.questions
  assert question.id == "AR_0" and question.expected == "F"
  assert question.tasks == ("anomaly_reco",)
  assert loaded.videos / question.video == (
    tmp_path / "MLVU_Test/video/test_AR-1.mp4"
  )


@pytest.mark.parametrize(
  "folder", ["json", "data", "MLVU/json", "MLVU/data", "."]
)
def test_where_the_authors_files_lie(folder, tmp_path):
  layouts.write_json(tmp_path / folder / "1_plotQA.json", [MLVU])
  layouts.touch(tmp_path, "MLVU/video/1_plotQA/movie101_66.mp4")
  loaded = benchmarks.read("mlvu", tmp_path)
  (question,) = loaded.questions
  assert question.prompt == PROMPT
  assert (loaded.videos / question.video).is_file()
