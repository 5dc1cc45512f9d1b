"""Undamaged videos of unusual kinds, each with the frames it displays."""

import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from hourjax.data.media import video, video_file
from hourjax.errors import UserError
from tests import numbered

GROUP = {"g": "20", "bf": "2", "sc_threshold": "0"}
ALL = list(range(60))


def _reads(path, numbers, seconds, *, threads=0):
  info, got, share = numbered.read(path, threads=threads)
  assert got == list(numbers)
  assert info.frames == len(got) and share == 1
  assert info.duration == pytest.approx(seconds, rel=0.03)
  return info


# --- frames that a file displays -------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  return numbered.write(folder / "a.ts", ALL, codec_options=GROUP)


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4", "flv", "avi"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_starts_between_key_frames(
  tmp_path, whole, suffix, threads
):
  rows = numbered.packets(whole)[7:]
  start = rows[0][2] / 90_000
  path = tmp_path / f"a.{suffix}"
  numbered.remux(path, whole, rows, later=-start)
  _reads(path, ALL[20:], 4.0, threads=threads)


@pytest.mark.parametrize(
  "codec, suffix",
  [("libx264", "mp4"), ("libx264", "mkv")]
  + [("libx265", suffix) for suffix in ("mp4", "mkv", "ts")],
)
def test_a_cut_at_an_open_group(tmp_path, codec, suffix):
  """Its first frames in time refer to what was cut off."""
  name = codec.removeprefix("lib")
  rules = "open-gop=1:keyint=20:min-keyint=20:bframes=4:b-adapt=0:scenecut=0"
  if codec == "libx265":
    rules += ":log-level=none"
  options = {f"{name}-params": rules}
  first = numbered.write(
    tmp_path / "w.mkv", ALL, codec=codec, codec_options=options
  )
  rows = numbered.packets(first)
  start = [i for i, row in enumerate(rows) if row[3]][1]
  cut = rows[start:]
  leading = sum(row[1] < cut[0][1] for row in cut)
  assert leading
  dts = next(row[2] for row in cut if row[2] is not None)
  path = tmp_path / f"a.{suffix}"
  numbered.remux(path, first, cut, later=-dts / 1000)
  missing = round(cut[0][1] / 100)
  _reads(path, ALL[missing:], 6.0 - missing / 10)


def test_hidden_frames_of_vp8_do_not_count(tmp_path):
  options = {"auto-alt-ref": "0", "lag-in-frames": "0", "g": "100"}
  options |= {"deadline": "realtime", "cpu-used": "8"}
  first = numbered.write(
    tmp_path / "w.webm", ALL, codec="libvpx", codec_options=options
  )
  rows = numbered.packets(first)
  for i in (10, 30, 31):
    content = bytearray(rows[i][0])
    assert content[0] & 0x10  # "show_frame"
    content[0] &= ~0x10
    rows[i] = (bytes(content), *rows[i][1:])
  path = numbered.remux(tmp_path / "a.webm", first, rows)
  info, got, share = numbered.read(path)
  assert got == [n for n in ALL if n not in (10, 30, 31)]
  assert info.frames == 57 and share == 1


@pytest.mark.parametrize(
  "first, last, visible",
  [
    (0b10_00_0_1_0_0, 0x00, False),  # marker, profile, existing, type, show
    (0b10_00_0_1_1_0, 0x00, True),
    (0b10_00_1_000, 0x00, True),  # shows one that was hidden
    (0b10_11_0_0_1_0, 0x00, False),  # profile 3 has a bit more
    (0b10_11_0_0_1_1, 0x00, True),
    (0b10_00_0_1_0_0, 0b110_01_001, True),  # hidden and displayed in one packet
  ],
)
def test_hidden_frames_of_vp9(first, last, visible):
  packet = av.Packet(bytes([first, 0, 0, last]))
  assert video_file.is_visible(packet, "vp9") == visible


def test_repeats_of_an_avi_are_no_frames(tmp_path):
  """Screen recorders write an empty chunk where nothing changed."""
  numbers = [n for n in ALL if n % 3 != 1]
  path = numbered.write(
    tmp_path / "a.avi",
    numbers,
    codec="mpeg4",
    times=[100 * n for n in numbers],
    before=lambda out, stream: setattr(
      stream.codec_context, "time_base", Fraction(1, 10)
    ),
  )
  _reads(path, numbers, 6.0)


@pytest.mark.parametrize(
  "suffix, codec, format",
  [
    ("avi", "libx264", None),
    ("avi", "mpeg4", None),
    ("h264", "libx264", "h264"),
    ("m2ts", "libx264", "mpegts"),
    ("vob", "mpeg2video", None),
    ("asf", "wmv2", None),
    ("gif", "gif", None),
  ],
)
def test_formats(tmp_path, suffix, codec, format):
  rate = 25 if codec in ("mpeg2video",) or format == "h264" else 10
  group = {"g": "20"} if codec in ("wmv2", "gif") else {"g": "20", "bf": "2"}
  path = numbered.write(
    tmp_path / f"a.{suffix}",
    ALL,
    rate,
    codec,
    codec_options=group,
    format=format,
  )
  _reads(path, ALL, 60 / rate)


# --- how long it lasts ------------------------------------------------------


@pytest.mark.parametrize(
  "later", [36_000, -2.5, 2**33 / 90_000 - 1, 95_000], ids=str
)
def test_recordings_joined(tmp_path, whole, later):
  """Put one after the other, as by `cat`: the clock jumps, or starts again."""
  rows = numbered.packets(whole)
  key = [i for i, row in enumerate(rows) if row[3]][1]
  one = numbered.remux(tmp_path / "1.ts", whole, rows[:key])
  more = {"muxdelay": "0", "output_ts_offset": "0"}
  base = 3 if later < 0 else 0
  two = numbered.remux(
    tmp_path / "2.ts", whole, rows[key:], later=later + base, options=more
  )
  if later < 0:
    one = numbered.remux(tmp_path / "1.ts", whole, rows[:key], later=3)
  path = tmp_path / "a.ts"
  path.write_bytes(one.read_bytes() + two.read_bytes())
  _reads(path, ALL, 6.0)
  for n in (0, 7, 19, 20, 33, 59):
    frame = video.frame_at(path, n / 10, numbered.SIDE)
    assert numbered.number(frame) == n


@pytest.mark.parametrize("suffix", ["flv", "mkv", "mp4"])
def test_a_live_recording_whose_first_frame_is_at_0(tmp_path, suffix):
  times = [0, *(3 * 3_600_000 + 100 * i for i in range(1, 60))]
  path = numbered.write(
    tmp_path / f"a.{suffix}", ALL, times=times, codec_options={"bf": "0"}
  )
  _reads(path, ALL, 6.0)


@pytest.mark.parametrize("suffix", ["flv", "mkv", "mp4"])
def test_a_frame_that_stands_long(tmp_path, suffix):
  """A page of a lecture: its time counts."""
  sound = _sound if suffix == "flv" else None  # else nothing speaks for it
  times = [100 * i + (30_000 if i > 25 else 0) for i in range(60)]
  path = tmp_path / f"a.{suffix}"
  _write_with(path, times, sound)
  info = _reads(path, ALL, 36.0)
  assert info.seconds is None
  frame = video.frame_at(path, 20.0, numbered.SIDE)
  assert numbered.number(frame) in (25, 26)


def _write_with(path, times, sound):
  with av.open(str(path), "w") as out:
    stream = out.add_stream("libx264", rate=10, options={"bf": "0"})
    stream.width, stream.height = numbered.SIZE
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, 1000)
    more = sound(out, times[-1] / 1000) if sound else lambda until: None
    for i, time in enumerate(times):
      more(time / 1000)
      frame = av.VideoFrame.from_ndarray(numbered.picture(i), format="rgb24")
      frame.pts, frame.time_base = time, Fraction(1, 1000)
      out.mux(stream.encode(frame))
    out.mux(stream.encode())


def _sound(out, seconds, rate=16_000):
  stream = out.add_stream("aac", rate=rate, layout="mono")
  state = [0]

  def until(second):
    while state[0] < second * rate:
      frame = av.AudioFrame.from_ndarray(
        np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
      )
      frame.sample_rate, frame.pts = rate, state[0]
      out.mux(stream.encode(frame))
      state[0] += 1024

  return until


def test_sound_that_is_longer_promises_no_frames(tmp_path):
  path = tmp_path / "a.mkv"
  with av.open(str(path), "w") as out:
    stream = out.add_stream("libx264", rate=10)
    stream.width, stream.height = numbered.SIZE
    stream.pix_fmt = "yuv420p"
    more = _sound(out, 12)
    for n in ALL:
      frame = av.VideoFrame.from_ndarray(numbered.picture(n), format="rgb24")
      out.mux(stream.encode(frame))
    out.mux(stream.encode())
    more(12)
  _reads(path, ALL, 6.0)


# --- which stream, and which way up -----------------------------------------


@pytest.mark.parametrize(
  "suffix, codec, count, size, flag",
  [
    ("mkv", "libx264", 6, (48, 36), 0),
    ("mkv", "libx264", 6, (48, 36), av.stream.Disposition.default),
    ("mp4", "mjpeg", 1, (192, 144), 0),
    ("mkv", "mjpeg", 1, (192, 144), 0),
    ("mp4", "libx264", 6, (192, 144), av.stream.Disposition.timed_thumbnails),
    ("mp4", "mjpeg", 1, (48, 36), av.stream.Disposition.attached_pic),
    ("ts", "libx264", 6, (48, 36), 0),
  ],
)
def test_the_main_video_is_not_the_first_stream(
  tmp_path, suffix, codec, count, size, flag
):
  path = tmp_path / f"a.{suffix}"
  with av.open(str(path), "w") as out:
    small = out.add_stream(codec, rate=1)
    small.width, small.height = size
    small.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    main = out.add_stream("libx264", rate=10)
    main.width, main.height = numbered.SIZE
    main.pix_fmt = "yuv420p"
    small.disposition, main.disposition = flag, 0
    for stream, numbers in ((small, range(100, 100 + count)), (main, ALL)):
      for n in numbers:
        pixels = numbered.picture(n, (stream.width, stream.height))
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        out.mux(stream.encode(frame))
      out.mux(stream.encode())
  _reads(path, ALL, 6.0)
  assert numbered.number(video.frame_at(path, 3.3, numbered.SIDE)) == 33


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_all_orientations(tmp_path, turn, mirrored, suffix):
  """Counter-clockwise, then mirrored left to right."""
  path = tmp_path / f"a.{suffix}"
  options = {
    "before": lambda out, stream: stream.set_display_rotation(
      turn, hflip=mirrored
    )
  }
  numbered.write(path, [0x8421 ^ 0x0007] * 2, **options)
  pixels = np.rot90(numbered.picture(0x8421 ^ 0x0007), turn // 90)
  pixels = pixels[:, ::-1] if mirrored else pixels
  square = video.resize(np.ascontiguousarray(pixels), numbered.SIDE)
  (frame,) = np.concatenate(list(video.decode_frames(path, [1], 48)))
  off = np.abs(frame.astype(int) - square)
  assert off.mean() < 8 and np.percentile(off, 90) < 40
  moment = video.frame_at(path, 0.1, numbered.SIDE)
  np.testing.assert_array_equal(moment, frame)


def test_mirrored_up_and_down(tmp_path):
  path = numbered.write(
    tmp_path / "a.mp4",
    [0x8426] * 2,
    before=lambda out, s: s.set_display_rotation(0, vflip=True),
  )
  (frame,) = np.concatenate(list(video.decode_frames(path, [0], 48)))
  assert numbered.number(frame[::-1]) == 0x8426


# --- names, titles and what files say ---------------------------------------


@pytest.mark.parametrize(
  "name",
  [
    "2024-05-01T12:30:00.mp4",
    "50% of #1, take 2? [é].mp4",
    "-i.mp4",
    "http:x.mp4",
    "concat:a.mp4|b.mp4",
    "a%03d.mp4",
    "two\nlines 東京.mp4",
    os.fsdecode(b"latin \xe9.mp4"),
  ],
)
def test_names(tmp_path, whole, name, monkeypatch):
  numbered.remux(tmp_path / "x.mp4", whole, numbered.packets(whole))
  (tmp_path / "x.mp4").rename(tmp_path / name)
  _reads(tmp_path / name, ALL, 6.0)
  monkeypatch.chdir(tmp_path)
  assert video.probe(name).frames == 60


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "flv"])
@pytest.mark.parametrize(
  "title",
  [
    "テスト動画".encode("shift_jis"),
    "Café à".encode("latin-1"),
    b"cut \xe6\xb5",
  ],
)
def test_titles_in_other_encodings(tmp_path, suffix, title):
  def tag(out, stream):
    out.metadata["title"] = "X" * 20

  path = tmp_path / f"a.{suffix}"
  codec = "mpeg4" if suffix == "avi" else "libx264"
  numbered.write(path, ALL[:20], codec=codec, before=tag)
  data = path.read_bytes()
  assert b"X" * 20 in data
  path.write_bytes(data.replace(b"X" * 20, title.ljust(20)))
  _reads(path, ALL[:20], 2.0)


def test_a_handler_in_another_encoding(tmp_path):
  path = numbered.write(tmp_path / "a.mp4", ALL[:20])
  data = path.read_bytes()
  assert b"VideoHandler" in data
  path.write_bytes(data.replace(b"VideoHandler", b"Vid\xe9o\xffHandle"))
  _reads(path, ALL[:20], 2.0)


@pytest.mark.parametrize("tag", [b"zzz9", b"encv"])
def test_a_codec_that_nobody_knows(tmp_path, tag):
  path = numbered.write(tmp_path / "a.mp4", ALL[:5])
  path.write_bytes(path.read_bytes().replace(b"avc1", tag))
  with pytest.raises(UserError, match=r"codec that cannot be decoded"):
    numbered.read(path)
  with pytest.raises(UserError, match=r"codec that cannot be decoded"):
    video.frame_at(path, 0, 48)


PLAYLISTS = {
  "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\nx.mp4\n"
  "#EXT-X-ENDLIST\n",
  "concat.mkv": "ffconcat version 1.0\nfile x.mp4\n",
  "sdp.ts": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
  "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
  "meta.avi": ";FFMETADATA1\ntitle=x\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_opens_no_other_file(tmp_path, whole, name, monkeypatch):
  monkeypatch.chdir(tmp_path)
  numbered.remux(tmp_path / "x.mp4", whole, numbered.packets(whole))
  (tmp_path / name).write_text(PLAYLISTS[name])
  with pytest.raises(UserError, match=f"{name} is not a video"):
    video.probe(tmp_path / name)


def test_an_absurd_size(tmp_path):
  path = numbered.write(tmp_path / "a.mp4", [1], codec="mpeg4")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(video_file, "MAX_PIXELS", 96 * 72 - 1)
    with pytest.raises(UserError, match=r"frames of 96 x 72 pixels, at most"):
      video.probe(path)


@pytest.mark.parametrize(
  "error", [MemoryError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
            AttributeError("no width"), NotImplementedError(),
            OverflowError("too large")],
)  # fmt: skip
def test_whatever_a_file_raises_is_its_own_failure(
  tmp_path, monkeypatch, error
):
  path = numbered.write(tmp_path / "a.mp4", ALL[:5])
  info = video.probe(path)

  def fails(*_, **__):
    raise error

  monkeypatch.setattr(video_file.FrameDecoder, "_numbered", fails)
  with pytest.raises(UserError, match=r"a\.mp4: cannot be read as a video"):
    list(video.decode_frames(path, [0], 48, info=info))
  with pytest.raises(UserError, match=type(error).__name__):
    video.frame_at(path, 0, 48)
  monkeypatch.setattr(video_file.av, "open", fails)
  with pytest.raises(UserError, match=r"a\.mp4: cannot be read as a video"):
    list(video.decode_frames(path, [0], 48, info=info))


_STOPS = """
import sys, threading
import av
from hourjax.data.media import video

path = sys.argv[1]
info = video.probe(path)
av.logging.set_level(av.logging.DEBUG)

def stops():
  for i in range(25):
    chunks = video.decode_frames(
      path, range(40), 32, info=info, batch=i % 7 + 1, threads=4, min_share=0
    )
    next(chunks)
    chunks.close()

workers = [threading.Thread(target=stops) for _ in range(4)]
for worker in workers:
  worker.start()
for worker in workers:
  worker.join()
print("stopped")
"""


@pytest.mark.slow
def test_decoders_may_be_stopped_early(tmp_path):
  """Stopped decoders do not hang while a library logs through Python.

  They run in a process of their own: one that hangs keeps the interpreter
  locked.
  """
  options = {"g": "30", "preset": "ultrafast"}
  path = numbered.write(
    tmp_path / "a.mkv", ALL, size=(320, 240), codec_options=options
  )
  data = bytearray(path.read_bytes())
  for at in range(3000, len(data), 997):  # damaged, so that FFmpeg logs
    data[at] ^= 0xFF
  path.write_bytes(data)
  done = subprocess.run(
    [sys.executable, "-c", _STOPS, str(path)],
    capture_output=True,
    timeout=120,
    check=True,
  )
  assert done.stdout.endswith(b"stopped\n")
