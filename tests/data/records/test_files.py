import gzip
import json
import random
import subprocess
import sys

import pytest

from hourjax.data.records.files import read_records, stream_records
from hourjax.errors import UserError


def _raw(*values, **fields):
  roles = ("human", "gpt")
  turns = [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)]
  return {"id": "r1", "conversations": turns, **fields}


VIDEO = _raw("<image>\nWho?", "Ann.", video="a/b.mp4")


def _write(path, content):
  text = content if isinstance(content, str) else json.dumps(content)
  path.write_text(text, encoding="utf-8")
  return path


def test_bad_records_are_skipped_and_reported(tmp_path):
  raws = [VIDEO, {**VIDEO, "id": 5, "video": ""}, "x", {**VIDEO, "id": "r3"}]
  path = _write(tmp_path / "a.json", raws)
  records, skipped = read_records(path)
  assert [r.id for r in records] == ["r1", "r3"]
  assert [s.id for s in skipped] == ["5", f"{path}[2]"]
  assert skipped[0].reason.startswith(f"{path}[1]: record 5: 'video' must")


def test_jsonl(tmp_path):
  odd = _raw("Hi\u2028there", "Hello")
  lines = [
    json.dumps(VIDEO),
    "",
    "{broken",
    json.dumps(odd, ensure_ascii=False),
  ]
  path = _write(tmp_path / "a.jsonl", "\n".join(lines) + "\n")
  records, skipped = read_records(path)
  assert [len(r.turns) for r in records] == [2, 2]
  assert records[1].turns[0].text == "Hi\u2028there"
  assert [s.id for s in skipped] == [f"{path}:3"]
  assert "not JSON" in skipped[0].reason


def test_questions_without_answers(tmp_path):
  path = _write(tmp_path / "a.json", [_raw("Why?")])
  assert len(read_records(path)[1]) == 1
  records, skipped = read_records(path, require_answer=False)
  assert (len(records), skipped) == (1, [])


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.json", "", "is empty"),
    ("a.jsonl", " \n", "is empty"),
    ("a.json", "[1, 2", "is not valid JSON .* name it .jsonl"),
    ("a.json", '{"data": 3}', "an object without a list .keys .data"),
    ("a.jsonl", "[]\nx", "none of its 2 lines is a JSON record"),
  ],
)
def test_files_that_are_no_record_lists(tmp_path, name, content, message):
  path = _write(tmp_path / name, content)
  with pytest.raises(UserError, match=message) as error:
    read_records(path)
  assert str(path) in str(error.value)


def test_unreadable_files(tmp_path):
  with pytest.raises(UserError, match=r"cannot read .*none\.json: No such"):
    read_records(tmp_path / "none.json")
  with pytest.raises(UserError, match="Is a directory"):
    read_records(tmp_path)
  binary = tmp_path / "a.json"
  binary.write_bytes(b"\x80\x02\xff")
  with pytest.raises(UserError, match="is not UTF-8 text"):
    read_records(binary)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_stream_gives_what_json_gives(tmp_path, name):
  rng = random.Random()
  raws = [
    {
      "id": i,
      "text": "".join(
        chr(rng.choice((65, 233, 0x4E2D, 0x1F600))) for _ in "abc"
      )
      * rng.randrange(3000),
      "n": [rng.random() * 10 ** rng.randrange(-9, 9), rng.getrandbits(50)],
      "o": {"none": None, "yes": rng.random() < 0.5, "e\u2028": ['\n"\\']},
    }
    for i in range(200)
  ]
  ascii_ = rng.random() < 0.5
  if name.endswith("l"):
    text = "".join(json.dumps(r, ensure_ascii=ascii_) + "\n" for r in raws)
  else:
    text = json.dumps(raws, ensure_ascii=ascii_, indent=rng.choice((None, 1)))
  path = tmp_path / name
  path.write_bytes(rng.choice((b"", b"\xef\xbb\xbf")) + text.encode())
  assert [raw for _, raw in stream_records(path)] == raws


def test_a_list_that_breaks_in_the_middle_tells_where(tmp_path):
  # Far beyond one block of the parser, with characters of several bytes.
  good = [{**VIDEO, "id": i, "note": "é" * 5000} for i in range(40)]
  start = json.dumps(good, ensure_ascii=False)[:-1] + ", "
  path = tmp_path / "a.json"
  path.write_text(start + '{"id": tru}, {"id": 3}]', encoding="utf-8")
  read = []
  with pytest.raises(UserError, match="after 40 whole records") as error:
    for where, raw in stream_records(path):
      read.append((where, raw))
  assert [raw for _, raw in read] == good
  assert read[7][0] == f"{path}[7]"
  byte = len((start + '{"id": tru}').encode())
  assert f"at byte {byte} " in str(error.value)
  assert "fetch it again" in str(error.value)


def test_bytes_that_are_not_utf8_are_counted(tmp_path):
  for name, head in (("a.json", '["'), ("a.jsonl", '{"a": 1}\n"')):
    path = tmp_path / name
    text = (head + "é" * 50_000).encode()
    path.write_bytes(text + b"\xc3")
    with pytest.raises(UserError, match=f"not UTF-8 text .byte {len(text)}: "):
      list(stream_records(path))


def test_a_list_named_jsonl_does_not_fill_the_memory(tmp_path):
  path = tmp_path / "a.jsonl"
  with open(path, "wb") as file:
    file.write(b'["')
    file.truncate(70 << 20)
  with pytest.raises(UserError, match=r":1 is longer than 64 MiB.*\.json"):
    list(stream_records(path))


def _gzip(content):
  return gzip.compress(json.dumps(content).encode())


GOOD = [{**VIDEO, "id": f"r{i}"} for i in range(3)]
LINES = "\n".join(map(json.dumps, GOOD))
NAN = json.dumps([{**raw, "task": float("nan")} for raw in GOOD])
FORMS = {
  "a.json": json.dumps({"version": "1.0", "data": GOOD}).encode(),
  "b.json": LINES.encode(),
  "c.json": b"\xef\xbb\xbf" + LINES.encode(),
  "d.json.gz": _gzip(GOOD),
  "e.JSONL.gz": gzip.compress(LINES.encode()),
  "f.json": _gzip({"train": GOOD}),
  "g.json": NAN.encode(),
  "h.jsonl": LINES.replace("{", '{"task": NaN, ').encode(),
  "i.json": json.dumps(GOOD).replace("{", '{"n": -1e999, ').encode(),
  "j.data": json.dumps(GOOD, indent=2).replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_a_list(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(FORMS[name])
  records, skipped = read_records(path)
  assert ([r.id for r in records], skipped) == (["r0", "r1", "r2"], [])
  assert all(value in (None, "") for r in records for value in r.extra.values())


OTHER = {
  "one.json": (json.dumps(VIDEO).encode(), "holds one record, not a list"),
  "coco.json": (b'{"a": [1], "b": [2]}', "several lists \\('a', 'b'\\)"),
  "columns.json": (b'{"a": {"0": 1}}', "object without a list \\(keys 'a'"),
  "page.json": (b"<!DOCTYPE html>", "is a web page or XML, not JSON"),
  "lfs.json": (b"version https://git-lfs.github.com", "is a Git-LFS pointer"),
  "zip.json": (b"PK\x03\x04" + bytes(9), "is a zip archive; unpack it"),
  "table.json": (b"PAR1" + bytes(9), "parquet file; name it .parquet"),
  "wide.json": ("[1]".encode("utf-16"), "but UTF-16; save it as UTF-8"),
  "wide2.json": ("[1, 2]".encode("utf-16-le"), "but UTF-16; save it as UTF-8"),
  "zeros.json": (bytes(99), "starts with zeros, as a download does"),
  "cut.json.gz": (_gzip(GOOD)[:-9], "cannot be unpacked"),
  "latin.json": ('["é"]'.encode("latin-1"), "not UTF-8 text .byte 2: "),
  "comma.json": (b"[1,]", "a comma before the closing bracket, at byte 3"),
  "deep.json": (b"[" * 200 + b"]" * 200, "nested too deep"),
}


@pytest.mark.parametrize("name", OTHER)
def test_files_of_another_kind_are_named(tmp_path, name):
  content, message = OTHER[name]
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    list(stream_records(path))
  assert str(path) in str(error.value)


def test_devices_are_not_read():
  with pytest.raises(UserError, match="/dev/zero is no regular file"):
    list(stream_records("/dev/zero"))


def test_a_line_nested_too_deep_costs_itself(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text("\n".join(["[" * 9999 + "]" * 9999, LINES, "1" * 9999]))
  records, skipped = read_records(path)
  assert (len(records), len(skipped)) == (3, 2)
  assert "nested too deep" in skipped[0].reason


_MEMORY = """
import sys
from hourjax.benchmarks.figures import peak_mib as peak
from hourjax.data.records.files import stream_records
records = iter(stream_records(sys.argv[1]))
next(records)
before = peak()
print(1 + sum(1 for _ in records), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_memory_stays_flat(tmp_path, name):
  lines = name.endswith("l")
  count, raw = 60_000, {**VIDEO, "note": "word " * 400}
  path = tmp_path / name
  with open(path, "w") as file:
    file.write("" if lines else "[")
    for i in range(count):
      comma = "" if lines or i == count - 1 else ","
      file.write(json.dumps({**raw, "id": i}) + comma + "\n")
    file.write("" if lines else "]")
  assert path.stat().st_size > 100 << 20
  done = subprocess.run(
    [sys.executable, "-c", _MEMORY, str(path)],
    capture_output=True,
    text=True,
    check=True,
  )
  found, grown = done.stdout.split()
  assert int(found) == count
  assert float(grown) < 16  # MiB
