"""Video files: opening them, and numbering their frames in display order.

Every error that a file causes in the libraries that read it is raised from here
as a `UserError` that names the file, so a damaged or unusual video stops no
other video.

A frame's number is the count of frames displayed before it, not of frames
decoded before it. A frame that cannot be decoded therefore leaves the numbers
of all other frames as they are:

    packets  I0 P3 B1 B2 P6 B4 B5     (times; B2 is damaged)
    decoded  0 1 3 4 5 6              numbers 0 1 3 4 5 6

Packets that display nothing are not counted (those cut off by an edit list, and
the hidden frames of VP8 and VP9). Where a file starts in mid-stream, the frames
before its first key frame that refer to missing frames are not counted either.
"""

import bisect
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import NoReturn

import av
from av.stream import Disposition

from hourjax.errors import UserError

# 8192 x 8192: one frame of a damaged size must not take all memory.
MAX_PIXELS = 2**26

# Containers that hold their own frames. Playlists and scripts (hls, dash,
# concat, sdp) name other files or addresses, which an untrusted file must not
# make this machine read; single images and text are no videos.
_FORMATS = (
  "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,kux,asf,asf_o,mpegts,"
  "mpegtsraw,mpeg,mpegvideo,m4v,h264,hevc,h263,h261,vvc,vc1,vc1test,avs2,avs3,"
  "cavsvideo,dirac,av1,obu,ivf,ogg,mxf,gxf,lxf,nut,nuv,rm,rpl,wtv,dv,dhav,mjpeg,"
  "mjpeg_2000,yuv4mpegpipe,gif,apng,swf,nsv,pva,ty,roq,bink,smk,amv,mv,ifv,lmlm4"
)
# Formats without presentation times: frames are numbered by order and count.
TIMELESS = frozenset(
  {"avi", "h261", "h263", "h264", "hevc", "vvc", "mpegvideo", "m4v", "mjpeg"}
  | {"cavsvideo", "avs2", "avs3", "vc1", "dirac", "obu", "av1"}
)
# Streams that are not the main video.
_ASIDE = (
  Disposition.attached_pic
  | Disposition.timed_thumbnails
  | Disposition.still_image
  | Disposition.dependent
  | Disposition.comment
  | Disposition.non_diegetic
)
# After damage, frames refer to what is damaged until the next key frame. In
# endless groups they heal by degrees; 250 is x264's usual group.
HEALED = 250
# Seconds that times of decoding go back by where another recording begins.
RESET = 0.3
_REORDER = 32  # frames, more than any codec holds back
_B_FRAME = 3  # AV_PICTURE_TYPE_B
# Threads a frame each, or a slice. A decoder that is dropped in mid-stream
# waits for its threads and keeps Python's interpreter locked meanwhile; if one
# wants to log through Python (`av.logging.set_level`, of any library in the
# process), both wait for good: 4 runs of 4 hung within their first 100 stops,
# six at a time on two busy cores, in twelve files of eight codecs. Flushed
# first, which waits without the lock, 20,000 stops of the same passed; so did
# 36,000 without logging, and 6,000 with slice threads alone.
_THREADS = "AUTO"
_TRIES = 8  # at reading on after an error, before the rest is given up


@contextlib.contextmanager
def own_fault(path: str | os.PathLike) -> Iterator[None]:
  """Turns every error of the block inside into a `UserError` about this file.

  The libraries raise far more than their own errors (UnicodeDecodeError of a
  title, AttributeError of an unknown codec, MemoryError of an absurd size).

  Args:
    path: of the video, for the message.

  Raises:
    UserError: with the reason, of kind "damaged".
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = getattr(error, "strerror", None) or str(error)
    name = type(error).__name__
    raise UserError(
      f"{path}: cannot be read as a video"
      f" ({name}{': ' if reason else ''}{reason}); the file is damaged,"
      " fetch it again",
      kind="damaged",
    ) from error


@contextlib.contextmanager
def open_video(
  path: str | os.PathLike,
) -> Iterator[av.container.InputContainer]:
  """Opens a video file; errors in the block are handled as by `own_fault`.

  Raises:
    UserError: the file is missing, empty, or not a video.
  """
  with own_fault(path):
    try:
      size = os.path.getsize(path)
    except OSError as error:
      raise UserError(
        f"cannot read video {path}: {error.strerror}",
        kind="missing" if isinstance(error, FileNotFoundError) else "other",
      ) from error
    if size == 0:
      raise UserError(f"{path} has 0 bytes; fetch it again")
    try:
      container = av.open(
        # Without it "12:30:00.mp4" is a file of the protocol "12".
        "file:" + os.fsdecode(path),
        container_options={
          "format_whitelist": _FORMATS,
          "protocol_whitelist": "file",
        },
        metadata_errors="replace",  # titles in old encodings
      )
    except av.error.ArgumentError as error:
      raise UserError(
        f"{path} is not a video ({size} bytes of a format that is not read,"
        " such as a playlist or an image); give the video itself"
      ) from error
    except (av.error.FFmpegError, OSError) as error:
      raise UserError(
        f"{path} is not a video, or is truncated ({size} bytes: "
        f"{error.strerror}); fetch it again"
      ) from error
    with container:
      yield container


def main_streams(
  container: av.container.InputContainer, path: str | os.PathLike
) -> list[av.VideoStream]:
  """Returns the streams that may be the main video.

  Covers, thumbnails and previews are left out.

  Raises:
    UserError: there is no such stream, or none that can be decoded.
  """
  streams = [
    stream
    for stream in container.streams.video
    if not stream.disposition & Disposition.attached_pic  # cover art
  ]
  if not streams:
    kinds = ", ".join(s.type for s in container.streams) or "none"
    raise UserError(
      f"{path} has no video stream (streams: {kinds}); drop the record, or"
      " fetch the file again if it should have one"
    )
  candidates = [s for s in streams if not s.disposition & _ASIDE] or streams
  if not any(s.codec_context for s in candidates):
    refuse_codec(path)
  return candidates


def refuse_codec(path: str | os.PathLike) -> NoReturn:
  """Raises the UserError of a video stream without a decoder."""
  raise UserError(
    f"{path}: its frames are in a codec that cannot be decoded (encrypted, or"
    " unknown); fetch the file in another format, e.g. H.264"
  )


def packets(
  container: av.container.InputContainer,
  stream: av.VideoStream | None = None,
) -> Iterator[av.Packet | None]:
  """Yields the packets of a file, and reads on behind damaged parts.

  Args:
    container: read from its present position.
    stream: whose packets are yielded; those of all streams if None.

  Yields:
    Packets that are not empty, and None in place of a part that could not be
    read.
  """
  chosen = () if stream is None else (stream,)
  tries = 0
  while tries < _TRIES:
    try:
      for packet in container.demux(*chosen):
        if packet.size:
          tries = 0
          yield packet
      return
    except av.error.FFmpegError:
      tries += 1
      yield None


def is_visible(packet: av.Packet, codec: str | None) -> bool:
  """Returns whether a packet gives a frame that is displayed.

  Args:
    packet: as demuxed; its first or last byte tells it of VP8 and VP9.
    codec: name of the codec, as FFmpeg has it.
  """
  if packet.is_discard:  # cut off by an edit list
    return False
  if codec == "vp8":  # the fifth bit of the frame tag
    return bool(memoryview(packet)[0] & 0x10)
  if codec == "vp9":
    content = memoryview(packet)
    # A superframe holds hidden frames and one that is displayed.
    if content[-1] & 0xE0 == 0xC0:
      return True
    # marker (2 bits), profile (2, one more of profile 3), show_existing_frame,
    # frame_type, show_frame
    first = content[0] << 1 if content[0] & 0x30 == 0x30 else content[0]
    return bool(first & 0x08 or first & 0x02)
  return True


@dataclasses.dataclass(frozen=True)
class DecodedFrame:
  """Holds a decoded frame with its number.

  Attributes:
    raw: the frame before conversion to RGB; its pts is not the file's.
    time: in ticks of the stream's time base, None where the file has none.
    number: how many frames the file displays before it.
    clean: whether it is neither damaged nor predicted from damaged frames.
    torn: whether frames that are missing just before it are lost to damage; if
      not, they are hidden frames.
  """

  raw: av.VideoFrame
  time: int | None
  number: int
  clean: bool
  torn: bool


class FrameDecoder:
  """Decodes a stream and numbers its frames in display order.

  Attributes:
    count: number of frames decoded so far.
    ahead: number of packets displayed before the first key frame that gave no
      frame; None until that key frame is decoded.
  """

  def __init__(
    self,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    *,
    threads: int = 0,
    most: int | None = None,
  ):
    """Prepares the decoder; iterating over it decodes, and works only once.

    Args:
      container: at its start, or where it was sought to.
      stream: the stream of `container` that is decoded.
      threads: of the decoder; 0 means one for each core.
      most: how many packets are decoded at most; all if None.
    """
    self._packets = itertools.islice(packets(container, stream), most)
    self._context = stream.codec_context
    self._context.options = {"max_pixels": str(MAX_PIXELS)}
    self._context.thread_type = _THREADS
    self._context.thread_count = threads
    self.count = 0
    self.ahead: int | None = None
    timeless = container.format.name in TIMELESS
    self._order = _Counted() if timeless else _Timed()
    self._hurt: list[int] = []  # packets that are damaged, or lost
    self._doubt: list[int] = []  # packets that the container calls damaged
    self._torn = False
    self._times: dict[int, int | None] = {}  # of packets at work

  @property
  def end(self) -> int:
    """Returns how many frames the packets read so far should display."""
    return self._order.total - (self.ahead or 0)

  @property
  def late(self) -> int:
    """Returns how many packets came after their own display time."""
    return self._order.late

  @property
  def torn(self) -> bool:
    """Returns whether frames missing after the last one are lost to damage."""
    return self._torn or bool(self._hurt) or bool(self._doubt)

  def __iter__(self) -> Iterator[DecodedFrame]:
    try:
      yield from self._frames()
    finally:
      self._context.flush_buffers()  # waits for its threads; see `_THREADS`

  def _frames(self) -> Iterator[DecodedFrame]:
    """Decodes the packets one by one, then what the decoder holds back."""
    sent = 0
    for packet in self._packets:
      if packet is None:
        self._damage(sent)
        continue
      self._order.send(packet, is_visible(packet, self._context.codec.name))
      if packet.is_corrupt:
        self._doubt.append(sent)
      # Decoders hand a packet's time on to its frame: by its number we know
      # which packet a frame is of, even where times jump or are missing.
      self._times[sent] = packet.pts
      packet.pts = packet.dts = sent
      yield from self._decoded(packet, sent)
      sent += 1
    yield from self._decoded(None, sent)

  def _decoded(
    self, packet: av.Packet | None, sent: int
  ) -> Iterator[DecodedFrame]:
    """Sends a packet, or the end of the stream, and yields what comes out."""
    try:
      frames = self._context.decode(packet)
    except av.error.FFmpegError:
      # With frame threads, an error is that of a packet as many back.
      back = max(0, self._context.thread_count - 1)
      self._damage(max(0, sent - back))
      self._order.lost += 1
      return
    for frame in frames:
      yield self._numbered(frame)

  def _numbered(self, frame: av.VideoFrame) -> DecodedFrame:
    """Returns a frame with its number, and whether damage concerns it."""
    packet = frame.pts  # the number of its packet
    self._order.whole &= not self.torn
    number = self._order.number(packet, frame.key_frame)
    if self.ahead is None and self._order.head is not None:
      self.ahead = self._order.head - self.count
    number = self.count if self.ahead is None else number - self.ahead
    self.count += 1
    torn, clean = self.torn, not frame.is_corrupt
    self._torn = False
    if not clean:
      # Most B frames are referred to by none.
      self._damage(None if frame.pict_type == _B_FRAME else packet)
    elif (self._hurt or self._doubt) and packet is not None:
      self._hurt = _lasting(self._hurt, packet, frame.key_frame)
      self._doubt = _lasting(self._doubt, packet, frame.key_frame)
      clean = not any(hurt <= packet for hurt in self._hurt)
    time = None if packet is None else self._times.pop(packet, None)
    return DecodedFrame(frame, time, number, clean, torn)

  def _damage(self, packet: int | None) -> None:
    """Notes that a packet is damaged or lost, None if none refers to it."""
    self._torn = True
    if packet is not None:
      self._hurt.append(packet)


def _lasting(hurt: list[int], packet: int, key_frame: bool) -> list[int]:
  """Returns the damaged packets that later frames may still refer to."""
  return [
    other
    for other in hurt
    if packet - other <= HEALED and not (key_frame and other < packet)
  ]


def _goes_back(packet: av.Packet, one: int | None, two: int | None) -> bool:
  """Returns whether time `two`, in ticks, is over RESET before `one`."""
  if one is None or two is None or one <= two:
    return False
  return (one - two) * packet.time_base > RESET


class _Timed:
  """Numbers frames by their packets' presentation times.

  Attributes:
    total: number of packets that are displayed, without late ones.
    late: number of packets whose display time is before that of a frame that
      has already come out.
    head: how many frames are displayed before the first key frame, or before
      the first frame after it that can be decoded; None until such a frame is
      decoded.
    whole: whether nothing was damaged so far.
    lost: number of decoding errors; this class does not need it.
  """

  def __init__(self) -> None:
    self.total, self.late, self.lost = 0, 0, 0
    self.head: int | None = None
    self.whole = True
    self._sent, self._passed, self._last = 0, 0, -1
    # Times grow within a segment; recordings that were joined have several.
    self._segment, self._pts = 0, 0
    self._clock: int | None = None  # the last decoding time, in ticks
    self._keys: dict[int, tuple[int, int, int]] = {}
    self._waiting: list[tuple[int, int, int]] = []
    self._first: tuple[int, int, int] | None = None  # the first key frame
    self._newest = (-1, 0, 0)

  def send(self, packet: av.Packet, visible: bool) -> None:
    """Notes a packet that is sent to the decoder."""
    pts, dts = packet.pts, packet.dts
    if dts is not None:
      self._segment += _goes_back(packet, self._clock, dts)
      self._clock = dts
    if _goes_back(packet, dts, pts):
      pts = dts  # the clock ran over in between
    if pts is not None:
      self._pts = pts
    key = (self._segment, self._pts, self._sent)
    self._keys[self._sent] = key
    self._sent += 1
    if self._first is None and packet.is_keyframe:
      self._first = key
    if not visible:
      return
    if key < self._newest:
      self.late += 1
    else:
      bisect.insort(self._waiting, key)
      self.total += 1

  def number(self, packet: int | None, key_frame: bool) -> int:
    """Returns how many frames are displayed before this packet's frame."""
    key = None if packet is None else self._keys.pop(packet, None)
    if key is not None and key > self._newest:
      first = key if self._first is None else self._first
      if self.head is None and key >= first:
        # Decoders that start without a key frame give no frame at first.
        start = key if self.whole else first
        self.head = self._passed + bisect.bisect_left(self._waiting, start)
      before = bisect.bisect_left(self._waiting, key)
      self._last = max(self._last, self._passed + before)
      after = before + (self._waiting[before : before + 1] == [key])
      del self._waiting[:after]
      self._passed += after
      self._newest = key
    else:  # out of order: its time is wrong; later frames correct the count
      self._last += 1
    return self._last


class _Counted:
  """Numbers frames of formats without times, by count and by key frames.

  When a key frame comes out, every packet before it has come out or never will.
  The attributes are those of `_Timed`.
  """

  def __init__(self) -> None:
    self.total, self.late, self.lost = 0, 0, 0
    self.head: int | None = None
    self.whole = True
    self._before: list[int] = []  # by packet: frames displayed before it
    self._first: int | None = None
    self._last = -1
    self._out: list[int] = []  # packets of the latest frames

  def send(self, packet: av.Packet, visible: bool) -> None:
    """Notes a packet that is sent to the decoder."""
    if self._first is None and packet.is_keyframe:
      self._first = len(self._before)
    self._before.append(self.total)
    self.total += visible

  def number(self, packet: int | None, key_frame: bool) -> int:
    """Returns how many frames are displayed before this packet's frame."""
    self._last += 1 + self.lost
    self.lost = 0
    if packet is None:
      return self._last
    first = packet if self._first is None else self._first
    if self.head is None and packet >= first:
      self.head = self._before[first]
      self._last = max(self._last, self.head)
    if key_frame:
      leading = sum(other > packet for other in self._out)
      self._last = max(self._last, self._before[packet] + leading)
    self._out = [*self._out[-_REORDER:], packet]
    return self._last
