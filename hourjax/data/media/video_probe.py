"""Properties of a video file: main stream, frame count, duration, lost frames.

Only the first frames of files that start in mid-stream are decoded. MP4 and AVI
have an index of their packets; other files are read through once.
"""

import array
import contextlib
import dataclasses
import functools
import math
import os
import re
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

from hourjax.data.media import frame_folder, video_file
from hourjax.errors import UserError

_TOLERANCE = 1.1  # between a header's frame rate and the packets' times
_STILL = 10  # seconds; a frame that lasts longer may be a jump of the clock
# Formats whose clock may jump where a recording was interrupted or joined.
_LIVE = frozenset({"mpegts", "mpegtsraw", "mpeg", "flv", "live_flv", "kux"})
# Formats whose header states the duration that the complete file had.
_PROMISING = frozenset({"matroska,webm", "flv", "asf", "avi", "mxf"})
_HEAD = 4000  # packets among which the first key frame is searched
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


@dataclasses.dataclass(frozen=True)
class VideoInfo:
  """Describes a video file as its header, index and packets state it.

  Attributes:
    frames: number of frames that it displays, lost ones included.
    fps: average frames a second.
    duration: frames / fps, in seconds.
    width: of a decoded frame before rotation, in pixels.
    height: of a decoded frame before rotation, in pixels.
    stream: index of the main video among the file's streams.
    lost: ascending pairs (number, count): `count` frames from this number on
      are not in the file, although its times or its header imply them.
    seconds: display time of each frame, given only where the file's own times
      jump.
  """

  frames: int
  fps: Fraction
  duration: float
  width: int
  height: int
  stream: int = 0
  lost: tuple[tuple[int, int], ...] = ()
  seconds: np.ndarray | None = dataclasses.field(
    default=None, compare=False, repr=False
  )

  def readable(self, numbers: np.ndarray) -> np.ndarray:
    """Returns for each frame number whether the file holds that frame."""
    there = numbers < self.frames
    for first, count in self.lost:
      there &= (numbers < first) | (numbers >= first + count)
    return there


def probe(path: str | os.PathLike) -> VideoInfo:
  """Reads the properties of a video file, or of a folder of frames.

  They come from the header or the index, and from every packet of the file
  where these do not suffice. For folders see `frame_folder`.

  Raises:
    UserError: the file is missing, empty, not a video, or has no frames or no
      frame rate.
  """
  if os.path.isdir(path):
    return VideoInfo(*frame_folder.probe(path))
  stamp = None
  with contextlib.suppress(OSError, ValueError):
    about = os.stat(path)
    stamp = (about.st_mtime_ns, about.st_size, about.st_ino)
  return _probe(os.fspath(path), stamp)


@functools.lru_cache(256)  # sampling and decoding probe the same file again
def _probe(path: str, stamp: tuple[int, ...] | None) -> VideoInfo:
  with video_file.open_video(path) as container:
    track = _main_track(container, path)
    info = _describe(container, track, path)
    doubtful = track.doubtful_start(container)
  if doubtful:
    missing = _missing_ahead(path, info.stream)
    info = _without_ahead(info, missing)
  return info


@dataclasses.dataclass
class _Track:
  """Holds the frames of a stream, in the order of the file.

  Attributes:
    stream: the stream.
    pts: presentation time of each frame in seconds, NaN where there is none.
    dts: decoding time of each frame likewise.
    key: whether each frame is a key frame.
    position: of each frame in the file, in bytes.
    before: bytes of all packets before each frame, of any stream.
    sounds: seconds at which packets of other streams begin, ascending.
    indexed: whether the frames come from an index, which has no pts.
    cut: how many of the last frames lie behind the file's end.
    reached: seconds at which the last packet of any stream ends.
  """

  stream: av.VideoStream
  pts: np.ndarray
  dts: np.ndarray
  key: np.ndarray
  position: np.ndarray
  before: np.ndarray
  sounds: np.ndarray
  indexed: bool = False
  cut: int = 0
  reached: float = math.nan

  def __len__(self) -> int:
    return len(self.dts)

  def span(self) -> float:
    """Returns the seconds from the first frame to the last by their times."""
    times = self.times()
    times = times[~np.isnan(times)]
    return float(times.max() - times.min()) if len(times) else 0.0

  def times(self) -> np.ndarray:
    """Returns the display time of each frame in seconds, NaN if unknown."""
    with np.errstate(invalid="ignore"):  # a clock that ran over in between
      early = self.dts - self.pts > video_file.RESET
    return np.where(np.isnan(self.pts) | early, self.dts, self.pts)

  def segments(self) -> np.ndarray:
    """Numbers the recordings that were joined, by the resets of the clock."""
    known = ~np.isnan(self.dts)
    if not known.any():
      return np.zeros(len(self), int)
    places = np.maximum.accumulate(np.where(known, np.arange(len(self)), 0))
    clock = self.dts[places]
    back = np.diff(clock, prepend=clock[0]) < -video_file.RESET
    return np.cumsum(back)

  def doubtful_start(self, container: InputContainer) -> bool:
    """Returns whether the first frames may refer to frames before the file."""
    if not len(self):
      return False
    if not self.indexed:
      keys = np.flatnonzero(self.key)
      if not len(keys) or keys[0] > 0:
        return True
      with np.errstate(invalid="ignore"):
        early = self.times()[:_HEAD] < self.times()[0]
      return bool((early & (self.segments()[:_HEAD] == 0)).any())
    first = None
    packets = video_file.packets(container, self.stream)
    for _, packet in zip(range(_HEAD), packets):
      if packet is None or packet.pts is None:
        return False
      if first is None:
        if not packet.is_keyframe:
          return True
        first = packet.pts
      elif packet.pts < first:
        return True
      if packet.dts is None or packet.dts >= first:
        return False
    return False


def _main_track(container: InputContainer, path: str | os.PathLike) -> _Track:
  """Chooses the main stream: long, large, many frames, marked as default."""
  streams = video_file.main_streams(container, path)
  indexed = [_indexed(container, stream) for stream in streams]
  # An empty index counts as none.
  tracks = [track for track in indexed if track]
  if len(tracks) < len(streams):
    tracks = _demuxed(container, streams)
  longest = max(track.span() for track in tracks)
  candidates = [track for track in tracks if track.span() >= longest / 2]
  playable = [track for track in candidates if track.stream.codec_context]
  if not playable:
    video_file.refuse_codec(path)

  def weight(track: _Track) -> int:
    """Returns the number of pixels, doubled for the default stream."""
    stream = track.stream
    marked = bool(stream.disposition & Disposition.default)
    return len(track) * stream.width * stream.height * (1 + marked)

  return max(playable, key=weight)


def _indexed(
  container: InputContainer, stream: av.VideoStream
) -> _Track | None:
  """Reads a track from the container's index, None if that is incomplete."""
  mp4 = "mp4" in container.format.name.split(",")
  entries = stream.index_entries
  if not (mp4 or container.format.name == "avi") or not len(entries):
    return None
  rows = np.array(
    [
      (entry.timestamp, entry.pos, entry.is_keyframe)
      for entry in entries
      if not entry.is_discard
    ],
    np.float64,
  ).reshape(-1, 3)
  last = entries[len(entries) - 1]
  if not mp4 and last.timestamp + 2 < stream.frames:
    return None  # the index of a file that was cut
  cut = 0
  if last.pos + last.size > container.size:
    ends = [entry.pos + entry.size for entry in entries if not entry.is_discard]
    cut = int((np.array(ends) > container.size).sum())
  nothing = np.full(len(rows), math.nan)
  base = float(stream.time_base or 0)
  key = rows[:, 2].astype(bool)
  return _Track(
    stream, nothing, rows[:, 0] * base, key, rows[:, 1], nothing,
    np.zeros(0), indexed=True, cut=cut,
  )  # fmt: skip


def _demuxed(
  container: InputContainer, streams: list[av.VideoStream]
) -> list[_Track]:
  """Reads tracks from all packets of the file."""
  rows = {stream.index: array.array("d") for stream in streams}
  codecs = {
    s.index: s.codec_context.name if s.codec_context else None for s in streams
  }
  bases = {s.index: float(s.time_base or 0) for s in container.streams}
  ends: dict[int, float] = {}
  content, nan, sounds = 0, math.nan, array.array("d")
  for packet in video_file.packets(container):
    if packet is None:
      continue
    index, pts, dts = packet.stream_index, packet.pts, packet.dts
    base = bases[index]
    if pts is not None:
      end = (pts + (packet.duration or 0)) * base
      if end > ends.get(index, -math.inf):
        ends[index] = end
      if index not in rows:
        sounds.append(pts * base)
    if index in rows and video_file.is_visible(packet, codecs[index]):
      rows[index].extend(
        (
          nan if pts is None else pts * base,
          nan if dts is None else dts * base,
          packet.is_keyframe,
          nan if packet.pos is None else packet.pos,
          content,
        )
      )
    content += packet.size
  tracks, heard = [], np.sort(np.frombuffer(sounds))
  for stream in streams:
    columns = np.frombuffer(rows[stream.index]).reshape(-1, 5).T
    pts, dts, key, position, before = columns
    key, reached = key.astype(bool), max(ends.values(), default=nan)
    track = _Track(stream, pts, dts, key, position, before, heard)
    tracks.append(dataclasses.replace(track, reached=reached))
  return tracks


def _describe(
  container: InputContainer,
  track: _Track,
  path: str | os.PathLike,
) -> VideoInfo:
  """Checks the main track and computes frame count, rate and lost frames."""
  stream, count = track.stream, len(track)
  if not count:
    raise UserError(f"{path} has a video stream of 0 frames; drop the record")
  rate = stream.average_rate or stream.guessed_rate
  width, height = stream.width, stream.height
  if not rate or not width or not height:
    raise UserError(
      f"{path}: frame rate {rate}, size {width} x {height}; the header is "
      "damaged, encode the file again"
    )
  if width * height > video_file.MAX_PIXELS:
    raise UserError(
      f"{path}: frames of {width} x {height} pixels, at most"
      f" {video_file.MAX_PIXELS:,} are read; the header is damaged, or encode"
      " the file smaller"
    )
  timeline = _timeline(container, track)
  lost = list(timeline.lost)
  if track.cut:
    lost.append((count - track.cut, track.cut))
  frames = count + sum(missing for _, missing in timeline.lost)
  # A header without a count (Matroska) may give the rate of the first second
  # only; where the rate varies, it is computed from the times of the packets.
  span = timeline.span
  if span and not 1 / _TOLERANCE < frames / rate / span < _TOLERANCE:
    rate = Fraction(frames / span).limit_denominator(10**6)
  return VideoInfo(
    frames,
    Fraction(rate),
    float(frames / Fraction(rate)),
    width,
    height,
    stream.index,
    tuple(lost),
    timeline.seconds,
  )


@dataclasses.dataclass(frozen=True)
class _Timeline:
  """Holds when frames are displayed, with jumps of the clock corrected.

  Attributes:
    span: seconds in all, 0 where the times do not give them.
    lost: as in `VideoInfo`.
    seconds: as in `VideoInfo`.
  """

  span: float
  lost: tuple[tuple[int, int], ...] = ()
  seconds: np.ndarray | None = None


def _timeline(container: InputContainer, track: _Track) -> _Timeline:
  """Adds up the steps between frames; a jump of the clock counts as one step.

  times  0.0 0.1 0.2 36015.0 36015.1     recordings joined
  steps    0.1 0.1  [0.1]   0.1          0.4 s, and the last frame lasts too
  """
  times, segments = track.times(), track.segments()
  if len(times) < 2 or np.isnan(times).any():
    return _Timeline(0.0)
  order = np.lexsort((times, segments))
  times, segments = times[order], segments[order]
  steps = np.diff(times)
  jumps = np.diff(segments) > 0
  usual = steps[~jumps & (steps > 0)]
  if not len(usual):
    return _Timeline(0.0)
  usual = float(np.median(usual))
  odd = jumps | _implausible(container, track, times, steps, jumps, usual)
  steps = np.where(odd, usual, steps)
  between = float(steps.sum())
  span = between * len(times) / (len(times) - 1)  # the last one lasts too
  if odd.any():
    return _Timeline(span, (), np.concatenate([[0], np.cumsum(steps)]))
  lost = [] if track.indexed else _holes(track, order, steps, usual)
  seconds = _promised(container, track)
  end = float(times[-1]) + usual
  if track.indexed and container.format.name != "avi":
    span = 0.0  # an MP4's header has its rate from the times of all frames
  missing = seconds - end if track.indexed else seconds - track.reached
  still_on = track.indexed or end > track.reached - max(2, 5 * usual)
  if still_on and missing > max(1, 0.005 * seconds, 2 * usual):
    behind = sum(count for _, count in lost) + len(times)
    count = round(missing / usual)
    lost.append((behind, count))
    span += count * usual
  return _Timeline(span, tuple(lost))


def _implausible(
  container: InputContainer,
  track: _Track,
  times: np.ndarray,
  steps: np.ndarray,
  jumps: np.ndarray,
  usual: float,
) -> np.ndarray:
  """Returns which steps are jumps of the clock, not frames of long display."""
  large = ~jumps & (steps > max(_STILL, 20 * usual))
  odd = np.zeros(len(steps), bool)
  rest = float(steps[~large & ~jumps].sum())
  few = len(steps) - large.sum() < 10
  promised = _promised(container, track)
  live = container.format.name in _LIVE
  pauses = np.flatnonzero(large).tolist()
  within = sum(_heard(track, times[i], times[i + 1]) for i in pauses)
  sounds = (len(track.sounds) - within) / max(rest, usual)  # a second
  for i in pauses:
    step = float(steps[i])
    heard = _heard(track, times[i], times[i + 1])
    if heard and heard > 0.3 * sounds * step:
      continue  # the sound goes on while the frame is displayed
    alone = step > rest * (1 if i == 0 and live else 10) and not few
    whole = float(steps[~jumps].sum())
    header = promised and abs(whole - step - promised) < abs(whole - promised)
    odd[i] = live or alone or bool(header)
  return odd


def _heard(track: _Track, first: float, last: float) -> int:
  """Counts packets of other streams between two moments."""
  return int(np.searchsorted(track.sounds, (first, last)) @ (-1, 1))


def _holes(
  track: _Track, order: np.ndarray, steps: np.ndarray, usual: float
) -> list[tuple[int, int]]:
  """Finds frames missing where the file has bytes that hold no packets.

  A frame of long display takes no extra bytes, overwritten frames leave some.
  """
  long = np.flatnonzero(steps > 1.8 * usual)
  if not len(long) or np.isnan(track.position).any():
    return []
  unread = np.diff(track.position) - np.diff(track.before)
  extra = unread - np.median(unread)
  stride = float(np.mean(np.diff(track.position)))
  found, before = [], 0
  for i in long:
    missing = round(float(steps[i]) / usual) - 1
    first, last = sorted((order[i], order[i + 1]))
    if extra[first:last].max() > 0.3 * missing * stride:
      found.append((int(i) + 1 + before, missing))
      before += missing
  return found


def _promised(container: InputContainer, track: _Track) -> float:
  """Returns the main video's seconds by the header, 0 if it states none."""
  name = container.format.name
  if name not in _PROMISING:
    return 0.0
  whole = (container.duration or 0) / av.time_base
  # Matroska's muxers state it of each stream; cutting tools may not update it.
  tag = re.fullmatch(
    r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", track.stream.metadata.get("DURATION", "")
  )
  if tag:
    hours, minutes, seconds = tag.groups()
    tagged = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return min(tagged, whole) if whole else tagged
  if name == "avi":
    rate = track.stream.average_rate
    return float(track.stream.frames / rate) if rate else 0.0
  if name == "asf" and not container.duration:
    return _asf_seconds(container.name.removeprefix("file:"))
  return whole


def _asf_seconds(path: str) -> float:
  """Returns the seconds by an ASF header; FFmpeg ignores it in a cut file."""
  with open(path, "rb") as file:
    header = file.read(2**16)
  at = header.find(_ASF_FILE)
  if at < 0 or len(header) < at + 96:
    return 0.0

  def number(offset: int, size: int = 8) -> int:
    """Reads an integer of the header."""
    return int.from_bytes(header[at + offset : at + offset + size], "little")

  broadcast = number(88, 4) & 1
  return 0.0 if broadcast else number(64) / 1e7 - number(80) / 1e3


def _missing_ahead(path: str, stream: int) -> int:
  """Counts frames at a file's start that cannot be decoded, by decoding it."""
  with video_file.open_video(path) as container:
    main = container.streams[stream]
    assert isinstance(main, av.VideoStream)  # `_main_track` chose among these
    decoder = video_file.FrameDecoder(container, main, threads=1, most=_HEAD)
    after = 0
    for _ in decoder:
      after += decoder.ahead is not None
      if after > 32:  # every frame displayed before the key frame has come
        break
    return (decoder.ahead or 0) + decoder.late


def _without_ahead(info: VideoInfo, missing: int) -> VideoInfo:
  """Removes the first frames from a description, which cannot be decoded."""
  frames = info.frames - missing
  if not missing or frames < 1:
    return info
  seconds = info.seconds
  if seconds is not None:
    seconds = seconds[missing:] - seconds[missing]
  return dataclasses.replace(
    info,
    frames=frames,
    duration=float(frames / info.fps),
    lost=tuple((max(0, at - missing), count) for at, count in info.lost),
    seconds=seconds,
  )
