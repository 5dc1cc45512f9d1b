"""Videos of every awkward kind, made on the spot."""

import pathlib
from fractions import Fraction

import av
import numpy as np

SIZE = (64, 48)


def picture(i: int, size: tuple[int, int] = SIZE) -> np.ndarray:
  """Frame i: bars that differ from frame to frame, a red corner upper left."""
  width, height = size
  shown = np.full((height, width, 3), 40 + 8 * (i % 20), np.uint8)
  shown[:, (3 * i) % width :: 9] = 250 - (i % 7) * 30
  shown[: height // 4, : width // 4] = [255, 0, 0]
  return shown


def write(
  path: str | pathlib.Path,
  frames: int,
  rate: Fraction | float | str = 30,
  *,
  codec: str = "libx264",
  size: tuple[int, int] = SIZE,
  rotation: int | None = None,
  times: list[int] | None = None,
  ticks: int = 1000,
  options: dict | None = None,
  codec_options: dict | None = None,
) -> pathlib.Path:
  """A video of `picture`s; `times` in 1 / `ticks` s are for a varying rate."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), "w", options=options or {}) as container:
    stream = container.add_stream(
      codec, rate=Fraction(rate), options=codec_options or {}
    )
    stream.width, stream.height = size
    stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
    if times:
      stream.codec_context.time_base = Fraction(1, ticks)
    if rotation is not None:
      stream.set_display_rotation(rotation)
    for i in range(frames):
      frame = av.VideoFrame.from_ndarray(picture(i, size), format="rgb24")
      if times:
        frame.pts, frame.time_base = times[i], Fraction(1, ticks)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def write_repeated(
  path: pathlib.Path, frames: int, rate: int, *, size: tuple[int, int]
) -> None:
  """A long video, cheaply: sixty encoded frames over and over again."""
  once = write(
    path.with_suffix(".once.mp4"),
    60,
    rate,
    size=size,
    codec_options={"preset": "ultrafast"},
  )
  with av.open(str(once)) as source, av.open(str(path), "w") as target:
    stream = source.streams.video[0]
    copy = target.add_stream_from_template(stream)
    packets = [p for p in source.demux(stream) if p.size]
    data = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
    length = int(60 / rate / stream.time_base)
    for start in range(0, frames // 60 * length, length):
      for content, pts, dts, key in data:
        packet = av.Packet(content)
        packet.pts, packet.dts = pts + start, dts + start
        packet.time_base, packet.is_keyframe = stream.time_base, key
        packet.stream = copy
        target.mux(packet)
  once.unlink()


def sound(path: pathlib.Path) -> None:
  """A video container with audio only."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=16000, layout="mono")
    frame = av.AudioFrame.from_ndarray(
      np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
    )
    frame.sample_rate = 16000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def truncate(path: pathlib.Path, keep: float) -> None:
  """Keeps the first part of a file."""
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * keep)])


def good(folder: pathlib.Path) -> dict[str, tuple[int, float]]:
  """Videos that must work; name -> (frames, seconds)."""
  write(folder / "plain.mp4", 150)
  write(folder / "slow.mp4", 20, "1/2")
  write(folder / "slower.mkv", 12, "1/5")
  write(folder / "sixty.mp4", 140, 60)
  write(folder / "rotated.mp4", 6, rotation=90)
  write(folder / "odd.mp4", 6, size=(63, 47))
  write(folder / "one.mp4", 1)
  write(folder / "matroska.mkv", 9)
  write(folder / "vp9.webm", 9, codec="libvpx-vp9")
  write(
    folder / "hidden.webm",
    60,
    codec="libvpx",
    codec_options={"auto-alt-ref": "1", "lag-in-frames": "16"},
  )
  write(folder / "old.avi", 9, codec="mpeg4")
  write(folder / "live.webm", 9, codec="libvpx-vp9", options={"live": "1"})
  write(folder / "live.mkv", 33, options={"live": "1"})
  write(folder / "shows" / "a b - été 東京.mp4", 8)
  # 30 frames in the first second, then one a second.
  times = [i * 33 for i in range(30)] + [1000 * i for i in range(1, 11)]
  write(folder / "varying.mp4", 40, 30, times=times)
  seconds = {
    "slow.mp4": 40.0,
    "slower.mkv": 60.0,
    "sixty.mp4": 140 / 60,
    "varying.mp4": None,
  }
  counts = {
    "plain.mp4": 150,
    "slow.mp4": 20,
    "slower.mkv": 12,
    "sixty.mp4": 140,
    "rotated.mp4": 6,
    "odd.mp4": 6,
    "one.mp4": 1,
    "matroska.mkv": 9,
    "vp9.webm": 9,
    "hidden.webm": 60,
    "old.avi": 9,
    "live.webm": 9,
    "live.mkv": 33,
    "shows/a b - été 東京.mp4": 8,
    "varying.mp4": 40,
  }
  return {n: (c, seconds.get(n, c / 30)) for n, c in counts.items()}


def bad(folder: pathlib.Path) -> dict[str, str]:
  """Files that must fail; name -> pattern of the reason."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "zero.mp4").touch()
  (folder / "text.mp4").write_text("this is text\n" * 99)
  sound(folder / "audio.mp4")
  write(folder / "no index.mp4", 20)
  truncate(folder / "no index.mp4", 0.5)
  # Its header, which comes first, still promises every frame; the last
  # frames of 300 are missing, so that it breaks in mid-decode.
  write(folder / "cut.mp4", 300, options={"movflags": "faststart"})
  truncate(folder / "cut.mp4", 0.9)
  return {
    "zero.mp4": "has 0 bytes",
    "text.mp4": "is not a video",
    "audio.mp4": "has no video stream",
    "no index.mp4": "truncated|no video stream",
    "cut.mp4": "truncated|damaged",
  }
