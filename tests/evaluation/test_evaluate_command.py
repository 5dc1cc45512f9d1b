"""`python -m hourjax.evaluate` on a tiny model, seen from a shell."""

import json
import os
import signal
import time

import pytest
from absl import flags
from absl.testing import flagsaver

import hourjax
from hourjax import command, evaluate
from hourjax.evaluation import report
from hourjax.evaluation.records import Records
from hourjax.models.lora import LoraConfig
from hourjax.weights import peft
from tests.evaluation import small
from tests.evaluation.fakes import Model, same, timeless
from tests.inference.test_adapter import layers_of
from tests.training.runs import hosts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("small")
  small.write_model(folder / "model")
  small.write_data(folder / "data")
  return folder


@pytest.fixture(scope="module")
def options(made):
  """Of a run on stored features, without the folder it writes to."""
  records = json.loads((made / "data" / "test.json").read_text())
  stored = [item for item in records if item["video"] != "e.mp4"]
  (made / "stored.json").write_text(json.dumps(stored))
  return {
    "model": made / "model",
    "benchmark": "records",
    "data": made / "stored.json",
    "features": made / "data" / "features",
  }


@pytest.fixture(scope="module")
def whole(made, options):
  """Records and report of one undisturbed process."""
  out = made / "whole"
  code, stdout, stderr = small.ended(small.start(made, **options, out=out))
  assert code == 0, stderr
  assert f"answers go to {out}" in stdout and f"report in {out}" in stdout
  assert "of 17 questions (chance 50.0%)" in stdout
  rows = same(Records(out).answered())
  assert len(rows) == 17
  # Not all alike, else the comparisons below show nothing.
  assert len({row["answer"] for row in rows.values()}) > 5
  return rows, timeless(report.load(out).data)


def _assert_equal(out, whole):
  rows, data = whole
  assert same(Records(out).answered()) == rows
  assert timeless(report.load(out).data) == data


@pytest.mark.slow
def test_workers_of_which_one_is_killed(made, options, whole):
  out = made / "workers"
  path = out / "answers-00000.jsonl"
  process = small.start(made, **options, out=out, worker="0/2")
  until = time.monotonic() + 200
  while not (path.exists() and path.stat().st_size):
    assert process.poll() is None and time.monotonic() < until
    time.sleep(0.002)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert not (out / "report.json").exists()
  running = [
    small.start(made, **options, out=out, worker=f"{index}/2")
    for index in range(2)
  ]
  ends = [small.ended(process) for process in running]
  assert [code for code, _, _ in ends] == [0, 0], ends
  assert any("report in" in stdout for _, stdout, _ in ends)
  _assert_equal(out, whole)


@pytest.mark.slow
def test_two_processes_of_one_run(made, options, whole):
  out = made / "hosts"
  running = [small.start(made, env, **options, out=out) for env in hosts(2)]
  ends = [small.ended(process) for process in running]
  assert [code for code, _, _ in ends] == [0, 0], ends
  assert sum("report in" in stdout for _, stdout, _ in ends) == 1
  for index in range(2):
    assert (out / f"answers-{index:05d}.jsonl").stat().st_size
  _assert_equal(out, whole)


@pytest.mark.slow
def test_an_adapter_answers_and_is_named(made, options, whole, tmp_path):
  lora = LoraConfig(rank=2, alpha=16.0)
  layers = layers_of(lora, small.CONFIG)
  (tmp_path / "mine").mkdir()
  peft.write_adapters(
    tmp_path / "mine", layers, small.CONFIG, lora, base="", fingerprint=""
  )
  options = options | {"adapter": tmp_path / "mine", "out": tmp_path / "out"}
  code, _, stderr = small.ended(small.start(made, **options))
  assert code == 0, stderr
  rows, plain = same(Records(tmp_path / "out").answered()), whole[0]
  assert rows.keys() == plain.keys()
  assert any(rows[key]["answer"] != plain[key]["answer"] for key in rows)
  (name,) = report.load(tmp_path / "out").names
  base, _, adapter = name.partition(" + ")
  assert "/model " in base and adapter == f"{tmp_path.name}/mine"


@pytest.mark.slow
def test_videos_that_are_missing_or_none(made, capsys):
  """From files: b and c can be read, d is no video, a and e are not there."""
  out = made / "files"
  given = {"benchmark": "records", "out": out, "data": made / "data"}
  started = small.start(made, model=made / "model", **given, limit=18)
  code, stdout, stderr = small.ended(started)
  assert code == 3, stderr
  assert "18 questions, 5 asked, 13 left out: 3 videos" in stdout
  page = (out / "report.md").read_text()
  for name, count in (("a.mp4", 11), ("d.mp4", 1), ("e.mp4", 1)):
    assert f"- {name} ({count}): " in page
  failed = Records(out).left_out()
  assert len(failed) == 14 and all(row["reason"] for row in failed.values())
  # Parsed and scored again without a model, in this process.
  (out / "report.json").unlink()
  flags.FLAGS.mark_as_parsed()
  texts = {name: str(value) for name, value in given.items()}
  with (
    flagsaver.flagsaver(**texts, model=None, limit=18),
    pytest.raises(SystemExit) as ended,
    command.ending(),
  ):
    evaluate.main([])
  assert ended.value.code == 3
  assert "18 questions, 5 asked" in capsys.readouterr().out
  assert report.load(out).data["count"] == 5


def _refused(capsys, **options):
  """Message of the command in this process; it must end with 2."""
  flags.FLAGS.mark_as_parsed()
  with (
    flagsaver.flagsaver(**options),
    pytest.raises(SystemExit) as ended,
    command.ending(),
  ):
    evaluate.main([])
  assert ended.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  return error


def test_mistakes(made, options, capsys, tmp_path):
  good = {name: str(value) for name, value in options.items()}
  nowhere = str(tmp_path / "nowhere")
  for change, message in (
    ({"model": nowhere}, f"{nowhere} is no folder of a model"),
    ({"model": None}, "give --model to ask, or only --out to report"),
    ({"data": nowhere}, f"{nowhere} does not exist; correct --data"),
    ({"features": nowhere}, "holds no index*.jsonl"),
    ({"benchmark": "videommee"}, "no benchmark 'videommee'; choose one of"),
    ({"benchmark": "videomme"}, "looks like Records"),
    ({"subtitles": True}, "has no subtitles"),
    ({"worker": "1"}, "--worker=1; write index/count"),
    ({"worker": "3/2"}, "worker 3 of 2; the first is 0, the last 1"),
    ({"worker": "0/0"}, "--worker=0/0; write index/count"),
    (
      {"model": None, "compare": [nowhere]},
      "give --model to ask, or only --out",
    ),
    ({"model": None, "worker": "0/2"}, "give --model to ask, or only --out"),
    ({"compare": [nowhere]}, f"{nowhere} is no folder of a model"),
    ({"compare": [good["model"]]}, "cannot be compared with itself"),
    ({"names": ["a", "b"]}, "2 different names for 1 models"),
    ({"tokenizer": nowhere}, "nowhere"),
  ):
    assert message in _refused(capsys, **{**good, **change}), change


def test_wrong_folders_to_write_to(
  made, options, capsys, tmp_path, monkeypatch
):
  def load(folder, tokenizer):
    return Model("another model")

  monkeypatch.setattr(hourjax, "load", load, raising=False)
  good = {name: str(value) for name, value in options.items()}
  out = tmp_path / "out"
  Records(out).claim({"model": "one", "benchmark": "records"})
  message = _refused(capsys, **good, out=str(out))
  assert "model is 'one' there and 'another model' here" in message
  (tmp_path / "file").write_text("")
  message = _refused(capsys, **good, out=str(tmp_path / "file"))
  assert "cannot be written to" in message
  message = _refused(capsys, **good, out=str(tmp_path), worker="3/3")
  assert "worker 3 of 3" in message
  message = _refused(capsys, **{**good, "model": None}, out=str(tmp_path))
  assert "no folder of an evaluation" in message
