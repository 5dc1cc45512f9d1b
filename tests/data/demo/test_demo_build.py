import dataclasses
import json
import shutil

import av
import numpy as np
import pytest
import tokenizers

from configs.demo import MODEL
from hourjax import demo
from hourjax.data.demo import build, drawing, world
from hourjax.data.demo import build as records
from hourjax.errors import UserError


def _decode(path):
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    return float(stream.average_rate), frames


def test_videos_show_their_scripts(built, small):
  for group in small.scripts().values():
    for s in group:
      rate, frames = _decode(built / "videos" / f"{s.name}.mp4")
      assert rate == 1.0
      assert len(frames) == s.duration
      for t in filter(s.needle.shown_at, range(s.duration)):
        centre = frames[t][44:52, 44:52].mean(axis=(0, 1))
        colours = np.array([world.COLOURS[c] for c in world.NEEDLE_COLOURS])
        nearest = np.abs(colours - centre).sum(axis=1).argmin()
        assert world.NEEDLE_COLOURS[nearest] == s.needle.colour
      for t in range(0, s.duration, 7):
        error = np.abs(frames[t].astype(int) - drawing.frame(s, t)).mean()
        assert error < 12, (s.name, t)


def test_records_name_existing_videos(built, small):
  turns = {}
  for name in build.FILES[1:]:
    items = json.loads((built / f"{name}.json").read_text())
    assert {r["data_source"] for r in items} == {"demo"}
    assert len({r["id"] for r in items}) == len(items)
    for record in items:
      assert (built / "videos" / record["video"]).is_file()
    turns[name] = [len(r["questions"]) for r in items]
  # Two conversations about each of three videos, and one test video.
  assert set(turns["lookups"]) <= {5, 6} and len(turns["lookups"]) == 6
  assert turns["train"] == [records.TURNS] * 6
  assert turns["memory"] == [records.TURNS] * 6
  assert len(turns["test"]) in range(20, 24) and set(turns["test"]) == {1}
  summary = json.loads((built / "demo.json").read_text())
  needles = {
    name: (part["records"], part["needle_questions"])
    for name, part in summary["splits"].items()
  }
  assert needles == {
    "lookups": (6, 0),
    "train": (6, 0),
    "memory": (6, 24),
    "test": (len(turns["test"]), 2),
  }  # fmt: skip
  assert "train" in demo.table(summary)


def test_captions_say_what_frames_show(built, small):
  records = json.loads((built / "captions.json").read_text())
  scripts = {f"{s.name}.mp4": s for s in small.scripts()["train"]}
  assert {r["video"] for r in records} == set(scripts)
  cards = clips = 0
  for record in records:
    video, second = scripts[record["video"]], record["second"]
    if video.needle.shown_at(second):
      assert record["captions"] == [video.needle.kind, video.needle.colour]
      cards += 1
    elif video.clip.shown_at(second):
      thing, _ = video.clip.thing_at(second)
      assert record["captions"] == ["clip", thing, video.clip.word]
      clips += 1
    else:
      scene = next(s for s in video.scenes if s.start <= second < s.end)
      assert set(record["captions"]) == {
        getattr(scene, name)
        for name in ("place", "kind", "colour", "side", "level", "action")
      }
  # Every second of a card or clip has a caption, and a part of the others.
  assert clips == sum(
    end - start for s in scripts.values() for start, end in s.clip.spans
  )
  assert cards == sum(
    end - start for s in scripts.values() for start, end in s.needle.spans
  )
  others = len(records) - clips - cards
  parts = [s.duration // build.CAPTION_SECONDS + 1 for s in scripts.values()]
  assert others <= sum(parts)


def test_size_of_the_whole_data_set():
  seconds = build.Options().seconds
  assert seconds["train"] == [(130, 170)] * 1080
  assert len(seconds["test"]) == 68
  assert max(seconds["test"]) == (3600, 3600)


def test_second_run_reuses(built, small):
  before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
  summary, reused = build.build(built, small)
  assert reused and summary["complete"]
  assert before == {p: p.stat().st_mtime_ns for p in built.rglob("*")}


def test_other_options_write_anew(built, small, tmp_path):
  folder = tmp_path / "data"
  shutil.copytree(built, folder)
  first = (folder / "videos" / "train_0001.mp4").read_bytes()
  other = dataclasses.replace(small, seed=1, train_videos=1)
  _, reused = build.build(folder, other)
  assert not reused
  assert (folder / "videos" / "train_0001.mp4").read_bytes() != first
  names = sorted(p.name for p in (folder / "videos").iterdir())
  assert names == ["test_0001.mp4", "train_0001.mp4"]


def test_same_options_same_bytes(built, small, tmp_path):
  build.build(tmp_path, small)
  for path in sorted(p for p in built.rglob("*") if p.is_file()):
    again = tmp_path / path.relative_to(built)
    assert path.read_bytes() == again.read_bytes(), path


def test_stopped_run_leaves_no_half_video_and_goes_on(
  small, tmp_path, monkeypatch
):
  whole = drawing.frame

  def stop(s, second):
    if s.name == "train_0002" and second == 100:
      raise KeyboardInterrupt
    return whole(s, second)

  monkeypatch.setattr(drawing, "frame", stop)
  with pytest.raises(KeyboardInterrupt):
    build.build(tmp_path, small)
  done = {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.mp4")}
  assert "train_0002.mp4" not in done
  assert not list(tmp_path.rglob("*.part*"))
  assert not json.loads((tmp_path / "demo.json").read_text())["complete"]
  monkeypatch.setattr(drawing, "frame", whole)
  _, reused = build.build(tmp_path, small)
  assert not reused
  for s in small.scripts()["train"]:
    path = tmp_path / "videos" / f"{s.name}.mp4"
    assert len(_decode(path)[1]) == s.duration
    if path.name in done:
      assert path.stat().st_mtime_ns == done[path.name]


def test_tokenizer(built):
  path = built / "tokenizer" / "tokenizer.json"
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  assert tokenizer.get_vocab_size() <= MODEL.decoder.vocab
  assert tokenizer.token_to_id("Ċ") == 198
  breaks = {t for t in tokenizer.get_vocab() if "Ċ" in t}
  assert breaks <= {"Ċ", "ĊĊ"}
  text = "<|im_start|>user\nWhich?\nA. red\nlast 214.00 s<|im_end|>\n"
  pieces = tokenizer.encode(text).tokens
  assert pieces[0] == "<|im_start|>" and pieces[-2] == "<|im_end|>"
  assert pieces.count("Ċ") == 4 and "A" in pieces
  assert [p for p in pieces if p.isdigit()] == list("21400")
  odd = "naïve 火 \t\r\n\n\n x"
  assert tokenizer.decode(tokenizer.encode(odd).ids) == odd
  config = json.loads((path.parent / "tokenizer_config.json").read_text())
  assert config == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_mistakes_are_named(tmp_path):
  with pytest.raises(UserError, match="train_videos is 0; set it to at"):
    build.Options(train_videos=0)
  with pytest.raises(UserError, match="test_scale is -1"):
    build.Options(test_scale=-1)
  (tmp_path / "demo.json").write_text("[]")
  with pytest.raises(UserError, match="delete the file"):
    build.build(tmp_path, build.Options(train_videos=1))


@pytest.mark.parametrize(
  "name", ["../kept.txt", "/kept.txt", "a/../../kept.mp4"]
)
def test_a_summary_cannot_name_other_files_to_delete(tmp_path, name):
  """Videos of other options are deleted by the names in demo.json."""
  kept = tmp_path / "kept.txt"
  kept.touch()
  (tmp_path / "data" / "videos").mkdir(parents=True)
  summary = {"options": {}, "complete": True, "videos": [name]}
  (tmp_path / "data" / "demo.json").write_text(json.dumps(summary))
  with pytest.raises(UserError, match=r"no summary of demo data.*videos\.0"):
    build.build(tmp_path / "data", build.Options(train_videos=1))
  assert kept.exists()
