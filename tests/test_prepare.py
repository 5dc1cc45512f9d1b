"""The command, seen from a shell."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hourjax.data.demo import build as demo
from hourjax.data.prepared import Prepared

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("demo")
  options = demo.Options(train_videos=3, test_scale=0.02, conversations=3)
  demo.build(folder, options)
  return folder


def _command(data, out, *arguments):
  return [
    *(sys.executable, "-m", "hourjax.prepare"),
    *(f"--out={out}", f"--tokenizer={data / 'tokenizer'}", *arguments),
  ]


def _run(data, out, *arguments):
  return subprocess.run(
    _command(data, out, *arguments),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_the_demo_is_prepared(data, tmp_path):
  files = [f"--records={data / name}.json" for name in ("train", "test")]
  arguments = [*files, f"--media={data / 'videos'}"]
  done = _run(data, tmp_path / "d", *arguments)
  assert done.returncode == 0, done.stderr
  records = [
    record
    for name in ("train", "test")
    for record in json.loads((data / f"{name}.json").read_text())
  ]
  prepared = Prepared(tmp_path / "d")
  assert [r.id for r in prepared.records] == [r["id"] for r in records]
  durations = {r["video"]: r["duration"] for r in records}
  columns = prepared.columns
  assert dict(zip(columns.videos, columns.duration)) == durations
  assert done.stdout.startswith(f"wrote {tmp_path / 'd'}\n")
  assert "nothing was dropped" in done.stdout
  assert "source demo" in done.stdout
  assert "prepare: 100%" in done.stderr
  pictures = {path.name for path in (tmp_path / "d").glob("*.png")}
  names = {"sources.png", "topics.png", "durations.png", "tasks.png"}
  assert pictures == names
  summary = json.loads((tmp_path / "d" / "summary.json").read_text())
  questions = [q for record in records for q in record["questions"]]
  assert sum(summary["tasks"].values()) == len(questions)
  assert summary["topics"]["object"] == sum(
    q["topic"] == "object" for q in questions
  )
  again = _run(data, tmp_path / "d", *arguments)
  assert again.stdout == done.stdout.replace("wrote", "reused", 1)


def test_a_table_by_mapped_columns(data, tmp_path):
  table = tmp_path / "t.csv"
  lines = [f"x.mp4,Who is {i}?,Ann,b,c" for i in range(7)]
  table.write_text("\n".join(["film,q,right,one,two", *lines, ",Who?,Ann,b,c"]))
  mapping = "--columns=video=film,answer=right,source=one"
  options = [mapping, "--media_prefix=all/{data_source}"]
  done = _run(data, tmp_path / "d", f"--questions={table}", *options)
  assert done.returncode == 0, done.stderr
  records = Prepared(tmp_path / "d").records
  assert [len(record.turns) for record in records] == [10, 4]
  assert records[0].media == ("all/b/x.mp4",)
  assert "1 no video" in done.stdout
  assert f"{table}, row 8: no video in column 'film'" in done.stdout


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "nothing to prepare; give --records, --questions or --mix"),
    (["--records={}/none.json"], "none.json: No such file or directory"),
    (["--mix={}/none.yaml"], "none.yaml: No such file or directory"),
    (
      ["--questions={}/train.json"],
      "no column for the question; its columns are 'id', 'video'",
    ),
    (["--records={}/train.json", "--columns=x"], "write ROLE=COLUMN"),
    (["--records={}/train.json", "--tokenizer=/none"], "/none does not exist"),
    (["--records={}/train.json", "--features=/none"], "hourjax.extract"),
    (["--records={}/train.json", "--media=/none"], "/none does not exist"),
  ],
)
def test_mistakes(data, tmp_path, arguments, message):
  arguments = [argument.format(data) for argument in arguments]
  done = _run(data, tmp_path / "d", *arguments)
  assert done.returncode == 2
  assert "Traceback" not in done.stderr
  errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  assert len(errors) == 1
  assert message in errors[0]
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_opens(data, tmp_path):
  record = json.loads((data / "train.json").read_text())[0]
  big = tmp_path / "big.jsonl"
  with open(big, "w") as file:
    for i in range(30_000):
      file.write(json.dumps({**record, "id": i}) + "\n")
  out = tmp_path / "out" / "d"
  process = subprocess.Popen(
    _command(data, out, f"--records={big}", "--workers=1"),
    cwd=ROOT,
    stderr=subprocess.DEVNULL,
  )
  partial = out.with_name(".d.partial")
  end = time.monotonic() + 60
  while not (partial / "shard-0").exists() and time.monotonic() < end:
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert partial.exists()
  assert not out.exists()
  done = _run(data, out, f"--records={big}", "--workers=2")
  assert done.returncode == 0, done.stderr
  assert [path.name for path in out.parent.iterdir()] == ["d"]
  assert len(Prepared(out)) == 30_000
