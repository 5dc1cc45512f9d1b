"""Frames with captions, decoded for stage 0.

The file is a JSON list of
{"video": name, "second": s, "captions": [text, ...]}.
"""

import collections
import concurrent.futures
import os
import pathlib
from typing import Annotated, NamedTuple

import numpy as np
import pydantic
from jaxtyping import Num, UInt8

from hourjax import progress, schema
from hourjax.data.media import video, video_probe
from hourjax.errors import UserError

_HELD_OUT = 0.02  # share of the videos whose frames are not trained on


class _Caption(schema.Schema):
  """Describes one record of a file of captions."""

  video: str
  second: Annotated[float, pydantic.Field(ge=0)]
  captions: Annotated[list[str], pydantic.Field(min_length=1)]


class CaptionedFrames(NamedTuple):
  """Holds frames and which texts are their captions.

  Attributes:
    frames: [I, h, w, 3], those that are held out last.
    shown: float32 [I, N], 1 where a text is a caption of the frame.
    texts: the N distinct captions, sorted.
    held_out: number of frames at the end that are not trained on.
  """

  frames: UInt8[np.ndarray, "I h w 3"]
  shown: Num[np.ndarray, "I N"]
  texts: list[str]
  held_out: int


def read_captioned_frames(
  captions: str | os.PathLike, media: str | os.PathLike, size: int
) -> CaptionedFrames:
  """Reads captions, and decodes their frames.

  Whole videos are held out, the last ones in the order of their names.

  Args:
    captions: the file.
    media: folder of the videos.
    size: side of a frame in pixels.

  Raises:
    UserError: the file or a video cannot be read.
  """
  records = _read(pathlib.Path(captions))
  texts = sorted({text for record in records for text in record.captions})
  place = {text: i for i, text in enumerate(texts)}
  by_video: dict[str, list[_Caption]] = collections.defaultdict(list)
  for record in records:
    by_video[record.video].append(record)
  for group in by_video.values():
    group.sort(key=lambda record: record.second)
  names = sorted(by_video)
  frames = np.empty((len(records), size, size, 3), np.uint8)
  shown = np.zeros((len(records), len(texts)), np.float32)
  starts = np.cumsum([0, *(len(by_video[name]) for name in names)])

  def decode(number: int) -> int:
    group = by_video[names[number]]
    path = pathlib.Path(media) / names[number]
    info = video_probe.probe(path)
    rate = info.frames / info.duration
    wanted = [int(record.second * rate) for record in group]
    if wanted[-1] >= info.frames:
      raise UserError(
        f"{captions}: a caption of {names[number]} is for second"
        f" {group[-1].second:g}, and the video has {info.duration:.1f};"
        " correct it"
      )
    at = starts[number]
    for part in video.decode_frames(path, wanted, size, info=info, threads=1):
      frames[at : at + len(part)] = part
      at += len(part)
    for i, record in enumerate(group, start=starts[number]):
      shown[i, [place[text] for text in record.captions]] = 1
    return len(group)

  workers = os.cpu_count() or 1
  with (
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
    progress.bar(len(records), unit="frame", desc="decode") as bar,
  ):
    for count in pool.map(decode, range(len(names))):
      bar.update(count)
  # At least one, but never all of them.
  held = min(max(round(_HELD_OUT * len(names)), 1), len(names) - 1)
  return CaptionedFrames(
    frames, shown, texts, int(starts[-1] - starts[len(names) - held])
  )


def _read(path: pathlib.Path) -> list[_Caption]:
  """Reads the records of a file of captions."""
  remedy = 'give a list of {"video", "second", "captions"}'
  values = schema.read_json(path, remedy=remedy)
  if not isinstance(values, list) or not values:
    raise UserError(f"{path} holds no captions; {remedy}")
  return [
    schema.validate(_Caption, value, f"{path.name}: {i}", remedy=remedy)
    for i, value in enumerate(values)
  ]
