"""Video files: what they say about themselves, and decoding their frames."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8

from hourjax.data import frame_folder
from hourjax.data.images import resize
from hourjax.errors import UserError

_TOLERANCE = 1.1  # between a header's frame rate and the packets' times


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """What a video file says about itself.

  Attributes:
    frames: pictures that decoding gives.
    fps: average frames a second.
    duration: frames / fps, in seconds.
    width: of a decoded picture before rotation, in pixels.
    height: likewise.
  """

  frames: int
  fps: Fraction
  duration: float
  width: int
  height: int


def probe(path: str | os.PathLike) -> VideoInfo:
  """Reads the header, and every packet where the header has no frame count.

  A folder of pictures is a video too, see `frame_folder`.

  Raises:
    UserError: missing, empty, not a video, without pictures or rate.
  """
  if os.path.isdir(path):
    return VideoInfo(*frame_folder.probe(path))
  with _open(path) as container:
    stream = _video_stream(container, path)
    rate = stream.average_rate or stream.guessed_rate
    width, height = stream.width, stream.height
    frames, span = _count_frames(container, stream, path)
  if not frames:
    raise UserError(f"{path} has a video stream of 0 frames; drop the record")
  if not rate or not width or not height:
    raise UserError(
      f"{path}: frame rate {rate}, size {width} x {height}; the header is "
      "damaged, encode the file again"
    )
  # A header without a count (Matroska) may give the rate of the first second
  # alone; where the rate varies, the times of the packets tell.
  if span and not 1 / _TOLERANCE < frames / rate / span < _TOLERANCE:
    rate = frames / span
  return VideoInfo(
    frames, Fraction(rate), float(frames / Fraction(rate)), width, height
  )


def decode_frames(
  path: str | os.PathLike,
  indices: Sequence[int] | Int[np.ndarray, "F"],
  size: int,
  *,
  info: VideoInfo | None = None,
  batch: int = 64,
  threads: int = 0,
) -> Iterator[UInt8[np.ndarray, "n size size 3"]]:
  """Decodes frames in order, upright, resized to a square like any image.

  Args:
    path: of the video.
    indices: frames to take, ascending; one may occur several times.
    size: side of the result, in pixels.
    info: what `probe` said, to report it if the file turns out shorter.
    batch: frames yielded at a time; the memory held is about theirs.
    threads: of the decoder; 0 is one a core.

  Yields:
    RGB frames: `batch` of them, in the end what is left.

  Raises:
    UserError: cannot be decoded, or ends before the last index.
    ValueError: indices that do not ascend, or are negative.
  """
  wanted = np.asarray(indices, np.int64)
  if len(wanted) == 0:
    return
  if wanted[0] < 0 or (np.diff(wanted) < 0).any():
    raise ValueError("frame indices must be >= 0 and ascend")
  if os.path.isdir(path):
    yield from frame_folder.decode_frames(path, wanted, size, batch)
    return
  pending, decoded = [], 0
  wanted, last = iter(wanted.tolist()), int(wanted[-1])
  following = next(wanted)
  with _open(path) as container:
    for frame in _frames(container, path, threads):
      if decoded == following:
        picture = resize(frame.rgb(), size)
        while following == decoded:
          pending.append(picture)
          following = next(wanted, None)
          if len(pending) == batch:
            yield np.stack(pending)
            pending = []
      decoded += 1
      if following is None:
        break
  if following is not None:
    header = f", its header counts {info.frames}" if info else ""
    raise UserError(
      f"{path}: {decoded} frames could be decoded but frame {last} is needed"
      f"{header}; the file is truncated, fetch it again"
    )
  if pending:
    yield np.stack(pending)


def frame_at(
  path: str | os.PathLike, second: float, size: int
) -> UInt8[np.ndarray, "size size 3"]:
  """What a video shows at a moment, as `decode_frames` gives it.

  Decodes from the key frame before: an hour's end costs no more than its start.

  Args:
    path: of the video.
    second: since its first frame; later ones show the last frame.
    size: side of the result, in pixels.

  Raises:
    UserError: cannot be decoded.
  """
  if os.path.isdir(path):
    return frame_folder.frame_at(path, second, size)
  # Some formats have no index and are sought in too far, or not at all.
  for back in (0, 10, 60, math.inf):
    with _open(path) as container:
      stream = _video_stream(container, path)
      start, base = stream.start_time or 0, stream.time_base
      half = 0.5 / float(stream.average_rate or stream.guessed_rate or 1)
      if back < math.inf:
        earlier = max(0, second - back)
        with contextlib.suppress(av.error.FFmpegError):
          container.seek(start + int(earlier / base), stream=stream)
      first, frame = None, None
      for frame in _frames(container, path, threads=0):
        pts = frame.raw.pts
        time = 0.0 if pts is None else float((pts - start) * base)
        first = time if first is None else first
        if time > second - half:
          break
      if frame is not None and (first < second + half or back == math.inf):
        return resize(frame.rgb(), size)
  raise UserError(f"{path}: no frame can be decoded; fetch it again")


@dataclasses.dataclass
class _Frame:
  """A decoded picture that is converted only if wanted."""

  raw: av.VideoFrame
  converter: VideoReformatter

  def rgb(self) -> np.ndarray:
    # One converter for all frames: setting it up costs more than its work.
    pixels = self.converter.reformat(self.raw, format="rgb24").to_ndarray()
    turns = round(self.raw.rotation / 90) % 4  # counter-clockwise
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _frames(container, path, threads) -> Iterator[_Frame]:
  stream = _video_stream(container, path)
  stream.thread_type = "AUTO"
  stream.codec_context.thread_count = threads
  converter = VideoReformatter()
  decoded = 0
  try:
    for frame in container.decode(stream):
      yield _Frame(frame, converter)
      decoded += 1
  except av.error.FFmpegError as error:
    raise UserError(
      f"{path}: decoding fails after {decoded} frames ({error.strerror}); the "
      "file is damaged, fetch it again"
    ) from error


def _open(path):
  try:
    size = os.path.getsize(path)
  except OSError as error:
    raise UserError(f"cannot read video {path}: {error.strerror}") from error
  if size == 0:
    raise UserError(f"{path} has 0 bytes; fetch it again")
  try:
    return av.open(os.fspath(path))
  except (av.error.FFmpegError, OSError) as error:
    raise UserError(
      f"{path} is not a video, or is truncated ({size} bytes: "
      f"{error.strerror}); fetch it again"
    ) from error


def _video_stream(container, path):
  for stream in container.streams.video:
    if not stream.disposition & Disposition.attached_pic:  # cover art
      return stream
  kinds = ", ".join(s.type for s in container.streams) or "none"
  raise UserError(
    f"{path} has no video stream (streams: {kinds}); drop the record, or fetch "
    "the file again if it should have one"
  )


def _count_frames(container, stream, path) -> tuple[int, Fraction | None]:
  """Pictures, and the seconds they span where packets had to be counted."""
  if stream.frames:
    # Pictures that an edit list cuts off (clips made without encoding anew)
    # are in an MP4 header's count, but decoding does not give them.
    if "mp4" in container.format.name.split(","):
      shown = sum(not entry.is_discard for entry in stream.index_entries)
      return shown or stream.frames, None
    return stream.frames, None
  frames, times = 0, []
  try:
    for packet in container.demux(stream):
      if packet.size and not packet.is_discard:
        frames += 1
        if packet.pts is not None:
          times = [min([packet.pts, *times]), max([packet.pts, *times])]
  except av.error.FFmpegError as error:
    raise UserError(
      f"{path}: cannot read its packets ({error.strerror}); fetch it again"
    ) from error
  if frames < 2 or not times or times[0] == times[1]:
    return frames, None
  between = (times[1] - times[0]) * stream.time_base
  return frames, between * frames / (frames - 1)  # the last picture lasts too
