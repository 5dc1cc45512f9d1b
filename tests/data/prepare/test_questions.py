import pytest

from hourjax.data.prepare.question_tables import (
  find_columns,
  parse_mapping,
  read_row,
)
from hourjax.errors import UserError

ROW = {"video": "a.mp4", "question": "Who?", "answer": "Ann"}


def _read(row, mapping=""):
  columns = find_columns(list(row), parse_mapping(mapping), "t.csv")
  return read_row(row, columns)


def test_an_open_question():
  row = ROW | {"topic": "object", "task": "x", "duration": "12.5", "other": 1}
  assert _read(row) == {
    "video": "a.mp4",
    "source": "",
    "duration": 12.5,
    "human": "Who?",
    "gpt": "Ann",
    "facts": {
      "topic": "object",
      "task": "x",
      "answer": "Ann",
      "format": "open",
    },
  }


def test_columns_by_mapping():
  row = {"v": "a.mp4", "Q": "Who?", "text": "Ann", "answer": "wrong", "d": 3}
  found = _read(row, "video=v, question=Q,answer=text,duration=d")
  assert (found["video"], found["human"]) == ("a.mp4", "Who?")
  assert (found["gpt"], found["duration"]) == ("Ann", 3.0)


def test_columns_of_other_names_and_cases():
  row = {"Video_ID": "a", "QUERY": "Who?", "response": "Ann", "Category": "t"}
  assert _read(row)["facts"]["topic"] == "t"


@pytest.mark.parametrize(
  "options",
  [
    {"options": ["a cat", "a dog", "a cow", "a hen"]},
    {"options": ["A. a cat", "(B) a dog", "C) a cow", "d: a hen"]},
    {"options": {"B": "a dog", "A": "a cat", "C": "a cow", "D": "a hen"}},
    {"options": '["a cat", "a dog", "a cow", "a hen"]'},
    {"choices": '{"A": "a cat", "B": "a dog", "C": "a cow", "D": "a hen"}'},
    {"options": "a cat\na dog\na cow\na hen"},
    {"A": "a cat", "B": "a dog", "C": "a cow", "D": "a hen"},
  ],
)
@pytest.mark.parametrize(
  "answer", ["B", "b", "(B)", "B.", "B. a dog", "A dog", "a dog"]
)
def test_multiple_choice(options, answer):
  found = _read({**ROW, **options, "answer": answer})
  assert found["human"] == (
    "Who?\nA. a cat\nB. a dog\nC. a cow\nD. a hen\nAnswer with the letter."
  )
  assert found["gpt"] == "B"
  assert found["facts"] == {
    "answer": "a dog",
    "options": ["a cat", "a dog", "a cow", "a hen"],
    "letter": "B",
    "format": "multiple_choice",
  }


def test_options_in_columns_of_any_name():
  row = {**ROW, "answer": "yes", "o1": "no", "o2": "yes", "o3": None}
  found = _read(row, "options=o1+o2+o3")
  assert found["human"] == "Who?\nA. no\nB. yes\nAnswer with the letter."
  assert found["gpt"] == "B"


def test_an_option_that_is_a_letter_comes_before_its_label():
  row = {**ROW, "options": ["C", "B", "A"], "answer": "C"}
  assert _read(row)["gpt"] == "A"


def test_a_row_without_options_in_a_table_with_them():
  for nothing in (None, [], "", float("nan"), {"A": None}):
    found = _read({**ROW, "options": nothing})
    assert (found["human"], found["gpt"]) == ("Who?", "Ann")
    assert found["facts"]["format"] == "open"


def test_markers_are_written_elsewhere():
  assert _read({**ROW, "question": "<image>\nWho?"})["human"] == "Who?"


@pytest.mark.parametrize("role", ["video", "question", "answer"])
@pytest.mark.parametrize("nothing", [None, "", "  ", float("nan")])
def test_rows_that_lack_something(role, nothing):
  with pytest.raises(UserError, match=f"no {role} in column '{role}'") as error:
    _read({**ROW, role: nothing})
  assert error.value.kind == f"no {role}"


@pytest.mark.parametrize("answer", ["E", "2", "a bird", "B. a cat"])
def test_answers_that_are_no_option(answer):
  row = {**ROW, "options": ["a cat", "a dog"], "answer": answer}
  with pytest.raises(UserError, match="is none of the options") as error:
    _read(row)
  assert error.value.kind == "answer is no option"


def test_columns_that_are_not_found():
  found = ["clip", "question", "answer"]
  with pytest.raises(UserError) as error:
    find_columns(found, {}, "t.csv")
  assert str(error.value) == (
    "t.csv: no column for the video; its columns are 'clip', 'question', "
    "'answer'; say which, for example --columns=video=clip"
  )
  with pytest.raises(UserError, match="no column 'vid', which --columns"):
    find_columns(found, {"video": ("vid",)}, "t.csv")
  # A letter's column is no answer.
  with pytest.raises(UserError, match="no column for the answer"):
    find_columns(["video", "question", "a", "b", "c", "d"], {}, "t.csv")


@pytest.mark.parametrize("text", ["video", "video=", "film=a", "=a", "a=b=c"])
def test_mappings_that_are_not_understood(text):
  with pytest.raises(UserError, match=r"--columns: .*; write ROLE=COLUMN"):
    parse_mapping(text)


def test_only_options_may_have_several_columns():
  with pytest.raises(UserError, match="2 columns for video, 1 expected"):
    parse_mapping("video=a+b")


def test_options_that_are_no_options():
  deep = "[" * 9999 + "]" * 9999
  with pytest.raises(UserError, match="is none of the options"):
    _read({**ROW, "options": deep})
  for nothing in ("NaN", "9" * 9999):
    assert _read({**ROW, "options": nothing})["gpt"] == "Ann"
