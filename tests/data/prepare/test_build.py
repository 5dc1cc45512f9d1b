import collections
import dataclasses
import json
import random
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from hourjax.data.columns import MEASURED_AS, MODALITIES
from hourjax.data.conversations import IGNORE, IMAGE, encode_conversation
from hourjax.data.media import video_probe
from hourjax.data.prepare import build as building
from hourjax.data.prepare.build import build
from hourjax.data.prepare.lists import Item, Options, read_list
from hourjax.data.prepare.report import table
from hourjax.data.prepared import Prepared
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError

WORDS = (
  "what",
  "is ?",
  "a cat,",
  "12 dogs",
  "\n",
  "Ünder",
  "<b>",
  "\U0001f600",
)


def _raw(name, turns=2, **fields):
  talk = [
    {
      "from": ("human", "gpt")[i % 2],
      "value": " ".join(
        ["Yes", *random.choices(WORDS, k=random.randrange(30))]
      ),
    }
    for i in range(turns)
  ]
  media = fields.get("image", fields.get("video", ()))
  count = len(media) if isinstance(media, list) else int(bool(media))
  talk[0]["value"] = "<image>" * count + talk[0]["value"]
  return {"id": name, "conversations": talk, **fields}


def _save(path, raws):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(raws))
  return path


def _options(tokenizer_folder, *paths, **more):
  items = more.pop("items", None)
  items = items or tuple(Item.of_files([str(path)]) for path in paths)
  return Options(items=items, tokenizer=str(tokenizer_folder), **more)


def _skipped(folder):
  lines = (folder / "skipped.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _ids(data):
  return [record.id for record in data.records]


def test_counts_are_those_of_the_conversation(
  tmp_path, tokenizer_folder, media
):
  raws = []
  for i in range(40):
    about = random.choice(
      ({}, {"video": "a.mp4"}, {"image": "i.png"}, {"image": ["i.png"] * 3})
    )
    raws.append(_raw(f"r{i}", 2 * random.randrange(1, 6), **about))
  path = _save(tmp_path / "r.json", raws)
  build(tmp_path / "d", _options(tokenizer_folder, path, media=str(media)))
  data = Prepared(tmp_path / "d")
  tokenizer = Tokenizer.from_folder(tokenizer_folder)
  assert data.about["tokenizer_id"] == tokenizer.fingerprint
  assert _ids(data) == [raw["id"] for raw in raws]
  columns = data.columns
  for i, record in enumerate(data.records):
    shown = MEASURED_AS if record.modality == "video" else None
    talk = encode_conversation(record.turns, tokenizer, video=shown)
    text = talk.ids != IMAGE
    assert columns.tokens[i] == text.sum()
    assert columns.prompt[i] == (text & (talk.labels == IGNORE)).sum()
    assert columns.modality[i] == MODALITIES.index(record.modality)
    num_images = len(record.media) if record.modality == "image" else 0
    assert columns.images[i] == num_images
    size = (40, 30) if num_images == 1 else (0, 0)
    assert (columns.width[i], columns.height[i]) == size


def test_media_are_looked_into(tmp_path, tokenizer_folder, media, monkeypatch):
  probed = []
  probe = video_probe.probe
  monkeypatch.setattr(
    video_probe, "probe", lambda path: probed.append(path) or probe(path)
  )
  good = [
    _raw("v1", video="a.mp4"),
    _raw("v2", video="in/b ü.mp4"),
    _raw("v3", video=["a.mp4"]),
    _raw("i1", image=["i.png", "in/j.jpg"]),
    _raw("t"),
  ]
  bad = {
    "missing file": [
      _raw("m1", video="none.mp4"),
      _raw("m2", image="none.png"),
      _raw("m3", image=["i.png", "none.png"]),
      _raw("m4", video="../x.mp4"),
      _raw("m5", video="none.mp4"),
    ],
    "unreadable video": [_raw("u1", video="broken.mp4")],
    "unreadable image": [_raw("u2", image="broken.png")],
  }
  raws = [*good, *(raw for raws in bad.values() for raw in raws)]
  random.shuffle(raws)
  path = _save(tmp_path / "r.json", raws)
  options = _options(tokenizer_folder, path, media=str(media))
  summary, reused = build(tmp_path / "d", options)
  assert not reused
  data = Prepared(tmp_path / "d")
  assert sorted(_ids(data)) == sorted(raw["id"] for raw in good)
  counts = {kind: n["count"] for kind, n in summary["dropped"].items()}
  assert counts == {kind: len(raws) for kind, raws in bad.items()}
  assert len(summary["dropped"]["missing file"]["examples"]) == 3
  found = collections.defaultdict(set)
  for line in _skipped(tmp_path / "d"):
    assert line["where"].startswith(f"{path}[")
    assert line["reason"]
    found[line["kind"]].add(line["id"])
  assert found == {k: {raw["id"] for raw in v} for k, v in bad.items()}
  facts = dict(zip(data.columns.videos, data.columns.duration))
  assert facts == {"a.mp4": 2.0, "in/b ü.mp4": 4.0}
  num_frames = dict(zip(data.columns.videos, data.columns.num_frames))
  assert num_frames == {"a.mp4": 10, "in/b ü.mp4": 20}
  # Each video once, however many records are about it.
  assert sorted(p.name for p in probed) == ["a.mp4", "b ü.mp4", "broken.mp4"]
  assert summary["kept"] == {
    "conversations": 5,
    "questions": 5,
    "videos": 2,
    "hours": round(6 / 3600, 3),
    "videos_of_unknown_duration": 0,
  }


def test_durations_come_from_the_feature_store(tmp_path, tokenizer_folder):
  store = FeatureStore(tmp_path / "f", create=True)
  store.write("s.mp4", np.zeros((3, 4, 8), np.float32), 3.21)
  raws = [
    _raw("1", video="s.mp4", duration=9.0),
    _raw("2", video="later.mp4"),
    _raw("3", video="told.mp4", duration=60),
  ]
  path = _save(tmp_path / "r.json", raws)
  options = _options(tokenizer_folder, path, features=str(tmp_path / "f"))
  summary, _ = build(tmp_path / "d", options)
  data = Prepared(tmp_path / "d")
  assert data.columns.videos == ("s.mp4", "later.mp4", "told.mp4")
  np.testing.assert_array_equal(data.columns.duration, [3.21, np.nan, 60.0])
  assert summary["videos_without_features"] == {
    "count": 2,
    "as_pixels": 0,
    "examples": ["later.mp4", "told.mp4"],
  }
  assert summary["kept"]["videos_of_unknown_duration"] == 1


def test_a_stored_video_needs_no_file(tmp_path, tokenizer_folder, media):
  store = FeatureStore(tmp_path / "f", create=True)
  store.write("s.mp4", np.zeros((3, 4, 8), np.float32), 3.21)
  raws = [_raw(v, video=v) for v in ("s.mp4", "a.mp4", "none.mp4")]
  path = _save(tmp_path / "r.json", raws)
  options = _options(
    tokenizer_folder, path, media=str(media), features=str(tmp_path / "f")
  )
  summary, _ = build(tmp_path / "d", options)
  prepared = Prepared(tmp_path / "d")
  assert _ids(prepared) == ["s.mp4", "a.mp4"]
  # The other comes as pixels, by the rate that its file states.
  assert summary["videos_without_features"] == {
    "count": 1,
    "as_pixels": 1,
    "examples": ["a.mp4"],
  }
  assert "1 videos are not in the feature store and come as pixels" in table(
    summary
  )
  info = video_probe.probe(media / "a.mp4")
  np.testing.assert_array_equal(prepared.columns.fps, [np.nan, float(info.fps)])


def test_a_dataset_whose_videos_are_all_stored_is_reused(
  tmp_path, tokenizer_folder
):
  store = FeatureStore(tmp_path / "f", create=True)
  store.write("s.mp4", np.zeros((3, 4, 8), np.float32), 3.21)
  path = _save(tmp_path / "r.json", [_raw("1", video="s.mp4")])
  options = _options(tokenizer_folder, path, features=str(tmp_path / "f"))
  made, reused = build(tmp_path / "d", options)
  assert not reused and not made["videos_without_features"]["count"]
  again, reused = build(tmp_path / "d", options)
  assert reused and "not in the feature store" not in table(again)


def test_media_may_be_left_unchecked(tmp_path, tokenizer_folder, media):
  raws = [_raw("1", video="none.mp4"), _raw("2", image="i.png")]
  raws += [_raw("3", image=["none.png"] * 2)]
  path = _save(tmp_path / "r.json", raws)
  options = _options(
    tokenizer_folder, path, media=str(media), check_media=False
  )
  build(tmp_path / "d", options)
  assert _ids(Prepared(tmp_path / "d")) == ["1", "2", "3"]


def test_repeated_and_malformed_records(tmp_path, tokenizer_folder):
  one = _raw("same", 4)
  other = _raw("same", 6)
  lone = _raw("half \ud800 character")
  lines = [json.dumps(raw) for raw in (one, {"id": 7}, one, lone, other)]
  path = tmp_path / "r.jsonl"
  path.write_text("\n".join([*lines, "{", "3"]))
  summary, _ = build(tmp_path / "d", _options(tokenizer_folder, path))
  data = Prepared(tmp_path / "d")
  assert [len(record.turns) for record in data.records] == [4, 6]
  assert summary["repeated_ids"] == 1  # another text under the same id stays
  counts = {kind: n["count"] for kind, n in summary["dropped"].items()}
  assert counts == {"malformed record": 3, "duplicate": 1, "broken line": 1}
  assert [line["where"] for line in _skipped(tmp_path / "d")] == [
    f"{path}:{number}" for number in (2, 3, 4, 6, 7)
  ]


def test_a_list_of_files(tmp_path, tokenizer_folder):
  images = [_raw(f"t{i}") for i in range(30)]
  videos = [
    _raw(f"v{i}", video=f"{i % 4}.mp4", data_source="ego4d") for i in range(20)
  ]
  rows = [
    {"video": "q.mp4", "question": f"{i}?", "answer": "b", "source": "yc"}
    for i in range(12)
  ]
  _save(tmp_path / "sub" / "texts.json", images)
  _save(tmp_path / "videos.json", videos)
  _save(tmp_path / "table.json", rows)
  (tmp_path / "mix.yaml").write_text("""
datasets:
  - {json_path: sub/texts.json, sampling_strategy: "end:10%"}
  - {json_path: videos.json, sampling_strategy: "first:25%", stream: long,
     media_prefix: "some/{data_source}"}
  - {json_path: table.json, format: questions, stream: long,
     sampling_strategy: "first:2"}
""")
  items = tuple(read_list(tmp_path / "mix.yaml"))
  options = _options(tokenizer_folder, items=items)
  summary, _ = build(tmp_path / "d", options)
  data = Prepared(tmp_path / "d")
  ids = ["t27", "t28", "t29", *(f"v{i}" for i in range(5))]
  assert _ids(data) == [*ids, "yc/q.mp4#0", "yc/q.mp4#1"]
  columns = data.columns
  streams = [columns.streams[i] for i in columns.stream]
  assert streams == ["default"] * 3 + ["long"] * 7
  sources = [columns.sources[i] for i in columns.source]
  # A file's name stands for the source that its records do not tell.
  assert sources == ["texts"] * 3 + ["ego4d"] * 5 + ["yc"] * 2
  assert data.records[3].media == ("some/ego4d/0.mp4",)
  assert summary["streams"]["long"]["questions"] == 5 + 10
  assert summary["sources"]["yc"]["videos"] == 1
  assert summary["formats"] == {"": 8, "open": 10}
  assert not [p for p in (tmp_path / "d").iterdir() if p.is_dir()]


def test_processes_give_the_same(tmp_path, tokenizer_folder, monkeypatch):
  raws = [_raw(f"r{i}") if i % 7 else {"id": i} for i in range(300)]
  path = _save(tmp_path / "r.json", raws)
  options = _options(tokenizer_folder, path)
  build(tmp_path / "one", options, workers=1)
  monkeypatch.setattr(building, "WORTH_A_PROCESS", 1)
  monkeypatch.setattr(building, "CHUNK", 8)
  build(tmp_path / "many", options, workers=2)
  one, many = Prepared(tmp_path / "one"), Prepared(tmp_path / "many")
  assert list(one.records) == list(many.records)
  np.testing.assert_array_equal(one.columns.tokens, many.columns.tokens)
  for name in ("skipped.jsonl", "summary.json"):
    texts = [(tmp_path / d / name).read_text() for d in ("one", "many")]
    assert texts[0] == texts[1]


def test_a_dataset_of_the_same_inputs_is_reused(tmp_path, tokenizer_folder):
  path = _save(tmp_path / "r.json", [_raw("1"), _raw("2", video="v.mp4")])
  options = _options(tokenizer_folder, path)
  first, _ = build(tmp_path / "d", options)
  made = (tmp_path / "d" / "about.json").stat().st_mtime_ns
  again, reused = build(tmp_path / "d", options)
  assert reused
  assert again == first
  assert (tmp_path / "d" / "about.json").stat().st_mtime_ns == made
  other = _options(tokenizer_folder, path, seed=5)
  with pytest.raises(UserError, match=r"--overwrite.*\n  seed: 0 -> 5$"):
    build(tmp_path / "d", other)
  _save(path, [_raw("3"), _raw("4"), _raw("5")])
  with pytest.raises(UserError, match=r"\n  file .*r\.json: "):
    build(tmp_path / "d", options)
  assert len(Prepared(tmp_path / "d")) == 2
  build(tmp_path / "d", options, overwrite=True)
  assert _ids(Prepared(tmp_path / "d")) == ["3", "4", "5"]


def test_other_folders_are_never_overwritten(tmp_path, tokenizer_folder):
  path = _save(tmp_path / "r.json", [_raw("1")])
  options = _options(tokenizer_folder, path)
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("all of it")
  for overwrite in (False, True):
    with pytest.raises(UserError, match="is no prepared dataset"):
      build(tmp_path / "mine", options, overwrite=overwrite)
  assert (tmp_path / "mine" / "thesis.tex").exists()
  (tmp_path / "empty").mkdir()
  build(tmp_path / "empty", options)
  assert len(Prepared(tmp_path / "empty")) == 1
  with pytest.raises(UserError, match="no prepared dataset"):
    build(path, options)


def test_broken_inputs_leave_nothing_behind(tmp_path, tokenizer_folder):
  broken = tmp_path / "broken.json"
  broken.write_text(json.dumps([_raw("1")])[:-1] + ", {]")
  cases = {
    "after 1 whole records": _options(tokenizer_folder, broken),
    "cannot read .*none.json": _options(
      tokenizer_folder, tmp_path / "none.json"
    ),
    "media folder .* does not exist": _options(
      tokenizer_folder, broken, media=str(tmp_path / "none")
    ),
    "tokenizer folder .* does not exist": _options(tmp_path / "none", broken),
    "no conversation is left.*\n.*'conversations' must be": _options(
      tokenizer_folder, _save(tmp_path / "bad.json", [{}, {}])
    ),
    "the files hold no records": _options(
      tokenizer_folder, _save(tmp_path / "empty.json", [])
    ),
    "give --media": _options(
      tokenizer_folder,
      _save(tmp_path / "images.json", [_raw("1", image="a.png")]),
    ),
  }
  before = sorted(tmp_path.iterdir())
  for message, options in cases.items():
    with pytest.raises(UserError, match=message):
      build(tmp_path / "d", options)
  assert sorted(tmp_path.iterdir()) == before


def test_repairs_are_counted_and_listed(tmp_path, tokenizer_folder, media):
  usual = _raw("usual", image="i.png")
  usual["conversations"][0]["value"] = "What is it?\n<image>"
  late = _raw("late", 3, videos=["a.mp4"])
  late["conversations"][0]["value"] = "<video>\nWhat is it?"
  nameless = _raw("x", image="i.png")
  del nameless["id"]
  path = _save(tmp_path / "r.json", [_raw("t"), usual, late, nameless])
  options = _options(tokenizer_folder, path, media=str(media))
  summary, _ = build(tmp_path / "d", options)
  assert _ids(Prepared(tmp_path / "d")) == ["t", "usual", "late", "r.json[3]"]
  assert summary["dropped"] == {}
  counts = {kind: n["count"] for kind, n in summary["repaired"].items()}
  assert counts == {
    "marker moved to the front": 1,
    "video under another key": 1,
    "last question without answer": 1,
    "marker of another form": 1,
    "no id: numbered": 1,
  }
  lines = (tmp_path / "d" / "repaired.jsonl").read_text().splitlines()
  assert [json.loads(line)["id"] for line in lines] == ["late", "r.json[3]"]
  text = table(summary)
  assert "read otherwise than written, see repaired.jsonl" in text
  assert f"1 no id: numbered, such as {path}[3]" in text


def test_text_that_speaks_of_the_marker(tmp_path, tokenizer_folder):
  raw = _raw("t")
  raw["conversations"][0]["value"] = "What does <image> mean?"
  path = _save(tmp_path / "r.json", [raw])
  build(tmp_path / "d", _options(tokenizer_folder, path))
  data = Prepared(tmp_path / "d")
  tokenizer = Tokenizer.from_folder(tokenizer_folder)
  talk = encode_conversation(data.records[0].turns, tokenizer, slots=False)
  assert IMAGE not in talk.ids
  assert "What does <image> mean?" in tokenizer.decode(talk.ids)
  assert data.columns.tokens[0] == len(talk.ids)


ACCENTS = ("NFC", "NFD")


@pytest.mark.parametrize("written", ACCENTS)
@pytest.mark.parametrize("there", ACCENTS)
@pytest.mark.parametrize("where", ["media", "store"])
def test_accents_are_found_however_they_are_written(
  tmp_path, tokenizer_folder, media, written, there, where
):
  def name(form):
    return unicodedata.normalize(form, "café/é ü.mp4")

  more = {}
  if where == "media":
    (tmp_path / "m" / name(there)).parent.mkdir(parents=True)
    shutil.copy(media / "a.mp4", tmp_path / "m" / name(there))
    more["media"] = str(tmp_path / "m")
  else:
    store = FeatureStore(tmp_path / "f", create=True)
    store.write(name(there), np.zeros((3, 4, 8), np.float32), 3.0)
    more["features"] = str(tmp_path / "f")
  path = _save(tmp_path / "r.json", [_raw("v", video=name(written))])
  summary, _ = build(tmp_path / "d", _options(tokenizer_folder, path, **more))
  assert Prepared(tmp_path / "d").records[0].media == (name(there),)
  assert len(summary["repaired"]) == (written != there)


def test_names_that_are_not_there_say_what_is(
  tmp_path, tokenizer_folder, media
):
  folder = tmp_path / "m"
  (folder / "frames").mkdir(parents=True)
  for name in ("a.mp4", "Ü.mp4", "b.png"):
    (folder / name).write_bytes(b"x")
  one, two = (unicodedata.normalize(form, "é.mp4") for form in ACCENTS)
  (folder / one).write_bytes(b"x")
  (folder / two).write_bytes(b"x")
  # A third way to write it: e, and an accent that Unicode holds for the same.
  third = "e\u0341.mp4"
  cases = {
    "A.MP4": "but a.mp4 does",
    " a.mp4": "but a.mp4 does",
    "sub\\a.mp4": "but a.mp4 does",
    "a": "but a.mp4 does",
    "none.mp4": "none.mp4 does not exist; fetch it",
    "https://example.org/a.mp4": "is a URL; download it",
    third: r"e\u0341.mp4' does not exist, but ",
  }
  raws = [_raw(str(i), video=name) for i, name in enumerate(cases)]
  path = _save(tmp_path / "r.json", [_raw("t"), *raws])
  build(tmp_path / "d", _options(tokenizer_folder, path, media=str(folder)))
  reasons = [line["reason"] for line in _skipped(tmp_path / "d")]
  for reason, message in zip(reasons, cases.values(), strict=True):
    assert message in reason


def test_a_folder_of_frames_is_a_video(tmp_path, tokenizer_folder):
  folder = tmp_path / "m" / "shareVideoGPTV" / "v1"
  folder.mkdir(parents=True)
  for i in range(9):
    Image.new("RGB", (32, 24)).save(folder / f"c01_{i:04}.jpeg")
  (tmp_path / "m" / "empty").mkdir()
  raws = [_raw("v", video="shareVideoGPTV/v1"), _raw("e", video="empty")]
  path = _save(tmp_path / "r.json", raws)
  options = _options(tokenizer_folder, path, media=str(tmp_path / "m"))
  build(tmp_path / "d", options)
  columns = Prepared(tmp_path / "d").columns
  assert columns.videos == ("shareVideoGPTV/v1",)
  assert (columns.duration[0], columns.num_frames[0]) == (4.5, 9)
  (skipped,) = _skipped(tmp_path / "d")
  assert "folder without frames" in skipped["reason"]


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("out", "a" * 300, "File name too long"),
    ("out", "a" * 250, "File name too long"),  # with what is put before it
    ("out", "b\udcff", r"b'b\\xff' is no UTF-8 name"),
    ("out", "a\0b", "null byte"),
    ("out", "", "--out is empty"),
    ("media", "", "--media is empty"),
    ("media", "b\udcff", "is no UTF-8 name"),
    ("features", "a" * 300, "File name too long"),
    ("features", "", "--features is empty"),
    ("tokenizer", "a" * 300, "File name too long"),
    ("tokenizer", "", "--tokenizer is empty"),
  ],
)
def test_paths_that_cannot_be(
  tmp_path, tokenizer_folder, monkeypatch, field, value, message
):
  monkeypatch.chdir(tmp_path)
  path = _save(tmp_path / "r.json", [_raw("1")])
  options = _options(tokenizer_folder, path)
  if field != "out":
    options = dataclasses.replace(options, **{field: value})
  with pytest.raises(UserError, match=message):
    build(value if field == "out" else "d", options)
  assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_duration_in_milliseconds_is_not_known(tmp_path, tokenizer_folder):
  raws = [_raw("1", video="a.mp4", duration=3.6e7)]
  path = _save(tmp_path / "r.json", raws)
  build(tmp_path / "d", _options(tokenizer_folder, path))
  assert np.isnan(Prepared(tmp_path / "d").columns.duration).all()
