"""Decoding of chosen frames of a video file, upright and resized."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import SideData
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8

from hourjax.data.media import frame_folder
from hourjax.data.media.images import resize
from hourjax.data.media.video_file import (
  HEALED,
  DecodedFrame,
  FrameDecoder,
  open_video,
)
from hourjax.data.media.video_probe import VideoInfo, probe
from hourjax.errors import UserError

# Of the frames wanted of a video, the share that must be read. Below it the
# file is refused; above it the nearest frames replace the damaged ones.
MIN_SHARE = 0.95
# Hidden frames never follow each other for so long: a longer gap is damage.
_HIDDEN = 32


@dataclasses.dataclass
class Reading:
  """Counts how many wanted frames of a video were read, while decoding.

  Attributes:
    wanted: number of frames that were asked for.
    read: how many of them could be decoded without damage.
  """

  wanted: int = 0
  read: int = 0

  @property
  def share(self) -> float:
    """Returns read / wanted, cut to four digits: 1 only if all were read."""
    return math.floor(1e4 * self.read / self.wanted) / 1e4 if self.wanted else 1


def decode_frames(
  path: str | os.PathLike,
  indices: Sequence[int] | Int[np.ndarray, "F"],
  size: int | tuple[int, int],
  *,
  info: VideoInfo | None = None,
  batch: int = 64,
  threads: int = 0,
  min_share: float = MIN_SHARE,
  reading: Reading | None = None,
) -> Iterator[UInt8[np.ndarray, "n height width 3"]]:
  """Decodes frames in order, upright, resized to a square like any image.

  A damaged frame is replaced by the nearest frame without damage, and a hidden
  frame by the frame before it.

  Args:
    path: of the video.
    indices: frames to decode, ascending; one may occur several times.
    size: side of the square, or width and height, in pixels.
    info: result of `probe`, which is called if it is not given.
    batch: frames yielded at a time; the memory in use is about theirs.
    threads: of the decoder; 0 means one for each core.
    min_share: share of the frames that must be read, from 0 to 1.
    reading: receives how many frames were read; final after the last batch.

  Yields:
    uint8 RGB frames, `batch` at a time; the last batch may be smaller.

  Raises:
    UserError: the video cannot be decoded, or too few of the frames can; this
      may be raised after all of them were yielded.
    ValueError: indices do not ascend, or are negative.
  """
  wanted = np.asarray(indices, np.int64)
  if len(wanted) == 0:
    return
  if wanted[0] < 0 or (np.diff(wanted) < 0).any():
    raise ValueError("frame indices must be >= 0 and ascend")
  reading = reading if reading is not None else Reading()
  reading.wanted = len(wanted)
  if os.path.isdir(path):
    failed: list[UserError] = []
    yield from frame_folder.decode_frames(path, wanted, size, batch, failed)
    reading.read = len(wanted) - len(failed)
    if reading.share < min_share:
      raise UserError(
        f"{path}: {reading.share:.1%} of {reading.wanted} frames can be read,"
        f" at least {min_share:.0%} must be ({failed[0]})",
        kind="damaged",
      )
    return
  info = info or probe(path)
  reading.read = int(info.readable(wanted).sum())
  _check_share(path, reading, min_share, info, wanted)  # before decoding
  reading.read = 0
  choice = _Choice(path, wanted.tolist(), size, info)
  with open_video(path) as container:
    decoder = FrameDecoder(container, _stream(container, info), threads=threads)
    ready: list[np.ndarray] = []
    for frame in choice.frames(decoder):
      ready.append(frame)
      if len(ready) == batch:
        yield np.stack(ready)
        ready = []
  reading.read = choice.read
  _check_share(path, reading, min_share, info, wanted, decoder.count)
  if ready:
    yield np.stack(ready)


def check_whole(
  path: str | os.PathLike, info: VideoInfo, min_share: float = MIN_SHARE
) -> None:
  """Refuses a file of which too much is missing, without decoding it.

  Args:
    path: of the video, for the message.
    info: result of `probe`.
    min_share: share of the frames that must be in the file, from 0 to 1.

  Raises:
    UserError: with the share of frames that the file holds.
  """
  numbers = np.arange(info.frames)
  reading = Reading(len(numbers), int(info.readable(numbers).sum()))
  _check_share(path, reading, min_share, info, numbers)


def frame_at(
  path: str | os.PathLike, second: float, size: int
) -> UInt8[np.ndarray, "size size 3"]:
  """Decodes the frame at one moment, with the values of `decode_frames`.

  Decoding starts from the key frame before that moment, so the end of an hour
  costs no more than its start. A file whose times jump is decoded from its
  first frame.

  Args:
    path: of the video.
    second: since the first frame; beyond the end, the last frame is returned.
    size: side of the result, in pixels.

  Raises:
    UserError: the frame cannot be decoded.
  """
  if os.path.isdir(path):
    return frame_folder.frame_at(path, second, size)
  info = probe(path)
  half = 0.5 / float(info.fps)
  if info.seconds is not None:
    number = int(np.searchsorted(info.seconds, second - half, "right"))
    number = min(number, len(info.seconds) - 1)
    chunks = decode_frames(path, [number], size, info=info, min_share=0)
    return next(chunks)[0]
  # Some formats have no index and are sought in too far, or not at all.
  for back in (0, 10, 60, math.inf):
    with open_video(path) as container:
      stream = _stream(container, info)
      start, base = stream.start_time or 0, stream.time_base or Fraction(1)
      if back < math.inf:
        earlier = max(0, second - back)
        with contextlib.suppress(av.error.FFmpegError):
          container.seek(start + int(earlier / base), stream=stream)
      first: float = math.inf  # seconds of the first frame that came
      best: DecodedFrame | None = None
      for frame in FrameDecoder(container, stream):
        ticks = start if frame.time is None else frame.time
        time = float((ticks - start) * base)
        if best is None:
          first = time
        if best is None or frame.clean:
          best = frame
        if time > second - half and best.clean:
          break
      if best is not None and (first < second + half or back == math.inf):
        return resize(_Upright().rgb(best.raw), size)
  raise UserError(f"{path}: no frame can be decoded; fetch it again")


def display_size(path: str | os.PathLike, info: VideoInfo) -> tuple[int, int]:
  """Returns width and height of a video's frames as displayed, in pixels.

  Args:
    path: of the video.
    info: result of `probe`.

  Raises:
    UserError: no frame can be decoded.
  """
  if os.path.isdir(path):
    return info.width, info.height
  with open_video(path) as container:
    for frame in FrameDecoder(container, _stream(container, info)):
      height, width, _ = _Upright().rgb(frame.raw).shape
      return width, height
  raise UserError(f"{path}: no frame can be decoded; fetch it again")


def _stream(
  container: av.container.InputContainer, info: VideoInfo
) -> av.VideoStream:
  """Returns the main video stream of an opened file."""
  stream = container.streams[info.stream]
  assert isinstance(stream, av.VideoStream)  # `probe` chose among these
  return stream


class _Choice:
  """Picks the wanted frames of a stream, and replaces those not readable."""

  def __init__(
    self,
    path: str | os.PathLike,
    wanted: list[int],
    size: int | tuple[int, int],
    info: VideoInfo,
  ) -> None:
    self.read = 0
    self._path = path
    self._wanted, self._next = wanted, 0
    self._size, self._info = size, info
    self._upright = _Upright()
    self._before: DecodedFrame | None = None  # the last one without damage
    # Wanted but not read so far: number, the damaged frame if there is one, and
    # whether it is missing for damage.
    self._waiting: list[tuple[int, np.ndarray | None, bool]] = []

  def frames(self, decoder: FrameDecoder) -> Iterator[np.ndarray]:
    """Yields a frame for each wanted one, in order.

    Decodes no further than the last wanted frame needs.
    """
    last, holes, doubtful = -1, list(self._info.lost), 0
    for frame in decoder:
      number = self._number(frame.number)
      torn = frame.torn or number - last > _HIDDEN
      last = max(last, number)
      # Frames after a hole refer to what was in it, up to a key frame.
      if holes and number >= holes[0][0]:
        holes.pop(0)
        doubtful = HEALED
      doubtful = 0 if frame.raw.key_frame else max(0, doubtful - 1)
      if doubtful:
        frame = dataclasses.replace(frame, clean=False)
      while self._due() < number:
        self._wait(None, torn)
      if frame.clean:
        yield from self._stand_in(number, frame)
        while self._due() == number:
          self._next += 1
          self.read += 1
          yield self._pixels(frame)
        self._before = frame
      else:
        while self._due() == number:
          self._wait(self._pixels(frame), True)
        if self._waiting and number - self._waiting[0][0] > HEALED:
          yield from self._stand_in(number, None)
      if self._next == len(self._wanted) and not self._waiting:
        return
    end = self._number(decoder.end)
    torn = decoder.torn or end - last > _HIDDEN
    while self._next < len(self._wanted):
      self._wait(None, torn or self._due() >= end)
    yield from self._stand_in(end, None)

  def _due(self) -> float:
    """Returns the next wanted number, infinity if there is none."""
    if self._next == len(self._wanted):
      return math.inf
    return self._wanted[self._next]

  def _number(self, number: int) -> int:
    """Returns a frame's number with the lost frames before it counted."""
    for first, count in self._info.lost:
      if number >= first:
        number += count
    return number

  def _wait(self, own: np.ndarray | None, damage: bool) -> None:
    """Puts the next wanted frame among those that need a replacement."""
    number = self._wanted[self._next]
    damage |= not self._info.readable(np.array([number]))[0]
    self._waiting.append((number, own, damage))
    self._next += 1

  def _stand_in(
    self, after_number: int, after: DecodedFrame | None
  ) -> Iterator[np.ndarray]:
    """Yields the replacement of each wanted frame that could not be read."""
    if not self._waiting:
      return
    before = self._before
    pixels: dict[str, np.ndarray] = {}
    for number, own, damage in self._waiting:
      # Distances in frames. The damaged frame itself is better than a frame of
      # another scene, so it counts as HEALED frames away.
      far = {"own": HEALED if own is not None else math.inf}
      far["before"] = math.inf if before is None else 0
      far["after"] = math.inf if after is None else after_number - number
      if before is not None and damage:
        far["before"] = number - self._number(before.number)
      nearest = min(("before", "after", "own"), key=far.__getitem__)
      if far[nearest] == math.inf:
        raise UserError(
          f"{self._path}: no frame of the {self._info.frames} that it should"
          " have can be decoded; the file is damaged, fetch it again"
        )
      self.read += not damage
      frame = before if nearest == "before" else after
      if nearest == "own" and own is not None:
        yield own
      elif frame is not None:
        if nearest not in pixels:
          pixels[nearest] = self._pixels(frame)
        yield pixels[nearest]
    self._waiting = []

  def _pixels(self, frame: DecodedFrame) -> np.ndarray:
    return resize(self._upright.rgb(frame.raw), self._size)


class _Upright:
  """Converts decoded frames to RGB, turned and mirrored for display."""

  def __init__(self) -> None:
    # One converter for all frames: setting it up costs more than its work.
    self._converter = VideoReformatter()

  def rgb(self, raw: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the upright RGB pixels of a decoded frame."""
    pixels = self._converter.reformat(raw, format="rgb24").to_ndarray()
    return _turned(pixels, _display_matrix(raw))


def _display_matrix(raw: av.VideoFrame) -> Sequence[int]:
  """Returns the matrix (a, b, c, d) from pixels (x, y) to display positions.

  x' = a x + c y, y' = b x + d y, up to a shift; y points down.
  """
  try:
    data = raw.side_data.get("DISPLAYMATRIX")
  except ValueError:  # PyAV does not know the kind of other data of the frame
    turns = round(raw.rotation / 90) % 4  # counter-clockwise
    return [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][turns]
  if not isinstance(data, SideData):
    return (1, 0, 0, 1)
  a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
  return (a, b, c, d)


def _turned(pixels: np.ndarray, matrix: Sequence[int]) -> np.ndarray:
  """Turns pixels by a display matrix, to the nearest right angle."""
  a, b, c, d = matrix
  if abs(b) + abs(c) > abs(a) + abs(d):
    pixels = pixels.swapaxes(0, 1)
    across, down = c, b
  else:
    across, down = a, d
  if across < 0:
    pixels = pixels[:, ::-1]
  if down < 0:
    pixels = pixels[::-1]
  return np.ascontiguousarray(pixels)


def _check_share(
  path: str | os.PathLike,
  reading: Reading,
  min_share: float,
  info: VideoInfo,
  wanted: np.ndarray,
  decoded: int | None = None,
) -> None:
  """Refuses a video of which too few frames were read, or can be.

  Raises:
    UserError: with the share of frames read.
  """
  if reading.share >= min_share:
    return
  if decoded is None:
    decoded = info.frames - sum(count for _, count in info.lost)
  if decoded <= wanted[-1]:
    problem = (
      f"{decoded} frames could be decoded but frame {wanted[-1]} is needed, its"
      f" header counts {info.frames}"
    )
  else:
    problem = "damaged frames"
  raise UserError(
    f"{path}: {problem}; {reading.share:.1%} of {reading.wanted} frames can be"
    f" read, at least {min_share:.0%} must be; the file is truncated or"
    " damaged, fetch it again, or extract it with a lower --min_share",
    kind="damaged",
  )
