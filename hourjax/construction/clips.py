"""Clips of a video and their frames, as the parts of a chat message."""

import base64
import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from hourjax.data.media import video
from hourjax.data.media.video_probe import VideoInfo

MEDIA = ("images", "video")
_ENDS = 64 * 2**10  # bytes at both ends of a file that tell it from others
_QUALITY = 90  # of JPEG
# A rest that is shorter than this part of a clip belongs to the clip before it.
_REST = 1 / 3


@dataclasses.dataclass(frozen=True)
class ClipOptions:
  """Holds how clips are cut and sent.

  Attributes:
    seconds: of a clip.
    rate: frames a second.
    size: longest side of a frame, in pixels; frames are not enlarged.
    media: "images", one part for each frame, or "video", one MP4 file, which
      vLLM and SGLang take.
  """

  seconds: float = 30.0
  rate: float = 0.5
  size: int = 448
  media: str = "images"


def cut(duration: float, seconds: float) -> list[tuple[float, float]]:
  """Returns (start, end) of the clips of a video, in seconds.

  A video of 65 s has the clips (0, 30) and (30, 65), one of 75 s also (60, 75).

  Args:
    duration: of the video.
    seconds: of a clip.
  """
  whole, rest = divmod(duration, seconds)
  count = max(1, int(whole) + (rest >= _REST * seconds))
  starts = [seconds * i for i in range(count)]
  return list(zip(starts, [*starts[1:], duration]))


def frame_numbers(
  info: VideoInfo, start: float, end: float, rate: float
) -> Int[np.ndarray, "F"]:
  """Returns the numbers of evenly spaced frames of a clip, at least one.

  Of 0 to 30 s at a rate of 0.1, those shown at 5, 15 and 25 s.

  Args:
    info: of the video.
    start: of the clip, in seconds.
    end: of the clip, in seconds.
    rate: frames a second.
  """
  count = max(1, round((end - start) * rate))
  times = start + (np.arange(count) + 0.5) * (end - start) / count
  if info.seconds is not None:
    numbers = np.searchsorted(info.seconds, times, "right") - 1
  else:
    numbers = np.floor(times * float(info.fps) + 1e-6).astype(np.int64)
  return np.clip(numbers, 0, info.frames - 1).astype(np.int64)


def stamp(path: str | os.PathLike) -> str:
  """Returns what tells a file's content from others': size and both ends."""
  path = pathlib.Path(path)
  if path.is_dir():
    names = sorted(file.name for file in path.iterdir())
    return hashlib.blake2b("/".join(names).encode(), digest_size=16).hexdigest()
  size = path.stat().st_size
  with open(path, "rb") as file:
    ends = file.read(_ENDS)
    file.seek(max(0, size - _ENDS))
    ends += file.read(_ENDS)
  content = f"{size}\0".encode() + ends
  return hashlib.blake2b(content, digest_size=16).hexdigest()


def message_parts(
  path: str | os.PathLike,
  info: VideoInfo,
  spans: Sequence[tuple[float, float]],
  options: ClipOptions,
) -> Iterator[list[dict[str, Any]]]:
  """Decodes clips, in one pass over the file, into parts of a chat message.

  Args:
    path: of the video.
    info: result of `probe`.
    spans: (start, end) of the clips in seconds, ascending.
    options: of the clips.

  Yields:
    For each clip its parts: "image_url" for each frame, or one "video_url".

  Raises:
    UserError: the video cannot be decoded.
  """
  numbers = [
    frame_numbers(info, start, end, options.rate) for start, end in spans
  ]
  counts = [len(each) for each in numbers]
  width, height = video.display_size(path, info)
  scale = min(1.0, options.size / max(width, height))
  # H.264 in yuv420p wants even sides.
  size = _even(scale * width), _even(scale * height)
  frames = (
    frame
    for batch in video.decode_frames(
      path, np.concatenate(numbers), size, info=info, batch=8, threads=1
    )
    for frame in batch
  )
  for count in counts:
    clip = np.stack([next(frames) for _ in range(count)])
    if options.media == "video":
      yield [_video_part(clip, options.rate)]
    else:
      yield [image_part(frame) for frame in clip]


def _even(side: float) -> int:
  """Returns the nearest even number, at least 2."""
  return max(2, 2 * round(side / 2))


def image_part(frame: UInt8[np.ndarray, "h w 3"]) -> dict[str, Any]:
  """Returns a frame as a JPEG in a data URL."""
  file = io.BytesIO()
  Image.fromarray(frame).save(file, "JPEG", quality=_QUALITY)
  return {"type": "image_url", "image_url": {"url": _url("image/jpeg", file)}}


def _video_part(
  frames: UInt8[np.ndarray, "F h w 3"], rate: float
) -> dict[str, Any]:
  """Returns frames as an MP4 file in a data URL."""
  file = io.BytesIO()
  speed = Fraction(rate).limit_denominator(1000)
  with av.open(file, "w", format="mp4") as container:
    stream = container.add_stream("libx264", rate=speed, options={"crf": "18"})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    for frame in frames:
      container.mux(
        stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
      )
    container.mux(stream.encode())
  return {"type": "video_url", "video_url": {"url": _url("video/mp4", file)}}


def _url(kind: str, file: io.BytesIO) -> str:
  """Returns a file as a data URL."""
  return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
