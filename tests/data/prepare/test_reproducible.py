"""The same inputs and options give the same bytes, whatever else differs."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from hourjax.data.columns import Measures
from hourjax.data.records.example import encode_record, features
from hourjax.data.records.record import parse_record

ROOT = pathlib.Path(__file__).parents[3]

# Many small records of every modality; the first run is broken off midway.
_RUN = """
import pathlib, sys
from hourjax.data.prepare import build
from hourjax.data.prepare.lists import Item, parse_rule
from hourjax.data.prepare.lists import Options
import dataclasses
build.WORTH_A_PROCESS, build.CHUNK = 10, 7
folder, tokenizer, media = map(pathlib.Path, sys.argv[1:4])
workers, broken = int(sys.argv[4]), sys.argv[5] == "broken"
half = dataclasses.replace(
  Item.of_files([str(folder / "r.json")]), rule=parse_rule("random:70%", "")
)
options = Options(
  items=(
    half,
    Item.of_files([str(folder / "t.csv")], "questions"),
    Item.of_files([str(folder / "p.jsonl")]),
  ),
  tokenizer=str(tokenizer),
  media=str(media),
)
if broken:
  added = build.PreparedWriter.add_encoded
  count = 0
  def stop(self, *args):
    global count
    count += 1
    if count == 50:
      raise KeyboardInterrupt
    added(self, *args)
  build.PreparedWriter.add_encoded = stop
  try:
    build.build("d", options, workers=workers)
    sys.exit("not broken off")
  except KeyboardInterrupt:
    build.PreparedWriter.add_encoded = added
build.build("d", options, workers=workers)
"""


def _talk(i):
  mark = "<image>\n" if i % 3 else ""
  return [
    {"from": "human", "value": f"{mark}What is {i} " + "and so on " * (i % 9)},
    {"from": "gpt", "value": "Ünder " * (1 + i % 7)},
  ]


def _record(i):
  raw = {"id": i % 90, "conversations": _talk(i), "task": f"t{i % 11}"}
  raw |= [{}, {"video": "a.mp4"}, {"image": "i.png"}][i % 3]
  raw |= {"data_source": f"s{i % 5}"} if i % 4 else {"topic": "object"}
  return raw if i % 17 else {"id": i}


def _files(folder):
  """Name -> digest of every file of the dataset."""
  return {
    path.relative_to(folder).as_posix(): hashlib.sha256(
      path.read_bytes()
    ).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def test_a_conversation_is_written_in_one_order():
  record = parse_record(_record(4), "here")
  encoded = encode_record(record, Measures(2, 30, 20, 10, 1, 40, 30))
  names = sorted(features())
  names[names.index("turns") :] = ["turns/from", "turns/value", "width"]
  places = [encoded.index(b"\n" + bytes([len(n)]) + n.encode()) for n in names]
  assert places == sorted(places)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs")
  raws = [_record(i) for i in range(200)]
  (folder / "r.json").write_text(json.dumps(raws))
  lines = map(json.dumps, [{"conversations": _talk(3 * i)} for i in range(40)])
  (folder / "p.jsonl").write_text("\n".join([*lines, "{"]))
  rows = [f"v{i % 9}.mp4,Who is {i}?,Ann,s{i % 3}" for i in range(60)]
  (folder / "t.csv").write_text(
    "\n".join(["video,question,answer,source", *rows, ",a,b,c"])
  )
  return folder


@pytest.mark.slow
def test_runs_give_the_same_bytes(tmp_path, inputs, tokenizer_folder, media):
  found = []
  for seed, workers, how in (("1", 1, "whole"), ("2", 2, "broken")):
    folder = tmp_path / seed
    folder.mkdir()
    done = subprocess.run(
      [
        *(sys.executable, "-c", _RUN, inputs, tokenizer_folder, media),
        *(str(workers), how),
      ],
      cwd=folder,
      env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["d"]
    found.append(_files(folder / "d"))
  assert {"columns.npz", "summary.json", "skipped.jsonl"} < found[0].keys()
  assert any("array_record" in name for name in found[0])
  assert found[0] == found[1]
