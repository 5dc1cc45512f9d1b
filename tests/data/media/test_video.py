import re
from fractions import Fraction

import av
import numpy as np
import pytest

from hourjax.data.media import frame_rules, video
from hourjax.data.media.images import resize
from hourjax.errors import UserError
from tests import videos

ENCODERS = sorted(
  n for n in ("libx264", "libvpx-vp9") if n in av.codecs_available
)


def _pixels(i, width=64, height=48):
  """Frame i: its brightness encodes i, a red corner marks the top."""
  pixels = np.full((height, width, 3), 40 + 8 * (i % 20), np.uint8)
  pixels[: height // 4, : width // 4] = [255, 0, 0]
  return pixels


def _write(
  path, frames, rate, codec="libx264", rotation=None, options=None
) -> str:
  with av.open(str(path), "w", options=options or {}) as container:
    stream = container.add_stream(codec, rate=Fraction(rate))
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    if rotation is not None:
      stream.set_display_rotation(rotation)
    for i in range(frames):
      frame = av.VideoFrame.from_ndarray(_pixels(i), format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return str(path)


def _decode(path, indices, size=32, **kwargs):
  return np.concatenate(
    list(video.decode_frames(path, indices, size, **kwargs))
  )


def _all_frames(path):
  with av.open(path) as container:
    return [
      frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)
    ]


# --- decoding ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("rate", ["30", "1/2", "30000/1001"])
def test_probe(tmp_path, suffix, rate):
  codec = "libvpx-vp9" if suffix == "webm" else "libx264"
  if codec not in ENCODERS:
    pytest.skip(f"no encoder {codec}")
  path = _write(tmp_path / f"a.{suffix}", 24, rate, codec)
  info = video.probe(path)
  assert (info.frames, info.width, info.height) == (24, 64, 48)
  assert float(info.fps) == pytest.approx(float(Fraction(rate)), rel=1e-3)
  assert info.duration == pytest.approx(24 / float(info.fps))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("live", ["0", "1"])
def test_a_varying_rate(tmp_path, suffix, live):
  """30 frames in the first second, then one a second until 10 s.

  Matroska's header gives the rate of the first second, and a live one no
  duration either.
  """
  path = videos.write(
    tmp_path / f"a.{suffix}",
    40,
    30,
    codec="libvpx-vp9" if suffix == "webm" else "libx264",
    times=[33 * i for i in range(30)] + [1000 * i for i in range(1, 11)],
    codec_options={} if suffix == "webm" else {"bf": "0"},
    options={} if suffix == "mp4" else {"live": live},
  )
  info = video.probe(path)
  assert info.frames == len(_all_frames(str(path))) == 40
  assert info.duration == pytest.approx(10, abs=0.5)


@pytest.mark.parametrize("suffix", ["mkv", "webm"])
@pytest.mark.parametrize("frames", [1, 2, 3, 50])
def test_a_live_recording(tmp_path, suffix, frames):
  codec = "libvpx-vp9" if suffix == "webm" else "libx264"
  path = videos.write(
    tmp_path / f"a.{suffix}", frames, 25, codec=codec, options={"live": "1"}
  )
  info = video.probe(path)
  assert (info.frames, info.fps) == (frames, 25)


@pytest.mark.parametrize("codec", ENCODERS)
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_decode_takes_the_named_frames(tmp_path, codec, batch):
  path = _write(tmp_path / "a.mkv", 30, 30, codec)
  frames = _all_frames(path)
  wanted = [0, 3, 4, 4, 17, 29]
  batches = list(video.decode_frames(path, wanted, 32, batch=batch))
  assert [len(b) for b in batches][:-1] == [batch] * (len(batches) - 1)
  expected = np.stack([resize(frames[i], 32) for i in wanted])
  got = np.concatenate(batches)
  np.testing.assert_array_equal(got, expected, strict=True)
  assert list(video.decode_frames(path, [], 32)) == []


def test_decode_at_half_a_frame_a_second(tmp_path):
  path = _write(tmp_path / "a.mp4", 40, "1/2")
  info = video.probe(path)
  indices, duration = frame_rules.extraction_frames(info.frames, info.fps)
  assert duration == 80.0
  assert _decode(path, indices, info=info).shape == (40, 32, 32, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "ts", "avi"])
def test_frame_at_a_moment(tmp_path, suffix, monkeypatch):
  """Those of decoding all, of which only the group around each is decoded."""
  codecs = {"webm": "libvpx-vp9", "avi": "mpeg4"}
  path = videos.write(
    tmp_path / f"a.{suffix}",
    200,
    10,
    codec=codecs.get(suffix, "libx264"),
    codec_options={"g": "20"},
  )
  every = [resize(frame, 32) for frame in _all_frames(str(path))]
  assert len(every) == 200
  decoded = []
  frames = video.FrameDecoder.__iter__

  def counted(decoder):
    for frame in frames(decoder):
      decoded.append(frame)
      yield frame

  monkeypatch.setattr(video.FrameDecoder, "__iter__", counted)
  wanted = [0, 1, 19, 20, 57, 123, 199, 140]
  for n in wanted:
    frame = video.frame_at(path, n / 10, 32)
    np.testing.assert_array_equal(frame, every[n], err_msg=str(n))
  # A transport stream has no index: it is read from further back.
  assert suffix == "ts" or len(decoded) <= 20 * len(wanted)
  last = video.frame_at(path, 99.0, 32)
  np.testing.assert_array_equal(last, every[-1])


def test_moments_of_rotated_and_broken_videos(tmp_path):
  path = _write(tmp_path / "a.mp4", 30, 10, rotation=180)
  frame = video.frame_at(path, 2.0, 32)
  assert int(frame[-1, -1, 0]) - frame[-1, -1, 1] > 150
  (tmp_path / "text.mp4").write_text("no video")
  with pytest.raises(UserError, match=r"text\.mp4 is not a video"):
    video.frame_at(tmp_path / "text.mp4", 0.0, 32)


@pytest.mark.parametrize(
  "angle, corner",
  [(0, (0, 0)), (90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))],
)
def test_rotated_videos_are_upright(tmp_path, angle, corner):
  """Counter-clockwise angles move the red corner to where they say."""
  path = _write(tmp_path / "a.mp4", 2, 30, rotation=angle)
  (frame,) = _decode(path, [1])
  red = (frame[..., 0].astype(int) - frame[..., 1]) > 150
  corners = [c for c in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if red[c]]
  assert corners == [corner]


def test_frames_cut_by_an_edit_list_do_not_count(tmp_path):
  """As in a clip that was cut out without encoding anew."""
  whole = _write(tmp_path / "whole.mp4", 60, 30)
  clip = str(tmp_path / "clip.mp4")
  with av.open(whole) as source, av.open(clip, "w") as target:
    stream = source.streams.video[0]
    copy = target.add_stream_from_template(stream)
    for packet in source.demux(stream):
      if packet.dts is not None:
        packet.pts -= int(1 / stream.time_base)
        packet.dts -= int(1 / stream.time_base)
        packet.stream = copy
        target.mux(packet)
  with av.open(clip) as container:
    assert container.streams.video[0].frames == 60
  assert video.probe(clip).frames == len(_all_frames(clip)) == 30


def test_indices_must_ascend(tmp_path):
  path = _write(tmp_path / "a.mp4", 5, 30)
  for indices in ([3, 1], [-1, 2]):
    with pytest.raises(ValueError, match="ascend"):
      _decode(path, indices)


# --- files that are no videos -----------------------------------------------


def _audio(path):
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=16000, layout="mono")
    sound = np.zeros((1, 1024), np.float32)
    frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
    frame.sample_rate = 16000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _without_index(path):
  _write(path, 20, 30)
  path.write_bytes(path.read_bytes()[:-900])


BROKEN = {
  "zero.mp4": (lambda p: p.touch(), "has 0 bytes"),
  "text.mp4": (
    lambda p: p.write_text("this is text\n" * 99),
    "is not a video, or is truncated \\(1287 bytes",
  ),
  "audio.mp4": (_audio, "has no video stream \\(streams: audio\\)"),
  "missing.mp4": (lambda p: None, "No such file"),
  "folder.mp4": (lambda p: p.mkdir(), "is not a video"),
  "cut.mp4": (_without_index, "truncated|no video stream"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path, name):
  make, message = BROKEN[name]
  path = tmp_path / name
  make(path)
  for read in (video.probe, lambda p: _decode(p, [0])):
    with pytest.raises(UserError, match=message) as error:
      read(path)
    assert str(path) in str(error.value)


def test_truncated_video(tmp_path):
  """Its header, which comes first, still promises every frame."""
  path = tmp_path / "a.mp4"
  _write(path, 60, 30, options={"movflags": "faststart"})
  path.write_bytes(path.read_bytes()[:-400])
  info = video.probe(path)
  assert info.frames == 60
  message = r"a\.mp4: \d+ frames could be decoded but frame 59 is needed, its "
  with pytest.raises(UserError, match=message + "header counts 60"):
    _decode(path, [0, 59], info=info)


def test_more_frames_asked_than_there_are(tmp_path):
  path = _write(tmp_path / "a.mp4", 10, 30)
  with pytest.raises(UserError, match=re.escape("10 frames could be decoded")):
    _decode(path, [0, 10])
