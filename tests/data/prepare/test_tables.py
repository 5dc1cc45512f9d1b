import collections
import csv
import gzip
import json
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from hourjax.data.prepare.question_tables import QuestionTable, read_rows
from hourjax.data.records.record import parse_record
from hourjax.errors import UserError


def _row(number, video, **more):
  return {
    "video": video,
    "question": f'Is this\n{number}, "é"?',
    "answer": f"a{number}",
    "topic": random.choice(("object", "scene")),
    "duration": 12.5,
    **more,
  }


def _rows(count):
  videos = [f"é {i}.mp4" for i in range(count // 9)]
  return [_row(i, random.choice(videos)) for i in range(count)]


def _save(path, rows, *, group=1000):
  name = path.name
  if name.endswith(".parquet"):
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=group)
  elif name.endswith(".jsonl"):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  elif name.endswith(".json"):
    path.write_text(json.dumps(rows))
  else:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
  return path


def _group(tmp_path, *paths, mapping=None):
  """Conversations, and rows that were left out."""
  skipped, steps = [], []
  table = QuestionTable(
    paths,
    mapping or {},
    tmp_path / "scratch",
    skip=lambda where, error: skipped.append((where, error.kind)),
    step=steps.append,
  )
  found = list(table)
  assert len(found) == len(table)
  table.close()
  assert not (tmp_path / "scratch").exists()
  return found, skipped, sum(steps)


FORMATS = ["t.parquet", "t.jsonl", "t.json", "t.csv", "t.csv.gz"]


@pytest.mark.parametrize("name", FORMATS)
def test_questions_of_a_video_become_conversations(tmp_path, name):
  rows = _rows(500)
  found, skipped, read = _group(tmp_path, _save(tmp_path / name, rows))
  assert (skipped, read) == ([], 500)
  expected = collections.defaultdict(list)
  for row in rows:
    expected[row["video"]].append(row)
  parts = collections.defaultdict(list)
  for where, raw in found:
    record = parse_record(raw, where)  # a record in every respect
    assert record.extra["duration"] == 12.5
    parts[raw["video"]].append(raw)
  assert parts.keys() == expected.keys()
  for video, raws in parts.items():
    sizes = [len(raw["questions"]) for raw in raws]
    assert set(sizes[:-1]) <= {5}
    assert 1 <= sizes[-1] <= 5
    assert [raw["id"] for raw in raws] == [
      f"{video}#{i}" for i in range(len(raws))
    ]
    turns = [turn for raw in raws for turn in raw["conversations"]]
    said = [turn["value"].removeprefix("<image>\n") for turn in turns]
    assert said[::2] == [row["question"] for row in expected[video]]
    assert said[1::2] == [row["answer"] for row in expected[video]]
    facts = [fact for raw in raws for fact in raw["questions"]]
    topics = [row["topic"] for row in expected[video]]
    assert [fact["topic"] for fact in facts] == topics
  ids = [raw["id"] for _, raw in found]
  assert len(set(ids)) == len(ids)


def test_the_result_does_not_depend_on_how_the_table_is_cut(tmp_path):
  rows = _rows(300)
  whole, _, _ = _group(tmp_path, _save(tmp_path / "a.parquet", rows, group=7))
  cut = random.randrange(1, 299)
  first = _save(tmp_path / "b1.csv", rows[:cut])
  second = _save(tmp_path / "b2.jsonl", rows[cut:])
  parts, _, _ = _group(tmp_path, first, second)
  assert [raw for _, raw in parts] == [raw for _, raw in whole]


def test_rows_are_left_out_with_their_reason(tmp_path):
  rows = [
    _row(0, "a.mp4"),
    _row(1, ""),
    _row(2, "a.mp4") | {"question": " "},
    _row(3, "a.mp4") | {"answer": None},
    _row(4, "a.mp4"),
  ]
  lines = [json.dumps(row) for row in rows]
  path = tmp_path / "t.jsonl"
  path.write_text("\n".join([*lines, "{", "3"]))
  found, skipped, read = _group(tmp_path, path)
  assert read == 7
  ((_, raw),) = found
  assert [fact["answer"] for fact in raw["questions"]] == ["a0", "a4"]
  kinds = ["no video", "no question", "no answer", "not a row", "not a row"]
  wheres = [f"{path}, row {i}" for i in (2, 3, 4, 6, 7)]
  assert skipped == list(zip(wheres, kinds))


def test_a_duration_that_one_row_tells_holds_for_all(tmp_path):
  rows = [_row(i, "a", duration=d) for i, d in enumerate((None, "", 7.5))]
  path = _save(tmp_path / "t.json", rows)
  ((_, raw),) = _group(tmp_path, path)[0]
  assert raw["duration"] == 7.5


def test_videos_of_two_sources_may_share_a_name(tmp_path):
  sources = ("panda", "ego4d", "panda", "ego4d")
  rows = [_row(i, "1.mp4", data_source=s) for i, s in enumerate(sources)]
  found, _, _ = _group(tmp_path, _save(tmp_path / "t.json", rows))
  answers = {
    raw["id"]: [fact["answer"] for fact in raw["questions"]] for _, raw in found
  }
  assert answers == {
    "panda/1.mp4#0": ["a0", "a2"],
    "ego4d/1.mp4#0": ["a1", "a3"],
  }
  assert {raw["data_source"] for _, raw in found} == {"panda", "ego4d"}


def test_columns_are_mapped_and_missed_per_file(tmp_path):
  rows = [{"vid": "a", "q": "Who?", "a": "Ann"}]
  path = _save(tmp_path / "t.parquet", rows)
  assert len(_group(tmp_path, path)[0]) == 1  # known names
  rows = [{"film": "a", "q": "Who?", "a": "Ann"}]
  path = _save(tmp_path / "u.parquet", rows)
  found, _, _ = _group(tmp_path, path, mapping={"video": ("film",)})
  assert found[0][1]["video"] == "a"
  message = "no column for the video; its columns are 'film', 'q', 'a'"
  with pytest.raises(UserError, match=message):
    QuestionTable(
      [path], {}, tmp_path / "x", skip=lambda *_: None, step=lambda n: None
    )


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_are_no_tables(tmp_path, name):
  path = tmp_path / name
  with pytest.raises(UserError, match="No such file") as error:
    list(read_rows(path))
  assert str(path) in str(error.value)
  path.write_bytes(b"\x1f\x8b\xff\xfe not a table \xff")
  with pytest.raises(UserError) as error:
    list(read_rows(path))
  assert str(path) in str(error.value)


def test_a_broken_line_of_csv_is_named(tmp_path):
  path = tmp_path / "t.csv"
  path.write_text('video,question,answer\na,b,c\na,"b" x,c\n')
  with pytest.raises(UserError, match=r"t\.csv is broken after line 2"):
    list(read_rows(path))


@pytest.mark.parametrize("name", ["t.csv.gz", "t.parquet"])
def test_damaged_files(tmp_path, name):
  path = _save(tmp_path / name, _rows(2000))
  whole = path.read_bytes()
  middle = len(whole) // 2
  for damaged in (
    whole[:middle],
    whole[:middle] + bytes(100) + whole[middle + 100 :],
  ):
    path.write_bytes(damaged)
    with pytest.raises(UserError) as error:
      list(read_rows(path))
    assert str(path) in str(error.value)


_MEMORY = """
import pathlib, sys
from hourjax.benchmarks.figures import peak_mib as peak
from hourjax.data.prepare.question_tables import QuestionTable
def table(path, name):
  return QuestionTable([path], {}, path.parent / name,
    skip=lambda *_: None, step=lambda n: None)
small, large = map(pathlib.Path, sys.argv[1:])
list(table(small, "s1"))
before = peak()
print(sum(1 for _ in table(large, "s2")), peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path):

  def text():
    return random.randbytes(500).hex()  # does not compress well

  rows = [
    _row(i, f"v{i % 4000}", question=text(), answer=text()) for i in range(4000)
  ]
  table = pyarrow.Table.from_pylist(rows)
  # The small table has several row groups too, so that what Arrow's allocator
  # and threads keep is in both figures.
  small, large = tmp_path / "s.parquet", tmp_path / "l.parquet"
  for path, groups in ((small, 5), (large, 30)):
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
      for _ in range(groups):
        writer.write_table(table)
  done = subprocess.run(
    [sys.executable, "-c", _MEMORY, str(small), str(large)],
    capture_output=True,
    text=True,
    check=True,
  )
  found, grown = done.stdout.split()
  assert int(found) == 4000 * 6
  assert float(grown) < 50  # MiB, of 200 MiB more text


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
def test_delimiters(tmp_path, delimiter, name):
  text = delimiter.join(["video", "question", "answer"]) + "\r\n"
  text += delimiter.join(["a.mp4", f'"Who{delimiter} or what?"', "1,5"])
  if delimiter == ",":
    text = text.replace("1,5", '"1,5"')
  opened = gzip.open if name.endswith("gz") else open
  with opened(tmp_path / name, "wb") as file:
    file.write(b"\xef\xbb\xbf" + text.encode())
  assert list(read_rows(tmp_path / name)) == [
    {"video": "a.mp4", "question": f"Who{delimiter} or what?", "answer": "1,5"}
  ]


@pytest.mark.parametrize("sep", [";", "\t"])
def test_a_delimiter_that_excel_names(tmp_path, sep):
  text = f"sep={sep}\r\nvideo{sep}a,b,c\nx{sep}y"
  (tmp_path / "t.csv").write_text(text)
  assert list(read_rows(tmp_path / "t.csv")) == [{"video": "x", "a,b,c": "y"}]


def test_tables_in_another_encoding(tmp_path):
  path = tmp_path / "t.csv"
  path.write_bytes("video,question\na,Où ?".encode("latin-1"))
  with pytest.raises(UserError, match=r"byte 0xf9.*Latin-1 or Windows-1252"):
    list(read_rows(path))
  path.write_bytes("video,question\na,b".encode("utf-16"))
  with pytest.raises(UserError, match="not UTF-8 text but UTF-16"):
    list(read_rows(path))
