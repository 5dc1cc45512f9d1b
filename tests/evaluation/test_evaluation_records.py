"""The folder of an evaluation outlives kills, and knows whose it is."""

import json

import pytest

from hourjax.errors import UserError
from hourjax.evaluation.records import Records
from tests import tampering

ABOUT = {"model": "m@3", "benchmark": "b", "max_tokens": 16, "parser": 1}


def _row(name, answer="B"):
  return {"id": name, "answer": answer, "seconds": 1.0}


def test_all_workers_are_read(tmp_path):
  first, second = Records(tmp_path, 0), Records(tmp_path, 1)
  for records in (first, second):
    records.claim(ABOUT)
  first.add([_row("a"), _row("b")])
  second.add([_row("c"), _row("b", "another")])
  second.leave_out([{"id": "d", "video": "v", "reason": "gone"}])
  first.leave_out([{"id": "c", "video": "v", "reason": "not here"}])
  for records in (first, second, Records(tmp_path)):
    answers = {k: row["answer"] for k, row in records.answered().items()}
    assert answers == {"a": "B", "b": "B", "c": "B"}
    # What another worker could ask is not left out.
    assert records.left_out().keys() == {"d"}
  assert Records(tmp_path).about() == ABOUT


def test_what_is_missing_is_tried_again(tmp_path):
  records = Records(tmp_path)
  records.claim(ABOUT)
  records.leave_out([{"id": "d", "video": "v", "reason": "gone"}])
  again = Records(tmp_path)
  again.claim(ABOUT)
  assert not again.left_out()


def test_what_fewer_workers_will_try_again_is_not_left_out(tmp_path):
  """Lists of an earlier run of three are not those of a run of two."""
  lost = [{"id": "d", "video": "v", "reason": "gone"}]
  for worker in range(3):
    records = Records(tmp_path, worker, 3)
    records.claim(ABOUT)
    records.leave_out([{**lost[0], "id": f"d{worker}"}])
  assert records.left_out().keys() == {"d0", "d1", "d2"}
  first = Records(tmp_path, 0, 2)
  first.claim(ABOUT)
  assert not first.left_out()  # the second worker has not begun
  assert Records(tmp_path).left_out().keys() == {"d1"}
  second = Records(tmp_path, 1, 2)
  second.claim(ABOUT)
  second.leave_out(lost)
  assert first.left_out().keys() == Records(tmp_path).left_out().keys() == {"d"}


def test_a_torn_line_wherever_it_is_cut(tmp_path):
  whole = Records(tmp_path / "whole")
  whole.claim(ABOUT)
  whole.add([_row("a"), _row("b", "x\ny \u2028 z")])
  data = (tmp_path / "whole" / "answers-00000.jsonl").read_bytes()
  for cut in range(len(data) + 1):
    folder = tmp_path / str(cut)
    records = Records(folder)
    records.claim(ABOUT)
    (folder / "answers-00000.jsonl").write_bytes(data[:cut])
    there = records.answered()
    assert [*there] == ["a", "b"][: len(there)]
    records.add([_row(name) for name in ("a", "b") if name not in there])
    records.add([_row("c")])
    assert Records(folder).answered().keys() == {"a", "b", "c"}, cut


def test_another_run_is_refused_with_the_differences(tmp_path):
  Records(tmp_path).claim(ABOUT)
  other = {**ABOUT, "model": "m@4", "subtitles": True}
  with pytest.raises(UserError) as raised:
    Records(tmp_path).claim(other)
  message = str(raised.value)
  assert "model is 'm@3' there and 'm@4' here" in message
  assert "subtitles is not told there and True here" in message
  assert "max_tokens" not in message and "another --out" in message
  assert Records(tmp_path).about() == ABOUT


def test_a_new_parser_is_no_other_run(tmp_path):
  Records(tmp_path).claim(ABOUT)
  Records(tmp_path).claim({**ABOUT, "parser": 2})
  assert Records(tmp_path).about()["parser"] == 2


def test_answers_of_nobody(tmp_path):
  (tmp_path / "answers-00000.jsonl").write_text(json.dumps(_row("a")) + "\n")
  with pytest.raises(UserError, match=r"no run\.json that says whose"):
    Records(tmp_path).claim(ABOUT)


def test_a_file_where_the_folder_should_be(tmp_path):
  (tmp_path / "out").write_text("")
  for method in ("claim", "check"):
    with pytest.raises(UserError, match="cannot be written to"):
      getattr(Records(tmp_path / "out" / "deeper"), method)(ABOUT)
  Records(tmp_path / "new" / "deeper").check(ABOUT)
  assert not (tmp_path / "new").exists()


def test_no_evaluation(tmp_path):
  with pytest.raises(UserError, match="no folder of an evaluation"):
    Records(tmp_path).about()
  (tmp_path / "run.json").write_text("{")
  with pytest.raises(UserError, match="cannot be read"):
    Records(tmp_path).about()


@pytest.mark.parametrize(
  "line",
  [
    b"[" * 20_000,
    b"\xff",
    b"5",
    b'{"id": ["a"], "answer": "B", "reason": "r"}',
    b'{"id": "a", "answer": null, "reason": 5}',
    b'{"id": "a", "answer": "B", "seconds": "1", "reason": []}',
    b'{"id": "a", "answer": "B", "seconds": NaN}',
    b'{"id": "a", "answer": "B", "finished": 1}',
  ],
)
def test_lines_of_another_kind_answer_nothing(tmp_path, line):
  records = Records(tmp_path)
  records.claim(ABOUT)
  for name in ("answers", "missing"):
    (tmp_path / f"{name}-00000.jsonl").write_bytes(line + b"\n")
  records.add([_row("b")])
  assert records.answered().keys() == {"b"}
  assert not records.left_out()


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (tampering.POINTER, "Git-LFS pointer"),
    (b"[" * 20_000, "nested too deep"),
    (b"5", "is no JSON object"),
  ],
)
def test_a_run_that_is_something_else(tmp_path, content, said):
  (tmp_path / "run.json").write_bytes(content)
  with pytest.raises(UserError, match=rf"run\.json.*{said}"):
    Records(tmp_path).about()
