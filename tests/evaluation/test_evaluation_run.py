"""Every question is asked once, whoever asks and however often it is killed."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.evaluation import run as compare
from hourjax.evaluation import scoring
from hourjax.evaluation import task
from hourjax.evaluation.records import Records
from hourjax.evaluation.run import ask, evaluate, gather
from tests.evaluation.fakes import Model, make_task, question, same, timeless


@pytest.fixture(autouse=True)
def _batches_of_four(monkeypatch):
  monkeypatch.setattr(task, "BATCH", 4)


def _expected(folder):
  """Records and report of one undisturbed run."""
  made = evaluate(Model(sensitive=True), make_task(), folder)
  return same(Records(folder).answered()), timeless(made.data)


def test_records_and_report(tmp_path):
  model = Model(answers={"question 0?": "A", "question 1?": "hm"})
  report = evaluate(model, make_task(), tmp_path)
  rows = Records(tmp_path).answered()
  assert rows.keys() == {f"q{n}" for n in range(45)}
  row = rows["q1"]
  assert row.pop("seconds") >= 0
  assert row == {
    "id": "q1",
    "video": "a.mp4",
    "tasks": ["colour"],
    "duration": "short",
    "prompt": "question 1?",
    "answer": "hm",
    "parsed": None,
    "expected": "B",
    "correct": False,
    "finished": True,
    "tokens": 1,
  }
  right = sum(n % 4 == 1 for n in range(45))  # q1 is lost, q0 is won
  assert report.data["count"] == 45 and report.data["unreadable"] == 1
  assert report.data["accuracy"] == right / 45
  # Each video is remembered once, its questions come in fours.
  assert sorted(model.encoded) == [f"videos/{x}.mp4" for x in "abcd"]
  sizes = {
    video: [len(texts) for name, texts in model.asked if name == video]
    for video in ("a.mp4", "b.mp4", "c.mp4", "d.mp4")
  }
  assert sizes == {
    "a.mp4": [4] * 5,
    "b.mp4": [4, 4, 3],
    "c.mp4": [4, 4, 1],
    "d.mp4": [4, 1],
  }


class _Killed(BaseException):
  pass


@pytest.mark.parametrize("after", range(0, 13, 2))
def test_a_run_goes_on(tmp_path, after):
  rows, data = _expected(tmp_path / "whole")
  model, calls = Model(sensitive=True), itertools.count()

  def kill(video, questions):
    if next(calls) == after:
      raise _Killed

  model.before_answer = kill
  out = tmp_path / "out"
  with pytest.raises(_Killed):
    evaluate(model, make_task(), out)
  assert len(Records(out).answered()) == sum(len(t) for _, t in model.asked)
  again = Model(sensitive=True)
  report = evaluate(again, make_task(), out)
  asked = model.asked + again.asked
  assert len(set(asked)) == len(asked) == 13
  assert same(Records(out).answered()) == rows
  assert timeless(report.data) == data
  nothing = Model(sensitive=True)
  report = evaluate(nothing, make_task(), out)
  assert not nothing.encoded and timeless(report.data) == data


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.99, 1.0])
def test_records_that_a_kill_has_torn(tmp_path, share):
  rows, data = _expected(tmp_path)
  path = tmp_path / "answers-00000.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole[: int(share * len(whole))])
  report = evaluate(Model(sensitive=True), make_task(), tmp_path)
  assert same(Records(tmp_path).answered()) == rows
  assert timeless(report.data) == data
  # None is written twice, though a batch is asked whole; one may be torn.
  assert path.read_bytes().count(b'"id"') <= 46


@pytest.mark.parametrize("count", [2, 3, 9])
def test_any_number_of_workers(tmp_path, count):
  rows, data = _expected(tmp_path / "one")
  out, asked = tmp_path / "many", []
  for index in reversed(range(count)):
    model = Model(sensitive=True)
    report = evaluate(model, make_task(), out, worker=(index, count))
    asked += model.asked
    # Only the last one finds everything answered. Some have nothing to do.
    last = count == 2 or index <= 3
    assert (report is not None) == (index == 0 if last else False)
  assert len(asked) == 13
  assert same(Records(out).answered()) == rows
  assert timeless(report.data) == data


def test_another_number_of_workers_goes_on(tmp_path):
  rows, data = _expected(tmp_path / "one")
  out = tmp_path / "many"
  assert (
    evaluate(Model(sensitive=True), make_task(), out, worker=(1, 3)) is None
  )
  models = [Model(sensitive=True), Model(sensitive=True)]
  assert evaluate(models[1], make_task(), out, worker=(1, 2)) is None
  report = evaluate(models[0], make_task(), out, worker=(0, 2))
  # The one video of 1/3 is not asked about again.
  assert sum(len(model.encoded) for model in models) == 3
  assert same(Records(out).answered()) == rows
  assert timeless(report.data) == data


def test_no_such_worker(tmp_path):
  with pytest.raises(UserError, match="worker 3 of 3"):
    evaluate(Model(), make_task(), tmp_path, worker=(3, 3))
  assert not (tmp_path / "run.json").exists()


def test_rows_that_cannot_be_asked_are_in_the_report(tmp_path):
  lost = scoring.LeftOut("x.json, row 3", "e.mp4", "question is empty")
  asked = make_task(left_out=(lost,), notes=("1 of 46 rows cannot be asked.",))
  report = evaluate(Model(), asked, tmp_path)
  assert report.data["count"] == 45 and report.left_out == 1
  assert not report.complete
  assert report.data["runs"]["fake@3"]["left_out"] == [
    {"video": "e.mp4", "questions": 1, "reason": "question is empty"}
  ]
  page = (tmp_path / "report.md").read_text()
  assert "- e.mp4 (1): question is empty" in page
  assert "1 of 46 rows cannot be asked." in page


def test_what_cannot_be_read_is_left_out(tmp_path):
  report = evaluate(
    Model(sensitive=True, broken={"b.mp4"}), make_task(), tmp_path
  )
  assert report.data["count"] == 34 and report.left_out == 11
  assert not report.complete
  (run,) = report.data["runs"].values()
  assert run["left_out"] == [
    {
      "video": "b.mp4",
      "questions": 11,
      "reason": "videos/b.mp4 cannot be read; fetch it again",
    }
  ]
  assert "45 questions, 34 asked, 11 left out: 1 video" in report.summary()
  listed = (tmp_path / "missing-00000.jsonl").read_text().splitlines()
  assert {json.loads(line)["video"] for line in listed} == {"b.mp4"}
  # The next run tries again, and those only.
  _, data = _expected(tmp_path / "whole")
  model = Model(sensitive=True)
  again = evaluate(model, make_task(), tmp_path)
  assert model.encoded == ["videos/b.mp4"]
  assert timeless(again.data) == data


def test_a_question_that_cannot_be_asked(tmp_path):
  model = Model()

  def refuse(video, questions):
    if "question 7?" in questions:
      raise UserError("the prompt does not fit")

  model.before_answer = refuse
  report = evaluate(model, make_task(), tmp_path / "out")
  assert report.left_out == 1 and report.data["count"] == 44
  ids = {f"q{n}" for n in range(45)}
  assert Records(tmp_path / "out").answered().keys() == ids - {"q7"}
  assert Records(tmp_path / "out").left_out()["q7"]["reason"] == (
    "the prompt does not fit"
  )


def test_a_missing_video_comes_under_another_name(tmp_path):
  """What was answered counts on; only the video's questions are asked."""
  evaluate(Model(broken=["c.mp4"]), make_task(), tmp_path)
  found = [
    dataclasses.replace(q, video=q.video.replace("c.mp4", "data/c.webm"))
    for q in make_task().questions
  ]
  model = Model()
  report = evaluate(model, make_task(found), tmp_path)
  assert model.encoded == ["videos/data/c.webm"]
  assert report.complete and report.data["count"] == 45


def test_all_videos_are_missing(tmp_path):
  model = Model(broken=[f"{x}.mp4" for x in "abcd"])
  with pytest.raises(UserError) as raised:
    evaluate(model, make_task(), tmp_path)
  assert "none of the 45 questions could be asked of fake@3" in (
    str(raised.value)
  )
  assert "cannot be read; fetch it again" in str(raised.value)
  assert not (tmp_path / "report.json").exists()


def test_from_a_feature_store(tmp_path):
  store = FeatureStore(tmp_path / "features", create=True)
  for name in ("a.mp4", "b.mp4", "d.mp4"):
    store.write(name, np.zeros((2, 4, 8)), 9)
  model = Model()
  report = evaluate(model, make_task(features=store), tmp_path / "out")
  stored = [f"stored {name}.mp4" for name in "abd"]
  assert sorted(model.encoded) == stored
  (run,) = report.data["runs"].values()
  (lost,) = run["left_out"]
  assert (
    lost["video"] == "c.mp4" and "not in the feature store" in (lost["reason"])
  )
  # Files and features may differ by more than rounding.
  with pytest.raises(UserError, match="videos is 'features' there and 'video"):
    evaluate(Model(), make_task(), tmp_path / "out")


def test_a_limit_is_a_start(tmp_path):
  rows, data = _expected(tmp_path / "whole")
  out, model = tmp_path / "out", Model(sensitive=True)
  report = evaluate(model, make_task(limit=5), out)
  assert report.data["count"] == 5
  again = Model(sensitive=True)
  report = evaluate(again, make_task(), out)
  asked = model.asked + again.asked
  assert len(set(asked)) == len(asked) == 13
  assert same(Records(out).answered()) == rows
  assert timeless(report.data) == data


def test_nothing_to_ask():
  with pytest.raises(UserError, match="0 questions and --limit is None"):
    make_task([])
  with pytest.raises(UserError, match="45 questions and --limit is 0"):
    make_task(limit=0)


def test_another_model_is_refused(tmp_path):
  evaluate(Model("one@1"), make_task(), tmp_path)
  with pytest.raises(UserError, match="model is 'one@1' there and 'two@1'"):
    evaluate(Model("two@1"), make_task(), tmp_path)
  words = [dataclasses.replace(q, prompt="?") for q in make_task().questions]
  with pytest.raises(UserError, match="questions is"):
    evaluate(Model("one@1"), make_task(words), tmp_path)


def test_a_parser_is_mended_without_a_model(tmp_path, monkeypatch):
  model = Model(answers={f"question {n}?": "the Bth" for n in range(45)})
  before = evaluate(model, make_task(), tmp_path)
  monkeypatch.setattr(scoring, "parse", lambda answer, _: answer[4])
  after = compare.report_again(make_task(), tmp_path)
  assert before.data["unreadable"] == 45 and after.data["unreadable"] == 0
  assert after.data["accuracy"] == sum(n % 4 == 1 for n in range(45)) / 45
  assert after.names == ["fake@3"]


def test_a_report_of_other_answers(tmp_path):
  ask(Model(), make_task(limit=4), tmp_path)
  assert gather(make_task(), tmp_path) is None
  with pytest.raises(UserError, match="some of the questions only"):
    compare.report_again(make_task(), tmp_path)
  with pytest.raises(UserError, match="other questions than those of other"):
    compare.report_again(make_task([question(1)], benchmark="other"), tmp_path)
