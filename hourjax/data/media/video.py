"""Frames of video files: chosen ones, upright, as squares."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Int, UInt8

from hourjax.data.media import frame_folder
from hourjax.data.media.images import resize
from hourjax.data.media.video_file import HEALED, Picture, Pictures, open_video
from hourjax.data.media.video_probe import VideoInfo, probe
from hourjax.errors import UserError

# Of the frames wanted of a video, the share that must be read. Below it the
# file is refused; above it the nearest pictures stand in for what is damaged.
MIN_SHARE = 0.95
# No hidden pictures follow each other for so long: the rest is damage.
_HIDDEN = 32


@dataclasses.dataclass
class Reading:
  """How much of what was wanted of a video was read; filled while decoding.

  Attributes:
    wanted: frames that were asked for.
    read: of them, those that could be decoded without damage.
  """

  wanted: int = 0
  read: int = 0

  @property
  def share(self) -> float:
    """From 0 to 1, cut to four digits: 1 only if all were read."""
    return math.floor(1e4 * self.read / self.wanted) / 1e4 if self.wanted else 1


def decode_frames(
  path: str | os.PathLike,
  indices: Sequence[int] | Int[np.ndarray, "F"],
  size: int,
  *,
  info: VideoInfo | None = None,
  batch: int = 64,
  threads: int = 0,
  min_share: float = MIN_SHARE,
  reading: Reading | None = None,
) -> Iterator[UInt8[np.ndarray, "n size size 3"]]:
  """Decodes frames in order, upright, resized to a square like any image.

  For a frame that is damaged, the nearest picture that is not stands in; for
  one that is meant to be unseen, the picture before it.

  Args:
    path: of the video.
    indices: frames to take, ascending; one may occur several times.
    size: side of the result, in pixels.
    info: what `probe` says; asked if not given.
    batch: frames yielded at a time; the memory held is about theirs.
    threads: of the decoder; 0 is one a core.
    min_share: of the frames, that must be read; from 0 to 1.
    reading: where to note how many were read; final when all is yielded.

  Yields:
    RGB frames: `batch` of them, in the end what is left.

  Raises:
    UserError: cannot be decoded, or too few of the frames can; that may come
      after all of them were yielded.
    ValueError: indices that do not ascend, or are negative.
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
  _check_share(path, reading, min_share, info, wanted)  # what is known already
  reading.read = 0
  choice = _Choice(path, wanted.tolist(), size, info)
  with open_video(path) as container:
    pictures = Pictures(
      container, container.streams[info.stream], threads=threads
    )
    ready: list[np.ndarray] = []
    for frame in choice.frames(pictures):
      ready.append(frame)
      if len(ready) == batch:
        yield np.stack(ready)
        ready = []
  reading.read = choice.read
  _check_share(path, reading, min_share, info, wanted, pictures.count)
  if ready:
    yield np.stack(ready)


def check_whole(
  path: str | os.PathLike, info: VideoInfo, min_share: float = MIN_SHARE
) -> None:
  """Finds without decoding that too much of a file is missing.

  Raises:
    UserError: with the share that is there.
  """
  numbers = np.arange(info.frames)
  reading = Reading(len(numbers), int(info.readable(numbers).sum()))
  _check_share(path, reading, min_share, info, numbers)


def frame_at(
  path: str | os.PathLike, second: float, size: int
) -> UInt8[np.ndarray, "size size 3"]:
  """What a video shows at a moment, as `decode_frames` gives it.

  Decodes from the key frame before: an hour's end costs no more than its start.
  Only where the file's times jump is it decoded from the start.

  Args:
    path: of the video.
    second: since its first frame; later ones show the last frame.
    size: side of the result, in pixels.

  Raises:
    UserError: cannot be decoded.
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
      stream = container.streams[info.stream]
      start, base = stream.start_time or 0, stream.time_base
      if back < math.inf:
        earlier = max(0, second - back)
        with contextlib.suppress(av.error.FFmpegError):
          container.seek(start + int(earlier / base), stream=stream)
      first, best = None, None
      for picture in _frames(container, info):
        ticks = start if picture.time is None else picture.time
        time = float((ticks - start) * base)
        first = time if first is None else first
        if picture.clean or best is None:
          best = picture
        if time > second - half and best.clean:
          break
      if best is not None and (first < second + half or back == math.inf):
        return resize(_Upright().rgb(best.raw), size)
  raise UserError(f"{path}: no frame can be decoded; fetch it again")


def _frames(container, info: VideoInfo) -> Iterator[Picture]:
  """The pictures from where a file was sought to."""
  yield from Pictures(container, container.streams[info.stream])


class _Choice:
  """Picks the wanted ones of a stream of pictures, and what stands in."""

  def __init__(self, path, wanted: list[int], size: int, info: VideoInfo):
    self.read = 0
    self._path = path
    self._wanted, self._next = wanted, 0
    self._size, self._info = size, info
    self._upright = _Upright()
    self._before: Picture | None = None  # the last one without damage
    # Wanted but not read so far: number, the damaged picture, and whether it is
    # damage that hides it.
    self._waiting: list[tuple[int, np.ndarray | None, bool]] = []

  def frames(self, pictures: Pictures) -> Iterator[np.ndarray]:
    """Yields a frame for each wanted one, in order.

    Decodes no further than it needs to.
    """
    last, holes, doubtful = -1, list(self._info.lost), 0
    for picture in pictures:
      number = self._number(picture.number)
      torn = picture.torn or number - last > _HIDDEN
      last = max(last, number)
      # Pictures after a hole refer to what was in it, up to a key frame.
      if holes and number >= holes[0][0]:
        holes.pop(0)
        doubtful = HEALED
      doubtful = 0 if picture.raw.key_frame else max(0, doubtful - 1)
      if doubtful:
        picture = dataclasses.replace(picture, clean=False)
      while self._due() < number:
        self._wait(None, torn)
      if picture.clean:
        yield from self._stand_in(number, picture)
        while self._due() == number:
          self._next += 1
          self.read += 1
          yield self._pixels(picture)
        self._before = picture
      else:
        while self._due() == number:
          self._wait(self._pixels(picture), True)
        if self._waiting and number - self._waiting[0][0] > HEALED:
          yield from self._stand_in(number, None)
      if self._next == len(self._wanted) and not self._waiting:
        return
    end = self._number(pictures.end)
    torn = pictures.torn or end - last > _HIDDEN
    while self._next < len(self._wanted):
      self._wait(None, torn or self._due() >= end)
    yield from self._stand_in(end, None)

  def _due(self) -> float:
    """The next wanted number."""
    if self._next == len(self._wanted):
      return math.inf
    return self._wanted[self._next]

  def _number(self, number: int) -> int:
    """A picture's number, counting those that are lost."""
    for first, count in self._info.lost:
      if number >= first:
        number += count
    return number

  def _wait(self, own: np.ndarray | None, damage: bool) -> None:
    number = self._wanted[self._next]
    damage |= not self._info.readable(np.array([number]))[0]
    self._waiting.append((number, own, damage))
    self._next += 1

  def _stand_in(
    self, after_number: int, after: Picture | None
  ) -> Iterator[np.ndarray]:
    """Yields a frame for each that waits."""
    if not self._waiting:
      return
    before = self._before
    pixels = {"before": None, "after": None}
    for number, own, damage in self._waiting:
      # How far off each is; one that is damaged itself is better than one of
      # another scene.
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
      if nearest == "own":
        yield own
        continue
      if pixels[nearest] is None:
        picture = before if nearest == "before" else after
        pixels[nearest] = self._pixels(picture)
      yield pixels[nearest]
    self._waiting = []

  def _pixels(self, picture: Picture) -> np.ndarray:
    return resize(self._upright.rgb(picture.raw), self._size)


class _Upright:
  """Converts decoded pictures to RGB, turned and mirrored as they are shown."""

  def __init__(self):
    # One converter for all frames: setting it up costs more than its work.
    self._converter = VideoReformatter()

  def rgb(self, raw: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    pixels = self._converter.reformat(raw, format="rgb24").to_ndarray()
    return _turned(pixels, _display_matrix(raw))


def _display_matrix(raw: av.VideoFrame) -> Sequence[int]:
  """The matrix (a, b, c, d) that takes a picture (x, y) to where it is shown.

  x' = a x + c y, y' = b x + d y, up to a shift; y points down.
  """
  try:
    data = raw.side_data.get("DISPLAYMATRIX")
  except ValueError:  # PyAV does not know the kind of other data of the frame
    turns = round(raw.rotation / 90) % 4  # counter-clockwise
    return [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][turns]
  if data is None:
    return (1, 0, 0, 1)
  a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
  return (a, b, c, d)


def _turned(pixels: np.ndarray, matrix: Sequence[int]) -> np.ndarray:
  """Pixels as a display matrix shows them, to the nearest right angle."""
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
  path,
  reading: Reading,
  min_share: float,
  info: VideoInfo,
  wanted: np.ndarray,
  decoded: int | None = None,
) -> None:
  """Refuses a video of which too little was read, or can be.

  Raises:
    UserError: with the share.
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
    problem = "damaged pictures"
  raise UserError(
    f"{path}: {problem}; {reading.share:.1%} of {reading.wanted} frames can be"
    f" read, at least {min_share:.0%} must be; the file is truncated or"
    " damaged, fetch it again, or extract it with a lower --min_share",
    kind="damaged",
  )
