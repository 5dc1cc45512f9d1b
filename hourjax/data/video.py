"""Video: which frames are taken, and decoding them.

The frame rules are the official ones, number by number; index arrays ascend.
"""

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
from jaxtyping import Int, Int32, UInt8

from hourjax.data.images import resize
from hourjax.errors import UserError

MIN_FRAMES = 128
_TOLERANCE = 1.1  # between a header's frame rate and the packets' times

Rate = Fraction | float | int  # frames a second


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


def extraction_frames(
  total_frames: int, fps: Rate
) -> tuple[Int32[np.ndarray, "F"], float]:
  """Frames whose features are stored, about one a second, at least 128.

    3000 frames, 30 fps: 100 s -> 128 frames 0, 23, 47, ..., 2999
    100 frames: fewer than 128 -> all of them

  A video slower than one frame a second gives every frame once.

  Returns:
    Frame indices, and the duration in seconds rounded to 1/100 as stored.

  Raises:
    UserError: no frames, or no positive rate.
  """
  _check_rate(total_frames, fps)
  duration = total_frames / float(fps)
  if total_frames < MIN_FRAMES:
    count = total_frames
  else:
    count = min(max(int(duration), MIN_FRAMES), total_frames)
  return _linspace(total_frames, count), round(duration, 2)


def stored_feature_frames(
  stored: int, duration: float | int
) -> Int32[np.ndarray, "F"]:
  """Rows of the stored features that training uses: one a second.

    128 rows, 3.33 s -> 0, 63, 127

  Args:
    stored: rows there are.
    duration: of the video, in seconds, as stored.

  Returns:
    min(stored, int(duration)) ascending indices: none under one second.
  """
  return _linspace(stored, stored_feature_count(stored, duration))


def stored_feature_count(stored: int, duration: float | int) -> int:
  """How many frames `stored_feature_frames` gives."""
  return min(stored, int(duration))


def raw_video_frames(
  total_frames: int,
  avg_fps: Rate,
  *,
  video_fps: Rate = 1,
  min_frames: int = MIN_FRAMES,
  frames_upbound: int = -1,
  force_sample: bool = True,
) -> Int32[np.ndarray, "F"]:
  """Frames of a video that is read without stored features.

  Every round(avg_fps / video_fps)-th frame; where these are fewer than
  `min_frames`, that many (or all) spread uniformly; where `frames_upbound` is
  positive and they are more, or `force_sample` is set, exactly that many.

    1000 frames, 2.5 fps -> step round(2.5) = 2 -> 500 frames

  Raises:
    UserError: no frames, or no positive rate.
  """
  _check_rate(total_frames, avg_fps)
  _check_rate(total_frames, video_fps)
  # Videos of 0.5 fps or less round to 0, where the official code fails.
  step = max(1, round(float(avg_fps) / video_fps))
  indices = np.arange(0, total_frames, step, dtype=np.int32)
  if len(indices) < min_frames:
    indices = _linspace(total_frames, min(total_frames, min_frames))
  if frames_upbound > 0 and (force_sample or len(indices) > frames_upbound):
    indices = _linspace(total_frames, frames_upbound)
  return indices


def time_instruction(duration: float | int, frames: int) -> str:
  """What the model is told about a video (SPEC section 2)."""
  return (
    f"The video lasts for {duration:.2f} seconds, and {frames} frames are "
    "uniformly sampled from it. Please answer the following questions "
    "related to this video."
  )


def probe(path: str | os.PathLike) -> VideoInfo:
  """Reads the header, and every packet where the header has no frame count.

  Raises:
    UserError: missing, empty, not a video, without pictures or rate.
  """
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


def _check_rate(total_frames: int, fps: Rate) -> None:
  if total_frames < 1 or not fps > 0:
    raise UserError(
      f"a video of {total_frames} frames at {fps} frames a second; both must "
      "be positive, check the file"
    )


def _linspace(total: int, count: int) -> Int32[np.ndarray, "count"]:
  """`count` indices from 0 to total - 1, cut to integers (not rounded)."""
  return np.linspace(0, total - 1, count, dtype=np.int64).astype(np.int32)
