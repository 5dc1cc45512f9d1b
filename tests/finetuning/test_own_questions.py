"""Tables of questions as people write them, and what is made of them."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from hourjax.data.prepare import question_tables
from hourjax.errors import UserError
from hourjax.finetuning import questions, table_rows
from hourjax.finetuning.cells import clock, seconds, split_cell
from hourjax.finetuning.video_names import VideoNames

VIDEOS = VideoNames(
  ["a.mp4", "dogs/Clip 1.MP4", "dogs/b.webm", "x/same.mp4", "y/same.mp4",
   "007.mp4", "é.mp4"]
)  # fmt: skip
CHOICE = "What?\nA. red\nB. blue\nAnswer with the letter."


@pytest.fixture
def read(tmp_path):
  """Reads a text, or a JSON value, as a file of questions."""

  def read(content, name="q.csv", **options):
    path = tmp_path / name
    if not isinstance(content, str | bytes):
      content = json.dumps(content)
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(raw)
    return questions.read(table_rows.read(path), VIDEOS, **options)

  return read


def _pairs(found):
  return [(q["video"], q["human"], q["gpt"]) for q in found.found]


PLAIN = "video,question,answer\na.mp4,What?,red\ndogs/b.webm,Où?,là\n"
PAIRS = [("a.mp4", "What?", "red"), ("dogs/b.webm", "Où?", "là")]


@pytest.mark.parametrize(
  "content",
  [
    PLAIN.encode(),
    PLAIN.encode("utf-8-sig"),
    PLAIN.replace("\n", "\r\n").encode("utf-8-sig"),
    PLAIN.replace("\n", "\r").encode(),
    PLAIN.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    PLAIN.encode("utf-16-le"),
    PLAIN.encode("utf-16-be"),
    PLAIN.encode("cp1252"),
    PLAIN.replace(",", ";").encode(),
    ("sep=;\r\n" + PLAIN.replace(",", ";")).encode(),
    PLAIN.replace(",", "|").encode(),
    (PLAIN + ",,\n\n,,\n").encode(),
    PLAIN.replace("video,question,answer", " Video Name ,Question,Correct"
                  " Answer").encode(),
    PLAIN.replace("a.mp4", "C:\\my clips\\A.MP4").encode(),
    PLAIN.replace("a.mp4", "/home/me/clips/a.mp4").encode(),
    PLAIN.replace("a.mp4", "file:///data/a.mp4?x=1").encode(),
    PLAIN.replace("a.mp4", "./a").encode(),
    PLAIN.replace("dogs/b.webm", "b.mp4").encode(),
    PLAIN.replace("\n", ",\n").encode(),
  ],
)  # fmt: skip
def test_forms_of_a_table(read, content):
  found = read(content)
  assert _pairs(found) == PAIRS and not found.skipped
  assert found.rows == 2


ROWS = [
  {"video": "a.mp4", "question": "What?", "answer": "red"},
  {"video": "dogs/b.webm", "question": "Où?", "answer": "là"},
]


@pytest.mark.parametrize(
  "content",
  [
    json.dumps(ROWS),
    json.dumps({"version": 2, "data": ROWS}),
    json.dumps({"questions": ROWS}),
    "\n".join(map(json.dumps, ROWS)),
    "\ufeff" + "\r\n\r\n".join(map(json.dumps, ROWS)) + "\r\n",
    json.dumps({row.pop("video"): [row] for row in map(dict, ROWS)}),
    json.dumps({row.pop("video"): row for row in map(dict, ROWS)}),
    json.dumps(
      {k: {str(i): r[k] for i, r in enumerate(ROWS)} for k in ROWS[0]}
    ),
    json.dumps(
      [{"video": r["video"], "qa_pairs": [dict(list(r.items())[1:])]}
       for r in ROWS]
    ),
  ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["q.json", "q.jsonl", "q.txt"])
def test_forms_of_json(read, content, name):
  found = read(content, name)
  assert _pairs(found) == PAIRS and not found.skipped


@pytest.mark.parametrize(
  "head, row",
  [
    ("options", 'b,"A. red\nB. blue"'),
    ("options", 'B,"[""red"", ""blue""]"'),
    ("options", "(b),\"['red', 'blue']\""),
    ("options", 'B.,"{""A"": ""red"", ""B"": ""blue""}"'),
    ("choices", "blue,red|blue"),
    ("choices", "Blue.,a) red b) blue"),
    ("Choices", "B. blue,1) red; 2) blue"),
    ("candidates", 'B,"red, blue"'),
    ("options", "The answer is B,A: red | B: blue"),
    ("A,B,C,D", "B,red,blue,,"),
    ("option1,option2", "b,red,blue"),
    ("Option A,Option B", "blue,A. red,B. blue"),
    ("choice_0,choice_1,choice_2", "B,red,blue,N/A"),
  ],
)
def test_options(read, head, row):
  found = read(f"video,question,answer,{head}\na.mp4,What?,{row}\n")
  assert _pairs(found) == [("a.mp4", CHOICE, "B")]
  (facts,) = [q["facts"] for q in found.found]
  assert facts["letter"] == "B" and facts["options"] == ["red", "blue"]


def test_options_in_the_question(read):
  found = read('video,question,answer\na.mp4,"What?\n(A) red\n(B) blue",B\n')
  assert _pairs(found) == [("a.mp4", CHOICE, "B")]


def test_an_empty_option_keeps_the_letters_of_the_others(read):
  found = read("video,question,answer,A,B,C\na.mp4,What?,C,red,,blue\n")
  assert _pairs(found) == [("a.mp4", CHOICE, "B")]


def _numbers(*answers, head="answer"):
  rows = [f"a.mp4,Q{i}?,{n},p|q|r" for i, n in enumerate(answers)]
  return "\n".join([f"video,question,{head},options", *rows])


def test_numbers_of_options(read):
  letters = lambda found: "".join(q["gpt"] for q in found.found)  # noqa: E731
  zero, one = read(_numbers(0, 1, 2)), read(_numbers(1, 2, "3.0"))
  assert letters(zero) == letters(one) == "ABC"
  assert "the first is 0" in zero.notes[0] and "first is 1" in one.notes[0]
  assert letters(read(_numbers(1, 2, head="correct_idx"))) == "BC"
  with pytest.raises(UserError, match=r"add --first_option=0 or"):
    read(_numbers(1, 2))
  assert letters(read(_numbers(1, 2), first_option=1)) == "AB"
  # Options that are numbers themselves are meant by their texts.
  own = "video,question,answer,options\na.mp4,Q?,2,3|2|1\n"
  assert letters(read(own)) == "B"


@pytest.mark.parametrize(
  "cells, begins",
  [
    ("65,90", "Between 01:05 and 01:30: What?"),
    ("1:05,0:01:30", "Between 01:05 and 01:30: What?"),
    ("65 s,1m30s", "Between 01:05 and 01:30: What?"),
    ("1:05.5,", "At 01:05: What?"),
    (",", "What?"),
    ("3600,3605", "Between 1:00:00 and 1:00:05: What?"),
  ],
)
def test_times(read, cells, begins):
  found = read(f"video,question,answer,start,end\na.mp4,What?,red,{cells}\n")
  assert _pairs(found) == [("a.mp4", begins, "red")]
  span = "video,question,answer,timestamp\na.mp4,What?,red,1:05 - 1:30\n"
  assert read(span).found[0]["human"].startswith("Between 01:05 and 01:30")


def test_several_answers(read):
  rows = [("one", "x"), ("one", "y"), ("one", "y"), ("two", '["p", "q", "q"]')]
  found = read([{"video": "a", "question": q, "answer": a} for q, a in rows])
  assert [q["gpt"] for q in found.found] == ["y", "q"]
  assert any("2 questions have several answers" in n for n in found.notes)
  assert any("1 rows repeat an earlier one" in n for n in found.notes)
  several = 'video,question,answer,options\na.mp4,What?,"A, C",p|q|r\n'
  (item,) = read(several).found
  assert item["gpt"] == "A, C" and "Answer with the letters." in item["human"]
  assert item["facts"]["letter"] is None


def test_what_is_left_out_has_its_reason(read):
  good = "a.mp4,G{}?,red,red|blue\n"
  bad = [
    ("gone.mp4,What?,red,red|blue", "missing video"),
    (",What?,red,red|blue", "no video"),
    ("a.mp4,,red,red|blue", "no question"),
    ("a.mp4,What?,,red|blue", "no answer"),
    ("a.mp4,What?,green,red|blue", "answer is no option"),
    ("a.mp4,What?,C,red|blue", "answer is no option"),
    ("a.mp4,What?,7,red|blue", "answer is no option"),
    ("a.mp4,What?,red,one", "options cannot be read"),
    ("a.mp4,What, is, it?,red,red|blue", "more cells than columns"),
    ("same,What?,red,red|blue", "other"),
  ]
  head = "video,question,answer,options\n"
  text = head + "".join(good.format(i) for i in range(len(bad)))
  found = read(text + "\n".join(row for row, _ in bad), first_option=0)
  assert [item.kind for item in found.skipped] == [kind for _, kind in bad]
  assert len(found.found) == len(bad)
  assert found.missing == {"gone.mp4": 1}
  assert all("q.csv, line" in i.reason for i in found.skipped[:-1])
  assert found.counts()["answer is no option"][0] == 3


def test_most_rows_must_be_usable(read):
  text = "video,question,answer\n" + "u.mp4,Q?,r\nv.mp4,Q?,r\na.mp4,Q?,r\n"
  with pytest.raises(UserError, match=r"2 videos that .* names are not there"):
    read(text)
  wrong = "video,question,answer,options\n" + "a.mp4,Q?,z,x|y\n" * 3
  with pytest.raises(UserError, match=r"3 of 3 rows .* none of the options"):
    read(wrong)


@pytest.mark.parametrize(
  "content, name, message",
  [
    ("a.mp4,What?,red\n" * 3, "q.csv", "no column for the video; its columns"),
    ("video,question\na,b\n", "q.csv", "no column for the answer"),
    ("", "q.csv", "is empty"),
    (" \n", "q.json", "is empty"),
    ("video,question,answer\n", "q.csv", "has no rows"),
    ('video,question,answer\na,"b,c\n', "q.csv", "a double quote may lack"),
    ("[1, 2", "q.json", "is not valid JSON"),
    ("[]", "q.json", "has no rows"),
    ('{"a": 1}', "q.json", "expected a list of questions"),
    (b"PK\x03\x04rest", "q.csv", "save it as CSV"),
    (b"x", "q.xlsx", "is a spreadsheet; save it as CSV"),
    ("视频,问题".encode("gbk"), "q.csv", "is not UTF-8 text"),
    ("<html>", "q.csv", "is a web page or XML"),
  ],
)
def test_files_that_are_refused(read, content, name, message):
  with pytest.raises(UserError, match=message):
    read(content, name)


def test_columns_may_be_named(read):
  text = "vid,q1,gold answer\na.mp4,What?,red\n"
  columns = question_tables.parse_mapping("question=q1")
  assert _pairs(read(text, columns=columns)) == PAIRS[:1]
  with pytest.raises(UserError, match="no column 'q2', which --columns names"):
    read(text, columns={"question": ("q2",)})


def test_records_of_llava_stay_as_they_are(read):
  turns = [
    {"from": "human", "value": "<video>\nWhat?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "yes"},
  ]
  record = {"id": 3, "video": "clips/a", "conversations": turns, "split": "dev"}
  image = {"id": 4, "image": "a.jpg", "conversations": turns[:2]}
  found = read([record, record | {"id": 5, "split": "train"}, image])
  assert found.counts().keys() == {"not about a video"}
  (item,) = found.found  # the second one repeats the first
  assert item["held_out"] and item["video"] == "a.mp4"
  (made,) = questions.conversations(found.found)
  assert made["id"] == "3" and made["held_out"] and made["video"] == "a.mp4"
  assert [t["value"] for t in made["conversations"]][1:] == [
    "red", "Sure?", "yes"
  ]  # fmt: skip


def test_conversations_have_one_video(read):
  rows = [f"a.mp4,Q{i}?,r,test" for i in range(8)]
  rows += ["é,Why?,so,"]
  found = read("\n".join(["video,question,answer,split", *rows]))
  made = questions.conversations(found.found)
  counted = [
    (r["id"], len(r["conversations"]) // 2, r["held_out"]) for r in made
  ]
  assert counted == [
    ("a.mp4#0", 5, True), ("a.mp4#1", 3, True), ("é.mp4#0", 1, False)
  ]  # fmt: skip
  assert made[0]["conversations"][0]["value"] == "<image>\nQ0?"


@pytest.mark.parametrize(
  "written, name",
  [
    ("a", "a.mp4"),
    ("A.MP4", "a.mp4"),
    ("clip 1", "dogs/Clip 1.MP4"),
    ("DOGS\\clip 1.mp4", "dogs/Clip 1.MP4"),
    ("7", "007.mp4"),
    ("x/same", "x/same.mp4"),
    ("'b.webm'", "dogs/b.webm"),
    ("b.webm ", "dogs/b.webm"),
    ("nowhere", None),
    ("8", None),
    ("..", None),
    ("https://host/v/b.webm?t=3", "dogs/b.webm"),
  ],
)
def test_video_names(written, name):
  assert VIDEOS.find(written) == name


def test_times_and_clocks():
  found = {"0": 0, "75": 75, "1:15": 75, "01:01:15": 3675, "1h1m15s": 3675,
           "2 min": 120, "1,5": 1.5}  # fmt: skip
  for text, value in found.items():
    assert seconds(text) == value, text
  for text in ("", "soon", "1:2:3:4", "-5", "1:"):
    assert seconds(text) is None, text
  assert clock(3675) == "1:01:15" and clock(75.9) == "01:15"


_CELL = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))


@hypothesis.given(
  st.lists(st.tuples(_CELL, _CELL, _CELL, _CELL, _CELL), min_size=1)
)
@hypothesis.settings(
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_cells_are_read_or_refused_in_words(read, cells):
  """Nothing but a UserError; and what is read is a record without a repair."""
  head = ("video", "question", "answer", "options", "start")
  good = ("a.mp4", "Q?", "r", "r|s", "")
  rows = [dict(zip(head, row)) for row in [good, *cells]]
  rows += [dict(zip(head, row)) | {"video": "a"} for row in cells]
  try:
    found = read(rows, "q.json")
  except UserError:
    return
  for record in questions.conversations(found.found):
    json.dumps(record)
    assert record["video"] in VIDEOS.names


@hypothesis.given(
  st.lists(
    st.text("abc xyz", min_size=1).map(str.strip).filter(bool),
    min_size=2, max_size=6, unique=True,
  ),
  st.sampled_from(["lines", "letters", "bars", "json", "semicolons"]),
)  # fmt: skip
def test_options_in_a_cell_are_found_again(texts, form):
  texts = [" ".join(text.split()) for text in texts]
  labelled = [f"{'ABCDEF'[i]}. {text}" for i, text in enumerate(texts)]
  cell = {
    "lines": "\n".join(labelled),
    "letters": " ".join(labelled),
    "bars": "|".join(texts),
    "json": json.dumps(texts),
    "semicolons": "; ".join(texts),
  }[form]
  assert split_cell(cell, "here") == texts
