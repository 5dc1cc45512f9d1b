"""Folders of models to one report."""

import json
import pathlib

import pytest

from hourjax.errors import UserError
from hourjax.evaluation import report
from hourjax.evaluation.run import default_out, evaluate_folders, distinct_names
from hourjax.evaluation.task import open_task
from tests.evaluation.fakes import Model, make_task


class Loader:
  """Makes a model of a folder; remembers which it made."""

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


def test_one_model(folders, capsys):
  made = evaluate_folders(folders[:1], make_task(), Loader())
  out = folders[0] / "evaluation" / "colours"
  assert made.names == ["stage2@3"]
  assert report.load(out) == made
  said = capsys.readouterr().out
  assert f"{folders[0]}: answers go to {out}" in said
  assert f"report in {out}: report.json, report.md" in said
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
  assert not load.made  # told before anything is loaded


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


def test_no_task(tmp_path):
  with pytest.raises(UserError, match="no benchmark 'videommee'; choose"):
    open_task("videommee", tmp_path)
  with pytest.raises(UserError, match="nowhere"):
    open_task("records", tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"holds no index\*\.jsonl"):
    open_task("records", tmp_path, features=tmp_path)
  (tmp_path / "test.json").write_text("[]")
  with pytest.raises(UserError):
    open_task("records", tmp_path)
