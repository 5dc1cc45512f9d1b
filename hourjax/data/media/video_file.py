"""Video files: opening them, and their pictures numbered as they are decoded.

Whatever a file does to the libraries that read it ends here as a `UserError`
that names the file: no damaged or odd video costs more than itself.

A picture's number is the count of pictures shown before it, not of pictures
decoded before it. So what cannot be decoded costs itself, and moves nothing:

    packets  I0 P3 B1 B2 P6 B4 B5     (times; B2 is damaged)
    decoded  0 1 3 4 5 6              numbers 0 1 3 4 5 6

Not counted are packets that show nothing (cut off by an edit list, VP8's and
VP9's hidden frames) and, where a file starts in mid-stream, the pictures before
its first key frame that refer to what is not there.
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

# 8192 x 8192: one picture of a damaged size must not take all memory.
MAX_PIXELS = 2**26

# Containers that hold their own pictures. Playlists and scripts (hls, dash,
# concat, sdp) name other files or addresses, which a stranger's file must not
# make this machine read; single images and text are no videos.
_FORMATS = (
  "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,kux,asf,asf_o,mpegts,"
  "mpegtsraw,mpeg,mpegvideo,m4v,h264,hevc,h263,h261,vvc,vc1,vc1test,avs2,avs3,"
  "cavsvideo,dirac,av1,obu,ivf,ogg,mxf,gxf,lxf,nut,nuv,rm,rpl,wtv,dv,dhav,mjpeg,"
  "mjpeg_2000,yuv4mpegpipe,gif,apng,swf,nsv,pva,ty,roq,bink,smk,amv,mv,ifv,lmlm4"
)
# Formats without times of presentation: order and count tell instead.
TIMELESS = frozenset(
  {"avi", "h261", "h263", "h264", "hevc", "vvc", "mpegvideo", "m4v", "mjpeg"}
  | {"cavsvideo", "avs2", "avs3", "vc1", "dirac", "obu", "av1"}
)
# Streams beside the film.
_ASIDE = (
  Disposition.attached_pic
  | Disposition.timed_thumbnails
  | Disposition.still_image
  | Disposition.dependent
  | Disposition.comment
  | Disposition.non_diegetic
)
# After damage, pictures refer to what is damaged until the next key frame. In
# endless groups they heal by degrees; 250 is x264's usual group.
HEALED = 250
# Seconds that times of decoding go back by where another recording begins.
RESET = 0.3
_REORDER = 32  # pictures, more than any codec holds back
_B_PICTURE = 3  # AV_PICTURE_TYPE_B
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
  """Whatever goes wrong inside becomes a `UserError` about this file.

  The one place for it: the libraries raise far more than their own errors
  (UnicodeDecodeError of a title, AttributeError of an unknown codec,
  MemoryError of an absurd size).
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    said = getattr(error, "strerror", None) or str(error)
    name = type(error).__name__
    raise UserError(
      f"{path}: cannot be read as a video"
      f" ({name}{': ' if said else ''}{said}); the file is damaged, fetch it"
      " again",
      kind="damaged",
    ) from error


@contextlib.contextmanager
def open_video(
  path: str | os.PathLike,
) -> Iterator[av.container.InputContainer]:
  """Opens a video file; errors inside are the file's, as `own_fault` says.

  Raises:
    UserError: missing, empty, or no video.
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


def film_streams(
  container: av.container.InputContainer, path: str | os.PathLike
) -> list[av.VideoStream]:
  """The streams of which one is the film: no covers, thumbnails, previews.

  Raises:
    UserError: there is none, or none that can be decoded.
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
  films = [s for s in streams if not s.disposition & _ASIDE] or streams
  if not any(s.codec_context for s in films):
    refuse_codec(path)
  return films


def refuse_codec(path: str | os.PathLike) -> NoReturn:
  """Raises the UserError of a film without a decoder."""
  raise UserError(
    f"{path}: its pictures are in a codec that cannot be decoded (encrypted, or"
    " unknown); fetch the file in another format, e.g. H.264"
  )


def packets(
  container: av.container.InputContainer,
  stream: av.VideoStream | None = None,
) -> Iterator[av.Packet | None]:
  """Yields what can be read of a file, over damage where there is some.

  Args:
    container: from its present position.
    stream: only its packets, or all if None.

  Yields:
    Packets that are not empty, and None in place of what could not be read.
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


def shows(packet: av.Packet, codec: str | None) -> bool:
  """Whether decoding a packet gives a picture, as its first byte tells."""
  if packet.is_discard:  # cut off by an edit list
    return False
  if codec == "vp8":  # the fifth bit of the frame tag
    return bool(memoryview(packet)[0] & 0x10)
  if codec == "vp9":
    content = memoryview(packet)
    # A superframe holds hidden frames and one that is shown.
    if content[-1] & 0xE0 == 0xC0:
      return True
    # marker (2 bits), profile (2, one more of profile 3), show_existing_frame,
    # frame_type, show_frame
    first = content[0] << 1 if content[0] & 0x30 == 0x30 else content[0]
    return bool(first & 0x08 or first & 0x02)
  return True


@dataclasses.dataclass(frozen=True)
class Picture:
  """A decoded picture.

  Attributes:
    raw: not converted yet; its pts is not the file's.
    time: in the file's own ticks, None where it has none.
    number: of pictures that the file shows before it.
    clean: neither damaged nor made from damaged pictures.
    torn: whether pictures missing just before it are lost to damage, and not
      hidden ones.
  """

  raw: av.VideoFrame
  time: int | None
  number: int
  clean: bool
  torn: bool


class Pictures:
  """Decodes a stream, and numbers what comes out.

  Attributes:
    count: pictures that were decoded.
    ahead: packets shown before the first key frame that gave no picture; None
      until that frame is there.
  """

  def __init__(
    self,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    *,
    threads: int = 0,
    most: int | None = None,
  ):
    """Prepares; iterating decodes, once.

    Args:
      container: at its start, or where it was sought to.
      stream: of it.
      threads: of the decoder; 0 is one a core.
      most: packets that are decoded; all if None.
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
    """Pictures that the packets so far should show."""
    return self._order.total - (self.ahead or 0)

  @property
  def late(self) -> int:
    """Packets that came after the time at which they should be shown."""
    return self._order.late

  @property
  def torn(self) -> bool:
    """Whether what is missing after the last picture is lost to damage."""
    return self._torn or bool(self._hurt) or bool(self._doubt)

  def __iter__(self) -> Iterator[Picture]:
    try:
      yield from self._pictures()
    finally:
      self._context.flush_buffers()  # waits for its threads; see `_THREADS`

  def _pictures(self) -> Iterator[Picture]:
    sent = 0
    for packet in self._packets:
      if packet is None:
        self._damage(sent)
        continue
      self._order.send(packet, shows(packet, self._context.codec.name))
      if packet.is_corrupt:
        self._doubt.append(sent)
      # Decoders hand a packet's time on to its picture: by its number we know
      # which packet a picture is of, even where times jump or are missing.
      self._times[sent] = packet.pts
      packet.pts = packet.dts = sent
      yield from self._decoded(packet, sent)
      sent += 1
    yield from self._decoded(None, sent)

  def _decoded(self, packet: av.Packet | None, sent: int) -> Iterator[Picture]:
    try:
      frames = self._context.decode(packet)
    except av.error.FFmpegError:
      # With frame threads, an error is that of a packet as many back.
      back = max(0, self._context.thread_count - 1)
      self._damage(max(0, sent - back))
      self._order.lost += 1
      return
    for frame in frames:
      yield self._picture(frame)

  def _picture(self, frame: av.VideoFrame) -> Picture:
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
      # Most B pictures are referred to by none.
      self._damage(None if frame.pict_type == _B_PICTURE else packet)
    elif (self._hurt or self._doubt) and packet is not None:
      self._hurt = _lasting(self._hurt, packet, frame.key_frame)
      self._doubt = _lasting(self._doubt, packet, frame.key_frame)
      clean = not any(hurt <= packet for hurt in self._hurt)
    return Picture(frame, self._times.pop(packet, None), number, clean, torn)

  def _damage(self, packet: int | None) -> None:
    self._torn = True
    if packet is not None:
      self._hurt.append(packet)


def _lasting(hurt: list[int], packet: int, key_frame: bool) -> list[int]:
  """Of damaged packets those that still matter once this one is decoded."""
  return [
    other
    for other in hurt
    if packet - other <= HEALED and not (key_frame and other < packet)
  ]


def _goes_back(packet: av.Packet, one: int | None, two: int | None) -> bool:
  """Whether a second time, in ticks, is before a first by more than RESET."""
  if one is None or two is None or one <= two:
    return False
  return (one - two) * packet.time_base > RESET


class _Timed:
  """Numbers pictures by their packets' times of presentation.

  Attributes:
    total: packets that show something, but for late ones.
    late: packets that should have been shown before a picture that was.
    head: how many are shown before the first key frame, or the first picture
      after it that can be decoded; None until a picture from there on is.
    whole: whether nothing was damaged so far.
    lost: not needed here.
  """

  def __init__(self):
    self.total, self.late, self.lost = 0, 0, 0
    self.head: int | None = None
    self.whole = True
    self._sent, self._passed, self._last = 0, 0, -1
    # Times grow within a segment; recordings that were joined have several.
    self._segment, self._clock, self._pts = 0, None, 0
    self._keys: dict[int, tuple[int, int, int]] = {}
    self._waiting: list[tuple[int, int, int]] = []
    self._first = None  # the first key frame
    self._shown = (-1, 0, 0)

  def send(self, packet: av.Packet, shown: bool) -> None:
    """Takes note of a packet that the decoder gets."""
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
    if not shown:
      return
    if key < self._shown:
      self.late += 1
    else:
      bisect.insort(self._waiting, key)
      self.total += 1

  def number(self, packet: int | None, key_frame: bool) -> int:
    """Pictures before the one that comes of a packet."""
    key = self._keys.pop(packet, None)
    if key is not None and key > self._shown:
      first = key if self._first is None else self._first
      if self.head is None and key >= first:
        # Decoders that find their way in by degrees give no picture at once.
        start = key if self.whole else first
        self.head = self._passed + bisect.bisect_left(self._waiting, start)
      before = bisect.bisect_left(self._waiting, key)
      self._last = max(self._last, self._passed + before)
      after = before + (self._waiting[before : before + 1] == [key])
      del self._waiting[:after]
      self._passed += after
      self._shown = key
    else:  # out of order: its time is wrong; the next ones' mend the count
      self._last += 1
    return self._last


class _Counted:
  """Numbers pictures of formats without times: by count, and by key frames.

  When a key frame comes out, all packets before it have come out or never will;
  the attributes are those of `_Timed`.
  """

  def __init__(self):
    self.total, self.late, self.lost = 0, 0, 0
    self.head: int | None = None
    self.whole = True
    self._before: list[int] = []  # by packet: shown before it
    self._first: int | None = None
    self._last, self._out = -1, []

  def send(self, packet: av.Packet, shown: bool) -> None:
    if self._first is None and packet.is_keyframe:
      self._first = len(self._before)
    self._before.append(self.total)
    self.total += shown

  def number(self, packet: int | None, key_frame: bool) -> int:
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
