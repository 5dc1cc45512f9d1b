"""Odd and damaged videos in whole runs: each fails alone, with its reason."""

import json

import numpy as np
import pytest

from hourjax.data.media.frame_rules import extraction_frames
from hourjax.data.media.video import decode_frames, probe
from hourjax.data.prepare.convert import Videos
from hourjax.data.store.features import FeatureStore
from hourjax.evaluation.records import Records
from hourjax.evaluation.run import evaluate
from hourjax.extraction import beam
from hourjax.extraction.encoder import Encoder
from hourjax.inference.video_features import read_video_features
from hourjax.training.config import build_experiment
from tests import numbered
from tests.evaluation import fakes
from tests.extraction import towers

OPTIONS = {"g": "10", "bf": "0", "preset": "ultrafast"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two good videos, one read in part, three that cannot be read."""
  root = tmp_path_factory.mktemp("videos")
  plain = numbered.write(root / "plain.mp4", range(60), codec_options=OPTIONS)
  data = plain.read_bytes()

  def tag(out, stream):
    out.metadata["title"] = "XXXX"

  titled = root / "12:30 title.mp4"
  numbered.write(root / "t.mp4", range(20), before=tag).rename(titled)
  titled.write_bytes(titled.read_bytes().replace(b"XXXX", b"\xe9t\xe9\xff"))
  (root / "codec.mp4").write_bytes(data.replace(b"avc1", b"zzz9"))
  long = numbered.write(root / "part.mkv", range(400), codec_options=OPTIONS)
  whole = long.read_bytes()
  long.write_bytes(whole[: len(whole) * 96 // 100])
  (root / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
  (root / "list.mp4").write_text("ffconcat version 1.0\nfile plain.mp4\n")
  (root / "notes.txt").write_text("no video")
  return root


GOOD = {"plain.mp4", "12:30 title.mp4"}
BAD = {"codec.mp4", "cut.mkv", "list.mp4"}


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_extraction(folder, tmp_path, capsys):
  out = tmp_path / "store"
  failed = towers.extract(towers.params(), folder, out, batch_frames=8)
  assert {item.id for item in failed} == BAD
  store = FeatureStore(out)
  assert set(store.videos()) == GOOD | {"part.mkv"}
  share = store.share("part.mkv")
  assert 0.95 <= share < 1
  assert all(store.share(name) == 1 for name in GOOD)
  index = {row["video"]: row for row in _rows(out / "index-00000.jsonl")}
  assert index["part.mkv"]["share"] == share
  assert all("share" not in index[name] for name in GOOD)
  assert store.stored("part.mkv").frames == 128
  listed = {row["file"]: row for row in _rows(out / "failures-00000.jsonl")}
  assert listed.keys() == BAD | {"part.mkv"}
  assert listed["part.mkv"]["share"] == share
  assert "% of 128 frames can be read" in listed["cut.mkv"]["reason"]
  printed = capsys.readouterr().out
  assert "left out for their endings: 1 files (.txt 1)" in printed
  assert "1 read in part, 3 failed" in printed
  assert f"read in part part.mkv: {share:.2%} of its frames" in printed
  # The last sound frame stands in.
  features = towers.read_all(store, "part.mkv").astype(np.float32)
  there = round(share * 128)
  np.testing.assert_array_equal(
    features[there:], features[[-1] * (128 - there)]
  )


@pytest.mark.slow
def test_the_share_is_an_option(folder, tmp_path):
  names = tmp_path / "names.txt"
  names.write_text("part.mkv\ncut.mkv\n")
  out = tmp_path / "store"
  run = {"batch_frames": 8, "names": names}
  strict = towers.extract(towers.params(), folder, out, min_share=1.0, **run)
  assert {item.id for item in strict} == {"part.mkv", "cut.mkv"}
  assert (
    towers.extract(towers.params(), folder, out, min_share=0.5, **run) == []
  )
  assert 0.6 < FeatureStore(out).share("cut.mkv") < 0.7


def test_a_video_notes_damaged_frames(folder):
  encoder = Encoder(towers.params(), towers.MODEL, batch_frames=8)
  video = read_video_features(
    folder / "part.mkv", encoder, lambda done, total: None
  )
  assert 0.95 <= video.share < 1
  assert video.note.startswith(f"{video.share:.1%} of the frames wanted can be")
  whole = read_video_features(
    folder / "plain.mp4", encoder, lambda done, total: None
  )
  assert (whole.share, whole.note) == (1, "")


@pytest.mark.slow
def test_a_worker_of_a_pipeline(folder, tmp_path):
  config = towers.write_config(tmp_path / "config.py")
  spec = {}
  exec(config.read_text(), spec)
  experiment = build_experiment(spec["get_config"]().to_dict())
  job = beam.ExtractionJob(
    experiment, None, str(folder), str(tmp_path / "store"), batch_frames=8
  )
  row = beam.extract_video("part.mkv", job)
  assert row["frames"] == 128 and 0.95 <= row["share"] < 1
  assert "share" not in beam.extract_video("plain.mp4", job)
  assert "codec" in beam.extract_video("codec.mp4", job)["reason"]
  beam._worker_process(job).close()


def test_prepare(folder):
  videos = Videos(folder, None)
  names = sorted(GOOD | BAD | {"part.mkv"})
  for name in names:
    videos.request(name)
  facts = {name: videos.fact(name) for name in names}
  videos.close()
  assert {name for name in names if facts[name].problem} == BAD
  assert facts["12:30 title.mp4"].num_frames == 20
  assert facts["part.mkv"].duration == pytest.approx(40, abs=0.1)


class _Model(fakes.Model):
  """Decodes as the real one does."""

  def encode_memory(self, video):
    info = probe(video)
    frames, _ = extraction_frames(info.frames, info.fps)
    list(decode_frames(video, frames, 32, info=info))
    return super().encode_memory(video)


def test_an_evaluation_and_its_restart(folder, tmp_path):
  names = sorted(GOOD | BAD | {"part.mkv"})
  asked = [fakes.question(n, video=name) for n, name in enumerate(names)]
  for _ in range(2):
    task = fakes.make_task(asked, videos=folder)
    report = evaluate(_Model(), task, tmp_path)
    assert report.data["count"] == 3
    lost = Records(tmp_path).left_out()
    assert {row["video"] for row in lost.values()} == BAD
