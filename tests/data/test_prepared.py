import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from hourjax.data import prepared
from hourjax.data.columns import MODALITIES, Measures
from hourjax.data.prepared import Prepared, PreparedWriter
from hourjax.data.records.record import Record, Turn
from hourjax.errors import UserError
from tests import tampering


def _random_record(rng, number):
  def text():
    letters = 'ab \n"\\é中\u2028\U0001f600\0'
    return "".join(rng.choices(letters, k=rng.randrange(1, 40)))

  modality = rng.choice(MODALITIES)
  count = {"text": 0, "video": 1, "image": rng.randrange(1, 4)}[modality]
  talk = [Turn(("human", "gpt")[i % 2], text()) for i in range(2 * count + 2)]
  return Record(
    id=f"{number} {text()}",
    modality=modality,
    media=tuple(f"é {i}.x" for i in range(count)),
    turns=tuple(talk),
    source=rng.choice(("a", "b ü")),
    extra={"n": [1.5, None, {"k": text()}], "i": rng.getrandbits(40)},
  )


def _measures(rng, record):
  numbers = [rng.randrange(10_000) for _ in range(6)]
  return Measures(MODALITIES.index(record.modality), *numbers)


def _write(folder, items, **about):
  with PreparedWriter(folder, tokenizer_id="t1", about=about) as writer:
    for record, measures in items:
      writer.add(record, measures, stream="s", duration=1.5, num_frames=3)


@pytest.fixture
def items(monkeypatch):
  monkeypatch.setattr(prepared, "SHARD", 7)  # so that there are several
  rng = random.Random()
  records = [_random_record(rng, i) for i in range(20)]
  return [(record, _measures(rng, record)) for record in records]


def test_what_is_written_is_read(tmp_path, items):
  _write(tmp_path / "d", items, made="here")
  data = Prepared(tmp_path / "d")
  assert len(data) == len(items)
  assert data.about["tokenizer_id"] == "t1"
  assert data.about["made"] == "here"
  assert list(data.records) == [record for record, _ in items]
  for name in Measures._fields:
    expected = [getattr(measures, name) for _, measures in items]
    np.testing.assert_array_equal(getattr(data.columns, name), expected)
  files = sorted(p.name for p in (tmp_path / "d").glob("*array_record*"))
  assert len(files) == 3
  assert files[0] == "hourjax-train.array_record-00000-of-00003"


def test_random_access(tmp_path, items):
  _write(tmp_path / "d", items)
  records = Prepared(tmp_path / "d").records
  assert records[-1] == items[-1][0]
  assert records[np.int64(8)] == items[8][0]
  for index in (20, -21):
    with pytest.raises(IndexError, match=f"{index} of 20"):
      records[index]
  order = [random.randrange(20) for _ in range(200)]
  with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(records.__getitem__, order))
  assert found == [items[i][0] for i in order]


def test_tfds_and_grain_open_it(tmp_path, items):
  folder = tmp_path / "videos" / "1.0.0"
  _write(folder, items)
  first = items[0][0]
  sources = {
    "by name": tfds.data_source("videos", data_dir=tmp_path, split="train"),
    "folder": tfds.builder_from_directory(folder).as_data_source("train"),
  }
  sources["grain"] = grain.MapDataset.source(sources["folder"])
  for source in sources.values():
    assert len(source) == len(items)
    assert source[0]["id"].decode() == first.id
    turns = [value.decode() for value in source[0]["turns"]["value"]]
    assert turns == [turn.text for turn in first.turns]
    assert source[0]["tokens"] == items[0][1].tokens
    assert source[0]["duration"] == 1.5
  raw = grain.sources.ArrayRecordDataSource(
    sorted(str(path) for path in folder.glob("*array_record*"))
  )
  assert len(raw) == len(items)
  features = tfds.builder_from_directory(folder).info.features
  last = features.deserialize_example_np(raw[len(items) - 1])
  assert last["id"].decode() == items[-1][0].id


@pytest.mark.slow
def test_tensorflow_is_not_needed(tmp_path):
  code = """
import sys
from hourjax.data.prepared import Prepared, PreparedWriter
from hourjax.data.columns import Measures
from hourjax.data.records.record import Record, Turn
turns = (Turn("human", "a"), Turn("gpt", "b"))
with PreparedWriter(sys.argv[1], tokenizer_id="t") as writer:
  record = Record("1", "text", (), turns, "", {})
  writer.add(record, Measures(0, 1, 1, 1))
assert Prepared(sys.argv[1]).records[0].turns == turns
assert "tensorflow" not in sys.modules
"""
  command = [sys.executable, "-c", code, str(tmp_path / "d")]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_an_interrupted_run_leaves_nothing_that_opens(tmp_path, items):
  interrupted = PreparedWriter(tmp_path / "d", tokenizer_id="t")
  with pytest.raises(KeyboardInterrupt), interrupted as writer:
    writer.add(*items[0])
    raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())
  # Killed: no clean-up.
  killed = PreparedWriter(tmp_path / "d", tokenizer_id="t")
  killed.add(*items[0])
  with pytest.raises(UserError, match="is no prepared dataset"):
    Prepared(tmp_path / "d")
  with pytest.raises(UserError, match="is no prepared dataset"):
    Prepared(killed.partial)
  _write(tmp_path / "d", items[1:3])
  assert len(Prepared(tmp_path / "d")) == 2
  assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_an_older_dataset_stays_until_the_new_one_is_complete(tmp_path, items):
  _write(tmp_path / "d", items)
  failing = PreparedWriter(tmp_path / "d", tokenizer_id="t")
  with pytest.raises(RuntimeError), failing as writer:
    writer.add(*items[0])
    raise RuntimeError
  assert len(Prepared(tmp_path / "d")) == len(items)
  _write(tmp_path / "d", items[:4])
  assert len(Prepared(tmp_path / "d")) == 4


def test_damaged_datasets(tmp_path, items):
  _write(tmp_path / "d", items)
  about = tmp_path / "d" / "about.json"
  text = about.read_text()
  for content, message in (
    ("{", "is no prepared dataset"),
    (json.dumps(json.loads(text) | {"format": 0}), "format 0, this code reads"),
    (json.dumps(json.loads(text) | {"conversations": 5}), "20 .* and 5 in"),
  ):
    about.write_text(content)
    with pytest.raises(UserError, match=message):
      Prepared(tmp_path / "d")
  about.write_text(text)
  (tmp_path / "d" / "columns.npz").write_bytes(b"PK")
  with pytest.raises(UserError, match=r"columns\.npz cannot be read"):
    Prepared(tmp_path / "d")
  with pytest.raises(UserError, match="is no prepared dataset"):
    Prepared(tmp_path / "none")


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"conversations": None}, "conversations is None"),
    ({"conversations": ["a"]}, "conversations is .'a'."),
    ({"conversations": True}, "conversations is True"),
    ({"conversations": 10**30}, "and 10{30} in about.json"),
    ({"tokenizer_id": 5}, "tokenizer_id is 5"),
    ({"options": ["a"]}, "options is .'a'."),
    ({"format": "2"}, "format is '2'"),
    ({"format": 2**70}, "has format 1180591620717411303424"),
    (None, "the whole is None"),
    (["format"], "the whole is .'format'."),
  ],
)
def test_about_with_values_of_other_kinds(tmp_path, items, change, said):
  _write(tmp_path / "d", items)
  path = tmp_path / "d" / "about.json"
  if isinstance(change, dict):
    change = json.loads(path.read_text()) | change
  path.write_text(json.dumps(change))
  with pytest.raises(UserError, match=said):
    Prepared(tmp_path / "d")


@pytest.mark.parametrize(
  "name", ["about.json", "features.json", "dataset_info.json", "columns.npz"]
)
@pytest.mark.parametrize(
  ("content", "said"),
  [
    (tampering.POINTER, "Git-LFS pointer"),
    (b'{"a": ' + b"[" * 20_000, "too deep|cannot be read"),
    (b"", "not JSON|cannot be read"),
    ("folder", "is a folder"),
    ("missing", "does not exist"),
    ("pipe", "no regular file"),
  ],
)
def test_files_that_are_something_else(tmp_path, items, name, content, said):
  _write(tmp_path / "d", items)
  path = tmp_path / "d" / name
  path.unlink()
  if content == "folder":
    path.mkdir()
  elif content == "pipe":
    os.mkfifo(path)
  elif content != "missing":
    path.write_bytes(content)
  with pytest.raises(UserError, match=f"{name}.*({said})"):
    Prepared(tmp_path / "d")


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"fileFormat": "tfrecord"}, "as tfrecord, not of train as array_record"),
    ({"splits": []}, "not of train"),
    ({"splits": [{"name": "train", "shardLengths": []}]}, "tells of no file"),
    ({"splits": [{"name": "train", "shardLengths": [20]}]}, "Lengths.0 is 20"),
    (
      {"splits": [{"name": "train", "shardLengths": ["7", "8", "5"]}]},
      "-00001-of-00003 holds 7 conversations, dataset_info.json says '8'",
    ),
    (
      {"splits": [{"name": "train", "shardLengths": ["20"]}]},
      "-00000-of-00001 does not exist",
    ),
  ],
)
def test_a_description_of_other_files(tmp_path, items, change, said):
  _write(tmp_path / "d", items)
  path = tmp_path / "d" / "dataset_info.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError, match=said):
    Prepared(tmp_path / "d")


def test_files_of_two_datasets(tmp_path, items):
  """As many conversations, but others: never a row of the wrong size."""
  _write(tmp_path / "one", items[:7])
  _write(tmp_path / "two", items[7:14])
  name = "hourjax-train.array_record-00000-of-00001"
  (tmp_path / "two" / name).replace(tmp_path / "one" / name)
  records = Prepared(tmp_path / "one").records
  with pytest.raises(UserError, match=r"conversation 0 .* different datasets"):
    records[0]


def test_a_truncated_file_is_named(tmp_path, items):
  _write(tmp_path / "d", items)
  for path in (tmp_path / "d").glob("*array_record*"):
    path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(UserError, match=f"of {tmp_path / 'd'} cannot be read"):
    Prepared(tmp_path / "d").records[0]


_FULL = """
import os, resource, signal, sys
from hourjax.data.prepared import PreparedWriter
from hourjax.data.columns import Measures
from hourjax.data.records.record import Record, Turn
# As on a full disk: no file may grow beyond 1 MiB.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
text = os.urandom(100_000).hex()
record = Record("1", "text", (), (Turn("human", text),), "", {})
try:
  with PreparedWriter(sys.argv[1], tokenizer_id="t") as writer:
    for _ in range(40):
      writer.add(record, Measures(0, 1, 1, 1))
except ValueError as error:
  print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_full_disk_is_an_error(tmp_path):
  command = [sys.executable, "-c", _FULL, str(tmp_path / "d")]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.stdout.startswith("UserError cannot write "), done.stderr
  assert "File too large" in done.stdout
  assert not list(tmp_path.iterdir())


def test_an_empty_dataset_is_refused(tmp_path):
  writer = PreparedWriter(tmp_path / "d", tokenizer_id="t")
  with pytest.raises(UserError, match="would hold no conversation"), writer:
    pass
  assert not list(tmp_path.iterdir())
