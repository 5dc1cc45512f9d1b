"""Videos whose frames show their own number, and reading it back."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import av
import numpy as np

from hourjax.data.media import video

SIZE = (96, 72)
SIDE = 48
_CELLS = 4  # a side, one bit each


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
  """A number in black and white squares, the upper left marked in red."""
  width, height = size
  bits = [number >> bit & 1 for bit in range(_CELLS**2)]
  cells = np.array(bits, np.uint8).reshape(_CELLS, _CELLS) * 215 + 20
  rows, columns = np.arange(height), np.arange(width)
  shown = cells[rows * _CELLS // height][:, columns * _CELLS // width]
  shown = np.stack([shown] * 3, axis=-1)
  shown[: height // 12, : width // 12] = [230, 20, 20]
  return np.ascontiguousarray(shown)


def number(frame: np.ndarray) -> int:
  """What a decoded square shows."""
  cell = len(frame) // _CELLS
  parts = frame.reshape(_CELLS, cell, _CELLS, cell, 3)
  middle = parts[:, cell // 3 : -cell // 3, :, cell // 3 : -cell // 3]
  bits = middle.mean(axis=(1, 3, 4)).reshape(-1) > 128
  return sum(1 << int(bit) for bit in np.flatnonzero(bits))


def write(
  path: pathlib.Path,
  numbers: Iterable[int],
  rate: int | Fraction = 10,
  codec: str = "libx264",
  *,
  size: tuple[int, int] = SIZE,
  times: Sequence[int] | None = None,
  codec_options: dict[str, str] | None = None,
  options: dict[str, str] | None = None,
  format: str | None = None,
  before: Callable | None = None,
) -> pathlib.Path:
  """Encodes frames; `times` are in ms."""
  with av.open(str(path), "w", options=options or {}, format=format) as out:
    stream = out.add_stream(
      codec, rate=Fraction(rate), options=codec_options or {}
    )
    stream.width, stream.height = size
    stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    if times is not None:
      stream.codec_context.time_base = Fraction(1, 1000)
    if before:
      before(out, stream)
    for i, shown in enumerate(numbers):
      frame = av.VideoFrame.from_ndarray(picture(shown, size), format="rgb24")
      if times is not None:
        frame.pts, frame.time_base = times[i], Fraction(1, 1000)
      out.mux(stream.encode(frame))
    out.mux(stream.encode())
  return path


def packets(path: pathlib.Path) -> list[tuple]:
  """(bytes, pts, dts, key, duration) of the video's packets."""
  with av.open(str(path)) as source:
    stream = source.streams.video[0]
    return [
      (bytes(p), p.pts, p.dts, p.is_keyframe, p.duration)
      for p in source.demux(stream)
      if p.size
    ]


def remux(
  path: pathlib.Path,
  template: pathlib.Path,
  rows: list[tuple],
  *,
  later: float = 0,
  options: dict[str, str] | None = None,
) -> pathlib.Path:
  """Writes packets of another file, moved by so many seconds."""
  with (
    av.open(str(template)) as source,
    av.open(str(path), "w", options=options or {}) as out,
  ):
    stream = source.streams.video[0]
    copy = out.add_stream_from_template(stream)
    ticks = round(later / stream.time_base)
    for content, pts, dts, key, duration in rows:
      packet = av.Packet(content)
      packet.pts = None if pts is None else pts + ticks
      packet.dts = None if dts is None else dts + ticks
      packet.time_base, packet.is_keyframe = stream.time_base, key
      packet.duration = duration or 0
      packet.stream = copy
      out.mux(packet)
  return path


def read(
  path: pathlib.Path,
  *,
  min_share: float = video.MIN_SHARE,
  threads: int = 0,
  step: int = 1,
) -> tuple[video.VideoInfo, list[int], float]:
  """Every `step`-th frame: what is said of it, numbers shown, share read."""
  info, reading = video.probe(path), video.Reading()
  chunks = video.decode_frames(
    path,
    range(0, info.frames, step),
    SIDE,
    info=info,
    min_share=min_share,
    reading=reading,
    threads=threads,
  )
  shown = [number(frame) for chunk in chunks for frame in chunk]
  return info, shown, reading.share
