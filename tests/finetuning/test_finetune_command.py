"""The whole of `python -m hourjax.finetune` on a tiny model, and its parts."""

import dataclasses
import json
import shutil

import pytest

import hourjax
from hourjax.data.demo.tokenizer import write_tokenizer
from hourjax.errors import UserError
from hourjax.finetuning import forecast, report, run
from hourjax.finetuning.questions import Questions, Skip
from hourjax.finetuning.stages import Stages, Took
from hourjax.models.params import init_params
from hourjax.training.faults import LOSS
from hourjax.weights.shards import save_params
from tests import videos
from tests.evaluation import small
from tests.training import runs

# Answers that a small model learns by heart: they follow from the number.
NAMES = [f"clip {i}.mp4" for i in range(5)]
SETTINGS = {"optimizer.decoder": "0.01", "epochs": "8", "read.threads": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("finetune")
  config = dataclasses.replace(small.CONFIG, pool_side=2)
  save_params(init_params(config, 3), config, made / "model")
  write_tokenizer(made / "model", [])
  for number, name in enumerate(NAMES):
    videos.write(made / "clips" / name, 20 + number, 10)
  (made / "clips" / "broken.mp4").write_text("no video")
  rows = ["Video;Question;Antwort;Start;Choices"]
  rows += [
    f"{name[:-4].upper()};What is {n} of it?;{n % 2 + 1};;a card|a tree"
    for name in NAMES
    for n in range(4)
  ]
  rows += ["clip 0;When?;0:01;0;", "clip 1;When?;now;9;", "broken;Who?;me;;"]
  rows += ["gone;Who?;me;;", ";;;;"]
  text = "\r\n".join(rows)
  (made / "questions.csv").write_bytes(text.encode("utf-8-sig"))
  return made


def _options(folder, out, **changes):
  given = {"columns": {"answer": ("Antwort",)}, "overrides": SETTINGS}
  return run.Options(
    videos=str(folder / "clips"),
    questions=str(folder / "questions.csv"),
    model=str(folder / "model"),
    out=str(out),
    **given | changes,
  )


@pytest.mark.slow
def test_from_a_folder_to_a_report(folder, tmp_path, capsys):
  """A dry run, a run that is interrupted, its end, and once more."""
  out = tmp_path / "mine"
  assert run.finetune(_options(folder, out, dry_run=True)) is None
  said = capsys.readouterr().out
  assert "21 questions of 24 rows" in said and "about, on 1 x" in said
  assert "left out: 1 row, missing video" in said and "part beyond" in said
  assert not (out / "model").exists()

  with runs.interrupted_at(6):
    run.finetune(_options(folder, out))
  stored = {p: p.stat().st_mtime_ns for p in out.rglob("features/*.npy")}
  assert len(stored) == len(NAMES)
  state = json.loads((out / "stages.json").read_text())["stages"]
  assert [k for k, v in state.items() if v["done"]] == [run.EXTRACT, run.BEFORE]
  capsys.readouterr()

  assert run.finetune(_options(folder, out)) is None
  printed = capsys.readouterr()
  assert "extract features: done before" in printed.out
  assert "from step 5" in printed.err or "from step" in printed.err
  page = (out / "report.md").read_text()
  for text in ("before:", "after:", "## Times", "hourjax.ask --model",
               "missing videos (1): gone (1)", "held-out loss:"):  # fmt: skip
    assert text in page, text
  assert "held-out questions" in printed.out and "report:" in printed.out
  assert (out / "loss.png").stat().st_size > 1000
  assert {p: p.stat().st_mtime_ns for p in stored} == stored
  skipped = (out / "data" / "skipped.tsv").read_text()
  assert "questions.csv, line 23" in skipped and "unreadable video" in skipped

  # Nothing is done again, and the new model answers.
  checkpoints = sorted((out / "model" / "checkpoints").iterdir())
  assert run.finetune(_options(folder, out)) is None
  assert sorted((out / "model" / "checkpoints").iterdir()) == checkpoints
  assert "ask after: done before" in capsys.readouterr().out
  model = hourjax.load(out / "model")
  memory = model.encode_memory(str(folder / "clips" / NAMES[0]))
  assert memory.ask("What is 0 of it?").text
  # Other settings need another folder.
  for changes in ({"overrides": {"epochs": "3"}}, {"holdout": "3"}):
    with pytest.raises(UserError, match="holds a fine-tuning with other"):
      run.finetune(_options(folder, out, **changes))


def test_mistakes_are_found_before_anything_is_written(folder, tmp_path):
  out, empty = tmp_path / "mine", tmp_path / "empty"
  empty.mkdir()
  for changes, message in (
    ({"columns": {}}, "no column for the answer"),
    ({"questions": "none.csv"}, "none.csv does not exist"),
    ({"videos": str(empty)}, "holds no video"),
    ({"model": str(empty)}, "config.json"),
    ({"holdout": "9"}, "--holdout=9 sets 9 of 5 videos aside"),
  ):
    options = vars(_options(folder, out)) | changes
    with pytest.raises(UserError, match=message):
      run.finetune(run.Options(**options))
  assert not out.exists()


# --- parts -------------------------------------------------------------------


def test_stages_are_run_once_and_timed(tmp_path, capsys):
  about, calls = {"--model": "a"}, []
  stages = Stages(tmp_path, about)
  stages.expect(forecast.Stage("train", 60.0, "steps"))
  with pytest.raises(KeyboardInterrupt):
    stages.run("train", lambda: exec("raise KeyboardInterrupt"))
  assert not stages.is_done("train")
  again = Stages(tmp_path, about)
  again.expect(forecast.Stage("train", 5.0, "what is left"))
  again.run("train", lambda: False)  # a signal ended it
  again.run("train", lambda: calls.append(1))
  Stages(tmp_path, about).run("train", lambda: calls.append(2))
  assert calls == [1] and again.took["train"].forecast == 60.0
  said = capsys.readouterr().out
  assert "== train (about 0:01:00)" in said and "train: done before" in said
  with pytest.raises(UserError, match="with other --model; choose another"):
    Stages(tmp_path, {"--model": "b"})


def test_the_forecast_is_a_table():
  stages = [forecast.Stage("train", 100.0, "at most 9 steps")]
  text = forecast.table([*stages, forecast.asking("ask", 100, 0.05)])
  assert "train                0:01:40  at most 9 steps" in text
  assert "ask                  0:00:35" in text and "0:02:15" in text


def test_the_forecast_looks_into_videos(folder):
  facts = forecast.probe(folder / "clips", [*NAMES, "broken.mp4"])
  assert facts[NAMES[0]].duration == pytest.approx(2.0)
  assert facts["broken.mp4"].problem
  assert len(forecast._frames(facts[NAMES[1]])) == 21


def _workdir(out, losses):
  rows = [{"step": 1, "loss": 2.0}]
  rows += [
    {"step": 10 * (i + 1), "loss": 1.0 / (i + 1), LOSS: loss}
    for i, loss in enumerate(losses)
  ]
  (out / "model").mkdir(parents=True)
  (out / "model" / "metrics.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )


def _score(out, name, right, low, high):
  (out / name).mkdir()
  data = {
    "accuracy": right, "interval": [low, high], "chance": 0.25, "count": 40,
    "unreadable": 1, "benchmark": "records", "runs": {"m": {}}, "versions": {},
    "by_task": {},
  }  # fmt: skip
  (out / name / "report.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
  "after, losses, warned",
  [
    ((0.6, 0.55, 0.65), [1.0, 0.8], []),
    ((0.5, 0.39, 0.61), [1.0, 0.8], ["do not tell whether this is a gain"]),
    ((0.3, 0.2, 0.4), [1.0, 0.8], ["WARNING: the new model is worse"]),
    ((0.6, 0.55, 0.65), [0.8, 1.0], ["WARNING: over-fitting: from step 10"]),
  ],
)
def test_the_report_says_what_it_means(tmp_path, after, losses, warned):
  _workdir(tmp_path, losses)
  _score(tmp_path, "before", 0.45, 0.4, 0.5)
  _score(tmp_path, "after", *after)
  took = {"train": Took(forecast=60.0, seconds=75.0, done=True)}
  short = report.write(
    tmp_path, command="finetune", read=["40 questions"], took=took, ask="ask"
  )
  page = (tmp_path / "report.md").read_text()
  assert all(line in page for line in short) and "| 20 | " in page
  assert "| train | 0:01:00 | 0:01:15 |" in page and "- 40 questions" in page
  told = [line for line in short if line.startswith(("WARNING", "note"))]
  assert len(told) == len(warned)
  for line, text in zip(told, warned):
    assert text in line
  shutil.rmtree(tmp_path / "after")
  assert "no score" in report._scores(tmp_path)[0]


def test_what_was_read_is_said():
  items = [{"video": "a", "held_out": False}, {"video": "b", "held_out": True}]
  skipped = [Skip("q, line 4", "no answer", "q, line 4 has\tno answer")] * 2
  found = Questions(5, items, skipped, ["it is UTF-16 text"], {"c": 2})
  lines = report.describe_questions(found, items[1:])
  assert lines[0] == (
    "2 questions of 5 rows: 1 about 1 videos to train on, 1 about 1 videos held"
    " out"
  )
  assert "note: it is UTF-16 text" in lines and "missing videos (1): c (2)" in (
    lines
  )
  text = report.skipped_rows(skipped)
  assert text.splitlines()[1] == "q, line 4\tno answer\tq, line 4 has no answer"
