"""Every question is asked once, whoever asks and however often it is killed."""

import dataclasses
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest

from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.evaluation import report, report_pages, scoring, task
from hourjax.evaluation.records import Records
from hourjax.evaluation.run import (
  ask,
  default_out,
  distinct_names,
  evaluate,
  evaluate_folders,
  gather,
  report_again,
)
from hourjax.evaluation.task import open_task
from tests.evaluation.fakes import Model, make_task, question, same, timeless


@pytest.fixture(scope="module", autouse=True)
def _batches_of_four():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(task, "BATCH", 4)
    yield


@pytest.fixture
def plots():
  """Asks for the plots of a report, which take most of a test's time."""


@pytest.fixture(autouse=True)
def _no_plots(request, monkeypatch):
  if "plots" not in request.fixturenames:
    monkeypatch.setattr(report_pages, "figures", lambda data: {})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Records and report of one undisturbed run, and its folder."""
  folder = tmp_path_factory.mktemp("undisturbed")
  result = evaluate(Model(sensitive=True), make_task(), folder)
  return same(Records(folder).answered()), timeless(result.data), folder


def test_records_and_report(plots, tmp_path):
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
  # Each video is encoded once, its questions come in fours.
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
def test_a_run_goes_on(undisturbed, tmp_path, after):
  rows, data, _ = undisturbed
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
def test_records_that_a_kill_has_torn(undisturbed, tmp_path, share):
  rows, data, folder = undisturbed
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  path = tmp_path / "answers-00000.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole[: int(share * len(whole))])
  report = evaluate(Model(sensitive=True), make_task(), tmp_path)
  assert same(Records(tmp_path).answered()) == rows
  assert timeless(report.data) == data
  # None is written twice, though a batch is asked whole; one may be torn.
  assert path.read_bytes().count(b'"id"') <= 46


@pytest.mark.parametrize("count", [2, 3, 9])
def test_any_number_of_workers(undisturbed, tmp_path, count):
  rows, data, _ = undisturbed
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


def test_another_number_of_workers_goes_on(undisturbed, tmp_path):
  rows, data, _ = undisturbed
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


def test_what_cannot_be_read_is_left_out(undisturbed, tmp_path):
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
  _, data, _ = undisturbed
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


def test_a_limit_is_a_start(undisturbed, tmp_path):
  rows, data, _ = undisturbed
  out, model = tmp_path / "out", Model(sensitive=True)
  report = evaluate(model, make_task(limit=5), out)
  assert report.data["count"] == 5
  again = Model(sensitive=True)
  report = evaluate(again, make_task(), out)
  asked = model.asked + again.asked
  assert len(set(asked)) == len(asked) == 13
  assert same(Records(out).answered()) == rows
  assert timeless(report.data) == data


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
  after = report_again(make_task(), tmp_path)
  assert before.data["unreadable"] == 45 and after.data["unreadable"] == 0
  assert after.data["accuracy"] == sum(n % 4 == 1 for n in range(45)) / 45
  assert after.names == ["fake@3"]


def test_a_report_of_other_answers(tmp_path):
  ask(Model(), make_task(limit=4), tmp_path)
  assert gather(make_task(), tmp_path) is None
  with pytest.raises(UserError, match="some of the questions only"):
    report_again(make_task(), tmp_path)
  with pytest.raises(UserError, match="other questions than those of other"):
    report_again(make_task([question(1)], benchmark="other"), tmp_path)


# --- Models in folders -------------------------------------------------------


class Loader:
  """Makes a model of a folder, and keeps those that it made."""

  def __init__(self, **answers):
    self.answers, self.made = answers, []

  def __call__(self, folder: str) -> Model:
    path = pathlib.Path(folder)
    answers = self.answers.get(path.parent.name)
    self.made.append(Model(f"{path.name}@3", answers))
    return self.made[-1]


@pytest.fixture
def folders(tmp_path):
  for name in ("big", "small"):
    folder = tmp_path / name / "stage2"
    folder.mkdir(parents=True)
    rows = [{"step": s, "loss": 1 / s} for s in (1, 2, 3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "config.json").write_text('{"init": ""}')
  return [tmp_path / "big" / "stage2", tmp_path / "small" / "stage2"]


def test_one_model(plots, folders, capsys):
  made = evaluate_folders(folders[:1], make_task(), Loader())
  out = folders[0] / "evaluation" / "colours"
  assert made.names == ["stage2@3"]
  assert report.load(out) == made
  out_text = capsys.readouterr().out
  assert f"{folders[0]}: answers go to {out}" in out_text
  assert f"report in {out}: report.json, report.md" in out_text
  assert (out / "loss.png").exists()
  assert "![](loss.png)" in (out / "report.md").read_text()


def test_two_models(folders, tmp_path):
  load = Loader(big={f"question {n}?": "ABCD"[n % 4] for n in range(45)})
  made = evaluate_folders(folders, make_task(), load, out=tmp_path / "out")
  assert made.names == ["big", "small"]
  assert made.data["accuracy"] == 1
  found = made.data["compared"]["small"]
  assert found["only_ours"] == 34 and found["only_theirs"] == 0
  assert report.load(tmp_path / "out") == made
  # The other one's answers are found again wherever it is compared.
  other = default_out(folders[1], make_task())
  assert (other / "answers-00000.jsonl").exists()
  again = Loader()
  both = evaluate_folders(folders[::-1], make_task(), again, out=other)
  assert both.names == ["small", "big"]
  assert not again.made[0].asked and again.made[1].asked


def test_names(folders, tmp_path):
  names = ["with MemAug", "without MemAug"]
  made = evaluate_folders(
    folders, make_task(), Loader(), out=tmp_path / "out", names=names
  )
  assert made.names == names and made.data["needle_without_memaug"] is None
  for wrong in (["one"], ["one", "one"], ["one", "two", "three"]):
    with pytest.raises(UserError, match="different names for 2 models"):
      evaluate_folders(folders, make_task(), Loader(), names=wrong)


def test_workers(folders, tmp_path, capsys):
  out = tmp_path / "out"
  first = evaluate_folders(
    folders, make_task(), Loader(), out=out, worker=(0, 2)
  )
  assert first is None and not (out / "report.json").exists()
  assert "the last one writes the report" in capsys.readouterr().out
  last = evaluate_folders(
    folders, make_task(), Loader(), out=out, worker=(1, 2)
  )
  assert report.load(out) == last and last.data["count"] == 45


def test_wrong_folders(folders, tmp_path):
  load = Loader()
  with pytest.raises(UserError, match=r"nowhere is no folder of a model"):
    evaluate_folders([*folders, tmp_path / "nowhere"], make_task(), load)
  with pytest.raises(UserError, match="cannot be compared with itself"):
    evaluate_folders([folders[0], folders[0]], make_task(), load)
  (tmp_path / "empty").mkdir()
  with pytest.raises(
    UserError, match=r"empty has no config.json, so it is nei"
  ):
    evaluate_folders([*folders, tmp_path / "empty"], make_task(), load)
  # The second one's answers are to the same questions, with subtitles.
  other = default_out(folders[1], make_task())
  evaluate_folders(folders[1:], make_task(subtitles=True), Loader(), out=other)
  with pytest.raises(UserError, match="subtitles is True there and False here"):
    evaluate_folders(folders, make_task(), load)
  assert not load.made  # the error comes before anything is loaded


def test_subtitles_have_a_folder_of_their_own():
  model = pathlib.Path("m")
  assert default_out(model, make_task()) == model / "evaluation/colours"
  assert default_out(model, make_task(subtitles=True)) == (
    model / "evaluation/colours-subtitles"
  )


@pytest.mark.parametrize(
  ("folders", "names"),
  [
    (["w/memaug/s2", "w/plain/s2"], ["memaug", "plain"]),
    (["3b", "7b"], ["3b", "7b"]),
    (["w/a/1", "w/b/2"], ["a/1", "b/2"]),
    (["a/b", "a/b/b"], ["a/b", "a/b/b"]),
    (["w/a/s", "w/b/s", "w/c/s"], ["a", "b", "c"]),
  ],
)
def test_distinct_names(folders, names):
  assert distinct_names([pathlib.Path(folder) for folder in folders]) == names


def _record(name, video="a.mp4"):
  return {
    "id": name,
    "video": video,
    "duration": 200,
    "conversations": [
      {"from": "human", "value": "<image>\nWhat?\nA. red\nB. blue"},
      {"from": "gpt", "value": "B"},
    ],
  }


def test_a_task_from_disk(tmp_path):
  records = [_record("one"), _record("two", "b.mp4")]
  (tmp_path / "test.json").write_text(json.dumps(records))
  opened = open_task("records", tmp_path, limit=1)
  assert [item.id for item in opened.questions] == ["one", "two"]
  assert [item.id for item in opened.chosen] == ["one"]
  assert opened.chosen[0].expected == "B"
  (tmp_path / "m").mkdir()
  (tmp_path / "m" / "config.json").write_text("{}")
  made = evaluate_folders([tmp_path / "m"], opened, Loader())
  assert made.data["accuracy"] == 1 and made.data["count"] == 1
  assert made.data["benchmark"] == "records"
  assert "The first 1 of 2 questions only." in made.summary().splitlines()
  (run,) = made.data["runs"].values()
  assert run["version"] == opened.version and run["max_tokens"] > 0
