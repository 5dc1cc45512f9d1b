"""JSON lines in a folder, in TensorStore, and after every kind of kill."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import uuid

import pytest

from hourjax import schema
from hourjax.errors import UserError
from hourjax.jsonl import JsonlWriter, parse_rows, read_rows, read_valid_rows
from hourjax.storage import Folder, open_storage


@pytest.fixture(params=["folder", "file", "memory"])
def store(request, tmp_path):
  """The same contract over a folder and over TensorStore."""
  if request.param == "folder":
    return open_storage(tmp_path / "store")
  if request.param == "file":
    return open_storage(f"file://{tmp_path}/store")
  return open_storage(f"memory://{uuid.uuid4().hex}")


def test_rows_of_many_threads_all_arrive(store):
  writer = JsonlWriter(store, "log.jsonl", [{"n": -1}])
  threads = [
    threading.Thread(
      target=lambda k=k: [writer.add({"n": 20 * k + i}) for i in range(20)]
    )
    for k in range(8)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  rows = read_rows(store, "log.jsonl")
  assert sorted(row["n"] for row in rows) == list(range(-1, 160))


@pytest.mark.parametrize("torn", [b'{"n": 2, "x', b"", b'{"n"', b"7"])
def test_a_torn_last_line_is_dropped_and_mended(store, torn):
  store.write("log.jsonl", b'{"n": 1}\n' + torn)
  assert read_rows(store, "log.jsonl") == [{"n": 1}]
  JsonlWriter(store, "log.jsonl").add({"n": 3})
  assert store.read("log.jsonl") == b'{"n": 1}\n{"n": 3}\n'


@pytest.mark.parametrize("whole", [b"", b'{"n": 1}\n'])
def test_a_last_line_without_its_end_counts_if_it_is_whole(store, whole):
  store.write("log.jsonl", whole + b'{"n": 2}')
  assert read_rows(store, "log.jsonl")[-1] == {"n": 2}
  JsonlWriter(store, "log.jsonl").add({"n": 3})
  assert store.read("log.jsonl") == whole + b'{"n": 2}\n{"n": 3}\n'


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path):
  """Of the file's end no more is read than the torn line needs."""
  whole = b'{"n": 1}\n'
  for torn in (b'{"x": "' + b"y" * 200_000, b"z" * 2**16, b"z" * (2**16 - 9)):
    (tmp_path / "log.jsonl").write_bytes(whole + torn)
    writer = JsonlWriter.at(tmp_path / "log.jsonl")
    writer.open()
    assert (tmp_path / "log.jsonl").read_bytes() == whole
    writer.close()


@pytest.mark.parametrize("line", ["{", "5", "[]", "\ufffd{"])
def test_a_broken_line_is_named(store, line):
  store.write("log.jsonl", f'{{"n": 1}}\n{line}\n{{"n": 2}}\n'.encode())
  with pytest.raises(UserError, match=r"log\.jsonl, line 2 is broken"):
    read_rows(store, "log.jsonl")
  rows = list(parse_rows(store.read("log.jsonl")))
  assert rows == [(1, {"n": 1}), (3, {"n": 2})]


def test_what_is_there_is_replaced_on_demand(store):
  store.write("log.jsonl", b'{"n": 1}\n')
  writer = JsonlWriter(store, "log.jsonl", [{"n": 0}])
  assert store.read("log.jsonl") == b'{"n": 1}\n'  # nothing is written yet
  writer.open()
  assert store.read("log.jsonl") == b'{"n": 0}\n'
  writer.add({"n": 2}, {"n": 3})
  writer.add()
  assert read_rows(store, "log.jsonl") == [{"n": 0}, {"n": 2}, {"n": 3}]


def test_a_closed_writer_goes_on_where_it_was(store):
  writer = JsonlWriter(store, "log.jsonl", [{"n": 0}])
  for n in (1, 2):
    writer.add({"n": n})
    writer.close()
  assert [row["n"] for row in read_rows(store, "log.jsonl")] == [0, 1, 2]


class _FullDisk:
  """A file of which only some bytes can be written."""

  def __init__(self, file, room):
    self._file, self.room = file, room

  def write(self, data):
    if not self.room:
      raise OSError(28, "No space left on device")
    count = min(self.room, len(data))
    self.room -= count
    return self._file.write(data[:count])

  def close(self):
    self._file.close()


def test_rows_that_found_no_space_are_written_later(tmp_path):
  writer = JsonlWriter.at(tmp_path / "log.jsonl", [])
  writer.add({"n": 1})
  full = writer._file = _FullDisk(writer._file, room=3)
  for n in (2, 3):
    with pytest.raises(OSError, match="No space left"):
      writer.add({"n": n})
  assert (tmp_path / "log.jsonl").read_bytes() == b'{"n": 1}\n{"n'
  full.room = 10**6
  writer.close()  # tries them once more
  rows = read_rows(Folder(tmp_path), "log.jsonl")
  assert rows == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_kill_when_the_file_is_replaced_loses_nothing(tmp_path, monkeypatch):
  path = tmp_path / "log.jsonl"
  path.write_text('{"n": 1}\n')
  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      JsonlWriter.at(path, []).open()
  assert path.read_text() == '{"n": 1}\n'


def test_a_killed_process_loses_no_row_that_was_added(tmp_path):
  """SIGKILL, while another thread writes long lines."""
  code = f"""
    import os, signal, sys, threading
    from hourjax.jsonl import JsonlWriter
    writer = JsonlWriter.at({str(tmp_path / "log.jsonl")!r})
    for n in range(100):
      writer.add({{"n": n}})
    def rest():
      while True:
        writer.add({{"n": 100, "text": "x" * 10**6}})
    threading.Thread(target=rest, daemon=True).start()
    for _ in range(5):
      writer.add({{"n": 101}})
    os.kill(os.getpid(), signal.SIGKILL)
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    cwd=pathlib.Path(__file__).parents[1],
  )
  assert done.returncode == -signal.SIGKILL
  writer = JsonlWriter.at(tmp_path / "log.jsonl")
  writer.add({"n": 102})
  found = [row["n"] for row in read_rows(Folder(tmp_path), "log.jsonl")]
  assert found[:100] == list(range(100)) and found[-1] == 102
  assert found.count(101) == 5


def test_numbers_that_are_not_finite_are_json(tmp_path):
  writer = JsonlWriter.at(tmp_path / "log.jsonl")
  writer.add({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})

  def refuse(constant):
    raise ValueError(f"{constant} is no JSON")

  text = (tmp_path / "log.jsonl").read_text()
  row = json.loads(text, parse_constant=refuse)
  assert row == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.5}


class _Step(schema.Schema):
  step: int


class _Name(schema.Schema):
  name: str


def test_rows_of_several_kinds(tmp_path):
  path = tmp_path / "log.jsonl"
  kinds = {"step": _Step, "name": _Name}
  path.write_text(
    '{"step": 1, "name": 5}\n{"other": 1}\n{"to\n[1]\n{"name": "a"}\n'
  )
  # Of the first row only the first key counts.
  rows = read_valid_rows(path, kinds)
  assert rows == [{"step": 1, "name": 5}, {"name": "a"}]
  path.write_text('{"step": 1}\n{"name": 5}\n')
  with pytest.raises(UserError, match=r"log\.jsonl, line 2: name is 5.*delete"):
    read_valid_rows(path, kinds)
  with pytest.raises(UserError, match="does not exist; bring it back"):
    read_valid_rows(tmp_path / "none.jsonl", kinds)
