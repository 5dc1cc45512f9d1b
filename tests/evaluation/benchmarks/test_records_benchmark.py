import pytest

from hourjax.data.demo.build import RecordWriter
from hourjax.data.demo.script import make_script
from hourjax.errors import UserError
from hourjax.evaluation import benchmarks
from hourjax.evaluation.parsing import parse
from tests.evaluation.benchmarks import layouts
from tests.evaluation.benchmarks.layouts import RECORD


def _read(root, *records, name="test.json"):
  layouts.write_json(root / name, list(records))
  return benchmarks.read("records", root)


def _record(question, answer, **change):
  talk = [
    {"from": "human", "value": f"<image>\n{question}"},
    {"from": "gpt", "value": answer},
  ]
  return RECORD | {"conversations": talk} | change


def test_demo_records(tmp_path):
  """All that the demo knows of its questions is kept."""
  writer = RecordWriter(0, "test")
  scripts = [make_script(0, "test", i, (600, 600)) for i in range(1, 5)]
  raw = [record for script in scripts for record in writer.test(script)]
  loaded = _read(tmp_path, *raw)
  assert len(loaded.questions) == len(raw) > 5
  for question, record in zip(loaded.questions, raw):
    (facts,) = record["questions"]
    asked, answered = (turn["value"] for turn in record["conversations"])
    assert question.id == record["id"]
    assert question.video == record["video"]
    assert "<image>\n" + question.prompt == asked
    assert question.tasks == (facts["task"],)
    assert question.duration == "5-10 min"
    assert question.chance == facts["chance"]
    assert question.extra == {
      "topic": facts["topic"],
      "format": facts["format"],
      "source": "demo",
      "needle": facts["needle"],
      "hidden": bool(facts["dropped"]),
      **_of_needle(facts),
    }
    if facts["letter"]:
      assert question.kind == "choice"
      assert list(question.options) == facts["options"]
    else:
      assert question.kind in ("open", "yes_no")
    assert question.expected == answered
    assert parse(answered, question) == question.expected
  assert {q.kind for q in loaded.questions} == {"choice", "open", "yes_no"}
  assert sum(q.extra["needle"] for q in loaded.questions) == 2 * len(scripts)


def _of_needle(facts):
  """What is kept of a needle in a video of 600 s."""
  if not facts["needle"]:
    return {}
  fifth = facts["seconds"][0] // 120
  depth = f"{20 * fifth}-{20 * fifth + 20} %"
  return {"needle_kind": facts["needle_kind"], "depth": depth}


def test_options_are_found_without_facts(tmp_path):
  (question,) = _read(tmp_path, RECORD).questions
  assert question.prompt == "Which place?\nA. hill\nB. pond\nSay a letter."
  assert (question.kind, question.expected) == ("choice", "B")
  assert question.options == ("hill", "pond")
  assert question.chance == 0.5
  assert question.tasks == ()
  assert question.duration == "10-20 min"
  assert question.extra == {"source": "demo"}


@pytest.mark.parametrize(
  ("asked", "answer", "kind", "expected", "chance"),
  [
    ("Which?\n(A) red\n(B) blue\n(C) grey", "(C)", "choice", "C", 1 / 3),
    ("Which?\nA) red\nB) blue", "B. blue", "choice", "B", 0.5),
    ("Which?\nA. red\nB. blue", "red", "choice", "A", 0.5),
    ("Which?\nA: red\nB: blue", "The answer is A.", "choice", "A", 0.5),
    ("Which?\nA. red\nB. blue", "It is a mix.", "open", "It is a mix.", 0.0),
    ("Is it red?", "Yes.", "yes_no", "yes", 0.5),
    ("Is it red?", "Yes, it is.", "open", "Yes, it is.", 0.0),
    ("Which?", "B", "open", "B", 0.0),
    ("What happens?", "A man runs.", "open", "A man runs.", 0.0),
  ],
)
def test_kinds(asked, answer, kind, expected, chance, tmp_path):
  (question,) = _read(tmp_path, _record(asked, answer)).questions
  assert (question.kind, question.expected) == (kind, expected)
  assert question.chance == pytest.approx(chance)
  assert question.prompt == asked


def test_prepared_records(tmp_path):
  """As `prepare` writes them: a letter, but neither chance nor needle."""
  facts = {"task": "t", "topic": "o", "letter": "B", "options": ["x", "y"]}
  record = _record("Which?\nA. x\nB. y", "B", questions=[facts])
  (question,) = _read(tmp_path, record).questions
  assert (question.kind, question.expected) == ("choice", "B")
  assert question.chance == 0.5
  assert question.tasks == ("t",)
  assert question.extra["topic"] == "o"


def test_facts_without_letter(tmp_path):
  record = _record("Which?\nA. x\nB. y", "B", questions=[{"task": "t"}])
  (question,) = _read(tmp_path, record).questions
  assert (question.kind, question.expected) == ("choice", "B")


def test_each_question_of_a_record(tmp_path):
  """As VideoMarathon has them; each one is asked without the others."""
  talk = [
    *_record("Which?\nA. x\nB. y", "B")["conversations"],
    {"from": "human", "value": "Is it red?"},
    {"from": "gpt", "value": "No"},
  ]
  facts = [{"task": "first"}, {"task": "second"}]
  record = RECORD | {"conversations": talk, "questions": facts}
  one, two = _read(tmp_path, record).questions
  assert (one.id, one.expected, one.tasks) == ("film-00#1", "B", ("first",))
  assert (two.id, two.expected, two.tasks) == ("film-00#2", "no", ("second",))
  assert two.prompt == "Is it red?" and two.video == one.video
  one, two = _read(tmp_path, record | {"questions": [{}]}).questions
  assert one.tasks == two.tasks == ()


def test_one_line_is_no_list_of_options(tmp_path):
  (question,) = _read(
    tmp_path, _record("Who?\nA. Smith is one.", "A")
  ).questions
  assert question.kind == "open"


def test_folder_of_one_file(tmp_path):
  layouts.touch(tmp_path, "videos/film.mp4")
  loaded = _read(tmp_path, RECORD, name="mine.jsonl")
  assert loaded.videos == tmp_path / "videos"
  assert len(loaded.questions) == 1


def test_test_records_come_before_others(tmp_path):
  layouts.write_json(tmp_path / "train.json", [RECORD | {"id": "other"}])
  (question,) = _read(tmp_path, RECORD).questions
  assert question.id == "film-00"


TEXT_ONLY = {
  "id": "film-00",
  "conversations": [
    {"from": "human", "value": "Which?"},
    {"from": "gpt", "value": "red"},
  ],
}
FACTS = {"letter": "C", "options": ["x", "y"]}


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (RECORD | {"conversations": []}, r"1 of 1 records.*damaged.*film-00"),
    (_record("", "red"), r"film-00: the question is empty"),
    (_record("Which?\nA. x\nB. y", "C"), r"film-00.*'C', .*2 options"),
    (_record("Which?", "C", questions=[FACTS]), r"film-00.*'C', .*2 options"),
    (TEXT_ONLY, r"film-00: is about text, not a video"),
  ],
)
def test_records_that_cannot_be_asked(record, message, tmp_path):
  with pytest.raises(UserError, match=message):
    _read(tmp_path, record)
