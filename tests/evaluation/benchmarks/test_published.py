"""Files and videos as downloads leave them, and rows as they should not be."""

import json
import zipfile

import pytest

from hourjax.errors import UserError
from hourjax.evaluation import benchmarks
from hourjax.evaluation.task import open_task
from tests.evaluation.benchmarks import layouts

# Where each benchmark's one file lies, and a row of it that is good.
FILES = {
  "videomme": ("videomme/test-0.parquet", layouts.VIDEOMME),
  "longvideobench": ("lvb_val.json", layouts.LONGVIDEOBENCH),
  "lvbench": (
    "data/train-0.parquet",
    layouts.LVBENCH_QA | {"key": "Cm73ma6Ibcs"},
  ),
  "tempcompass": (
    "yes_no/test-0.parquet",
    layouts.TEMPCOMPASS["yes_no"] | {"video_id": "1034419625", "dim": "a"},
  ),
  "mlvu": ("json/1_plotQA.json", layouts.MLVU),
  "records": ("test.json", layouts.RECORD),
}
IDS = {"videomme": "question_id", "longvideobench": "id", "lvbench": "uid"}
VIDEO = {
  "videomme": "videoID",
  "lvbench": "key",
  "longvideobench": "video_path",
  "tempcompass": "video_id",
}


def _write(root, name, rows, path=None):
  path = root / (path or FILES[name][0])
  write = layouts.write_parquet if path.suffix == ".parquet" else None
  (write or layouts.write_json)(path, rows)
  return root


def _rows(name, count=4):
  good = FILES[name][1]
  key = IDS.get(name, "id")
  return [good | {key: f"{good.get(key, name)}{i}"} for i in range(count)]


# --- One bad row is that row's problem ---------------------------------------

BAD = {
  "no question": {"question": None, "conversations": []},
  "no video": {**dict.fromkeys(["video", *VIDEO.values()], "")},
  "no options": {"options": [], "candidates": [], "question": " ",
                 "conversations": [{"from": "human", "value": "<image>"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 2])
def test_a_row_that_cannot_be_asked_is_left_out(name, bad, at, tmp_path):
  rows = _rows(name)
  known = {k: v for k, v in BAD[bad].items() if k in rows[at]}
  if name == "mlvu" and bad == "no question":
    known |= {"candidates": None}  # it is asked without one
  rows[at] = rows[at] | known
  loaded = benchmarks.read(name, _write(tmp_path, name, rows))
  whole = benchmarks.read(name, _write(tmp_path / "good", name, _rows(name)))
  assert (
    loaded.questions
    == tuple(question for i, question in enumerate(whole.questions) if i != at)
    or name == "tempcompass"
  )  # whose ids count what a video has
  assert len(loaded.questions) == 3
  (lost,) = loaded.left_out
  assert lost.reason and lost.id and lost.video
  assert any("1 of 4 rows cannot be asked" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["longvideobench", "mlvu", "records"])
@pytest.mark.parametrize("row", [None, "a", [], {}, {"x": 1}])
def test_a_row_of_another_form_is_left_out(name, row, tmp_path):
  loaded = benchmarks.read(name, _write(tmp_path, name, [row, *_rows(name, 2)]))
  assert len(loaded.questions) == 2 and len(loaded.left_out) == 1


@pytest.mark.parametrize("bad", [None, "x", 3, [], {"question": "Which?"}])
def test_one_bad_question_of_a_video(bad, tmp_path):
  """It does not cost the others about the same video."""
  row = layouts.LVBENCH | {"qa": [layouts.LVBENCH_QA, bad]}
  _write(tmp_path / "l", "lvbench", [row], "video_info.meta.jsonl")
  item = {key: layouts.VIDEOMME[key] for key in ("question_id", "task_type",
          "question", "options", "answer")}  # fmt: skip
  row = {"duration_category": "short", "video_category": "a", "url": "x/y",
         "questions": [item, bad]}  # fmt: skip
  _write(tmp_path / "v", "videomme", [row], "Video-MME.json")
  aspects = {"1": {"action": [layouts.TEMPCOMPASS["yes_no"], bad]}}
  _write(tmp_path / "t", "tempcompass", aspects, "questions/yes_no.json")
  for name, folder in (
    ("lvbench", "l"),
    ("videomme", "v"),
    ("tempcompass", "t"),
  ):
    loaded = benchmarks.read(name, tmp_path / folder)
    assert len(loaded.questions) == len(loaded.left_out) == 1


def test_no_row_can_be_asked(tmp_path):
  rows = [row | {"answer": "E"} for row in _rows("videomme", 3)]
  message = r"none of the 3 rows of Video-MME can be asked.*'E'"
  with pytest.raises(UserError, match=message):
    benchmarks.read("videomme", _write(tmp_path, "videomme", rows))


def test_one_id_twice(tmp_path):
  rows = _rows("videomme", 3)
  rows.append(rows[1] | {"answer": "A"})
  loaded = benchmarks.read("videomme", _write(tmp_path, "videomme", rows))
  assert len(loaded.questions) == 3
  (lost,) = loaded.left_out
  assert lost.id == "001-11" and "another question" in lost.reason


def test_what_is_left_out_reaches_the_exam(tmp_path):
  rows = _rows("videomme", 3)
  rows[1]["answer"] = "E"
  _write(tmp_path, "videomme", rows)
  task = open_task("videomme", tmp_path)
  assert [item.video for item in task.left_out] == ["fFjv93ACGo8"]
  assert any("1 of 3 rows" in note for note in task.notes)
  # Of the first question alone it says nothing.
  assert open_task("videomme", tmp_path, limit=1).left_out == ()


# --- Options of every form ---------------------------------------------------

NAMES = ("red", "it's blue", "green, dark", "white")
FORMS = {
  "list": {"options": list(NAMES)},
  "candidates": {"candidates": list(NAMES)},
  "json": {"options": json.dumps(NAMES)},
  "python": {"options": repr(list(NAMES))},
  "tuple": {"options": repr(NAMES)},
  "numpy": {"options": """['red' "it's blue" 'green, dark'\n 'white']"""},
  "array": {"options": f"array({list(NAMES)!r}, dtype=object)"},
  "lines": {"options": "\n".join(NAMES)},
  "object": {"options": dict(zip("ABCD", NAMES))},
  "columns": dict(zip("ABCD", NAMES)) | {"E": None},
  "numbered": {f"option{i}": name for i, name in enumerate(NAMES)},
  "from one": {f"option_{i + 1}": name for i, name in enumerate(NAMES)},
  "lettered": {f"option_{a}": name for a, name in zip("abcd", NAMES)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["videomme", "longvideobench", "mlvu"])
def test_options_of_every_form(name, form, tmp_path):
  row = {
    key: value
    for key, value in FILES[name][1].items()
    if key not in ("options", "candidates")
  }
  row |= FORMS[form] | {"answer": "it's blue" if name == "mlvu" else "B"}
  path = (
    "test-0.parquet" if name != "longvideobench" else "validation-0.parquet"
  )
  _write(tmp_path, name, [row], path)
  (question,) = benchmarks.read(name, tmp_path).questions
  assert question.options == NAMES
  assert question.expected == "B"
  assert "red\n" in question.prompt


@pytest.mark.parametrize("form", ["list", "json", "columns"])
def test_options_that_others_have_in_the_question(form, tmp_path):
  row = FILES["lvbench"][1] | FORMS[form] | {"question": "Which?"}
  row["answer"] = "B"
  _write(tmp_path / "l", "lvbench", [row])
  (question,) = benchmarks.read("lvbench", tmp_path / "l").questions
  assert question.prompt.startswith("Which?\n(A) red\n(B) it's blue\n(C) green")
  assert question.options == NAMES
  row = FILES["tempcompass"][1] | FORMS[form]
  row |= {"question": "Which?", "answer": "B. it's blue"}
  _write(tmp_path / "t", "tempcompass", [row], "multi-choice/test-0.parquet")
  (question,) = benchmarks.read("tempcompass", tmp_path / "t").questions
  assert question.prompt.startswith("Which?\nA. red\nB. it's blue\nC. green")
  assert question.expected == "B"


# --- Where tables lie --------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "path"),
  [
    ("videomme", "data/test-00000-of-00001.parquet"),
    ("videomme", "test-00000-of-00001.parquet"),
    ("longvideobench", "data/validation-00000-of-00001.parquet"),
    ("longvideobench", "data/test-00000-of-00001.parquet"),
    ("lvbench", "data/test-00000-of-00001.parquet"),
    ("lvbench", "data/video_info.meta.jsonl"),
    ("tempcompass", "data/test-00000-of-00001.parquet"),
    ("tempcompass", "data/yes_no/test-00000-of-00001.parquet"),
    ("tempcompass", "data/yes_no-00000-of-00001.parquet"),
    ("mlvu", "data/test-00000-of-00001.parquet"),
  ],
)
def test_tables_in_folders(name, path, tmp_path):
  row = FILES[name][1]
  if path.endswith("jsonl"):
    row = layouts.LVBENCH
  _write(tmp_path, name, [row], path)
  assert len(benchmarks.read(name, tmp_path).questions) == 1


def test_a_table_of_all_formats(tmp_path):
  rows = [
    item | {"video_id": "1", "dim": "action"}
    for item in layouts.TEMPCOMPASS.values()
  ]
  _write(tmp_path, "tempcompass", rows, "data/test-0.parquet")
  loaded = benchmarks.read("tempcompass", tmp_path)
  assert [q.kind for q in loaded.questions] == ["choice", "yes_no", "match"]


# --- Where videos lie --------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "path"),
  [
    ("videomme", "video_chunks/fFjv93ACGo8.mp4"),
    ("videomme", "videos_chunked_01/data/fFjv93ACGo8.mp4"),
    ("lvbench", "video_chunks/part_3/Cm73ma6Ibcs.mp4"),
    ("lvbench", "scripts/videos/Cm73ma6Ibcs.webm"),
    ("mlvu", "video_part_7/movie101_66.mp4"),
    ("mlvu", "video_part_7/1_plotQA/movie101_66.mp4"),
    ("mlvu", "anywhere/else/plotQA/movie101_66.mkv"),
    ("tempcompass", "tempcompass_videos/videos/1034419625.mp4"),
    ("longvideobench", "unpacked/videos/86CxyhFV9MI.mp4"),
    ("records", "media/film.mp4"),
  ],
)
def test_videos_in_folders(name, path, tmp_path):
  _write(tmp_path, name, [FILES[name][1]])
  other = f"{path.split('/')[0]}_2/other.mp4"
  layouts.touch(tmp_path, path, other)
  loaded = benchmarks.read(name, tmp_path)
  (question,) = loaded.questions
  assert loaded.videos / question.video == tmp_path / path


def test_parts_are_one_folder_of_videos(tmp_path):
  rows = [row | {"videoID": f"v{i}"} for i, row in enumerate(_rows("videomme"))]
  _write(tmp_path, "videomme", rows)
  for i in range(4):
    layouts.touch(tmp_path, f"videos_chunked_0{i}/data/v{i}.mp4")
  loaded = benchmarks.read("videomme", tmp_path)
  assert all((loaded.videos / q.video).is_file() for q in loaded.questions)


URLS = [
  "https://www.youtube.com/watch?v=Cm73ma6Ibcs",
  "https://youtube.com/watch?app=desktop&v=Cm73ma6Ibcs&t=3s",
  "https://youtu.be/Cm73ma6Ibcs",
  "https://www.youtube.com/embed/Cm73ma6Ibcs?x=1",
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("folder", ["videos", "scripts/videos", "."])
def test_videos_numbered_by_the_download_script(url, folder, tmp_path):
  """As video2dataset writes them: the address is in the JSON beside one."""
  layouts.write_json(tmp_path / "data/video_info.meta.jsonl", [layouts.LVBENCH])
  for i, address in enumerate(["https://youtu.be/another1234", url]):
    name = f"{folder}/00000/0000000{i}"
    layouts.touch(tmp_path, f"{name}.mp4")
    layouts.write_json(
      tmp_path / f"{name}.json", {"url": address, "key": f"0000000{i}"}
    )
  loaded = benchmarks.read("lvbench", tmp_path)
  (question,) = loaded.questions
  assert question.video.endswith("00000/00000001.mp4")
  assert (loaded.videos / question.video).is_file()


@pytest.mark.parametrize("beside", ["", "[", "[]", '{"url": 3}', None])
def test_a_numbered_video_that_tells_no_address_is_missing(beside, tmp_path):
  layouts.write_json(tmp_path / "video_info.meta.jsonl", [layouts.LVBENCH])
  layouts.touch(tmp_path, "videos/00000/00000000.mp4")
  if beside is not None:
    (tmp_path / "videos/00000/00000000.json").write_text(beside)
  (question,) = benchmarks.read("lvbench", tmp_path).questions
  assert question.video == "Cm73ma6Ibcs.mp4"


# --- Archives ----------------------------------------------------------------


def _zip(path, *names):
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w") as file:
    for name in names:
      file.writestr(name, "x")


def _packed(root, count=2):
  rows = [
    row | {"videoID": f"v{i}"} for i, row in enumerate(_rows("videomme", count))
  ]
  _write(root, "videomme", rows)
  for i in range(count):
    _zip(root / f"videos_chunked_0{i}.zip", f"data/v{i}.mp4")
  _zip(root / "subtitle.zip", *(f"subtitle/v{i}.srt" for i in range(count)))
  return root


def test_videos_that_are_still_packed(tmp_path):
  root = _packed(tmp_path / "my downloads")
  with pytest.raises(UserError) as raised:
    benchmarks.read("videomme", root)
  assert "2 of the 2 videos" in str(raised.value)
  assert f"`unzip -n '{root}/*.zip' -d '{root}'`" in str(raised.value)
  # With features nobody needs them.
  assert benchmarks.read("videomme", root, stored=[]).notes == ()
  layouts.touch(root, "data/v0.mp4")
  (note,) = benchmarks.read("videomme", root).notes
  assert "1 of the 2 videos" in note and "videos_chunked_01.zip" in note
  assert "videos_chunked_00.zip" not in note
  layouts.touch(root, "data/v1.mp4")
  assert benchmarks.read("videomme", root).notes == ()


def test_subtitles_that_are_still_packed(tmp_path):
  root = _packed(tmp_path)
  message = (
    rf"2 of the 2 videos.*subtitle.*unzip -n '{root}/\*\.zip' -d {root}`"
  )
  with pytest.raises(UserError, match=message):
    benchmarks.read("videomme", root, subtitles=True)
  layouts.touch(root, "data/v0.mp4", "data/v1.mp4")
  message = rf"unzip -n {root}/subtitle\.zip -d {root}`"
  with pytest.raises(UserError, match=message):
    benchmarks.read("videomme", root, subtitles=True)


@pytest.mark.parametrize(
  ("names", "command"),
  [
    (["video_chunks/a.zip"], "unzip -n {0}/video_chunks/a.zip -d {0}/vid"),
    (["v.tar"], "tar -xf {0}/v.tar -C {0}"),
    (["v.tar.gz"], "tar -xf {0}/v.tar.gz -C {0}"),
    (["a.tar", "b.tar"], 'for f in {0}/*.tar; do tar -xf "$f" -C {0}; done'),
    (
      ["videos.tar.part.aa", "videos.tar.part.ab"],
      "cat {0}/videos.tar.part.* | tar -x -C {0}`",
    ),
    (
      ["M/test_video.tar.gz.part-a", "M/test_video.tar.gz.part-b"],
      "cat {0}/M/test_video.tar.gz.part-* | tar -xz -C {0}/M`",
    ),
    (["v.zip.001", "v.zip.002"], "cat {0}/v.zip.* > {0}/all.zip && unzip"),
  ],
)
def test_archives_of_every_kind(names, command, tmp_path):
  _write(tmp_path, "longvideobench", [layouts.LONGVIDEOBENCH])
  for name in names:
    layouts.touch(tmp_path, name)
  with pytest.raises(UserError) as raised:
    benchmarks.read("longvideobench", tmp_path)
  assert command.format(tmp_path) in str(raised.value)


# --- Prompts as published ----------------------------------------------------

ODD = "  Which  one?\t \n"


@pytest.mark.parametrize(
  ("name", "change", "prompt"),
  [
    ("videomme", {"question": ODD}, f" option.\n{ODD}\nA. Apples.\n"),
    (
      "videomme",
      {"options": ["A.  Apples. ", "B. Pears\n", "C. C", "D. D"]},
      "?\nA.  Apples. \nB. Pears\n\nC. C\n",
    ),
    ("longvideobench", {"question": ODD}, f"{ODD}\nA. a crown\n"),
    (
      "longvideobench",
      {"candidates": [" a  crown ", "b", "c"]},
      "\nA.  a  crown \nB. b\n",
    ),
    (
      "lvbench",
      {"question": f"{ODD}(A)  1 \n(B) 2\n(C) 3\n(D) 4\n"},
      f"{ODD}(A)  1 \n(B) 2\n(C) 3\n(D) 4\n\nAnswer the",
    ),
    ("tempcompass", {"question": ODD}, f"{ODD}\nPlease answer"),
    ("mlvu", {"question": ODD}, f"{ODD}\n(A) Yellow\n"),
    (
      "mlvu",
      {"candidates": [" Yellow", "Red  hot ", "x", "y"], "answer": " Yellow"},
      "\n(A)  Yellow\n(B) Red  hot \n(C) x",
    ),
    (
      "records",
      {"conversations": [
        {"from": "human", "value": f"<image>\n{ODD}"},
        {"from": "gpt", "value": "x"},
      ]},
      ODD,
    ),
  ],
)  # fmt: skip
def test_prompts_are_as_published(name, change, prompt, tmp_path):
  _write(tmp_path, name, [FILES[name][1] | change])
  (question,) = benchmarks.read(name, tmp_path).questions
  assert prompt in question.prompt
