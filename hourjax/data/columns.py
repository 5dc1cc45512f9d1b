"""Columns: what planning needs to know of every conversation, in numbers.

Rows of samples are planned from these alone: no text is read and no file is
opened. 700,000 conversations take about 25 MB.
"""

import array
import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, UInt8

from hourjax import schema
from hourjax.data.conversations import (
  IGNORE,
  IMAGE,
  Conversation,
  encode_conversation,
)
from hourjax.data.media import images
from hourjax.data.records.record import Record, Turn
from hourjax.data.store import npy
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError

# zipfile's: NotImplementedError for a method, RuntimeError for a password.
_UNREADABLE = (
  *(OSError, ValueError, EOFError, NotImplementedError, RuntimeError, KeyError),
  zipfile.BadZipFile,
)

MODALITIES = ("text", "video", "image")
# (seconds, frames) that the time instruction is measured with before those of
# the video are known; `sample_sizes` adds the tokens that they have more.
MEASURED_AS = (0.0, 1)
# A video of four months; one that is said to be longer is a mistake, and would
# cost memory by the second.
LONGEST = 1e7

_FASTEST = 1e9  # frames a second; a clock of nanoseconds gives no more
_MOST_BYTES = 4 * 2**30  # 100 million conversations
_NAMES = ("videos", "sources", "streams")
# The file keeps the name that the column had in its first version.
_NAMES_IN_FILE = {"num_frames": "pictures"}
_FLOATS = ("duration", "fps")
_BYTES = ("modality", "held_out", *_NAMES)
# Columns that older versions did not write.
_ADDED = ("fps", "held_out", "rejected")


class Measures(NamedTuple):
  """Holds one conversation's numbers, each as the column of its name."""

  modality: int
  tokens: int
  prompt: int
  answer: int
  images: int = 0
  width: int = 0
  height: int = 0
  rejected: int = 0


@dataclasses.dataclass(frozen=True)
class Columns:
  """Holds the numbers of N conversations about M videos.

  Attributes:
    modality: index into MODALITIES.
    tokens: ids of the conversation without its visual slots; a video's
      duration and number of frames are counted as MEASURED_AS.
    prompt: those of them that are MemAug queries (label -100).
    answer: tokens before the first one that the assistant says.
    images: number of images; 0 for text and video.
    width: of a single image in pixels, else 0.
    height: of a single image in pixels, else 0.
    video: index into the M videos, else -1.
    source: index into `sources`.
    stream: index into `streams`.
    videos: names, as in the feature store and below the media folder.
    sources: names of the data sources.
    streams: names of the streams that share no row.
    duration: of each video in seconds, NaN where it is not known.
    num_frames: in each video's file, 0 where it is not known.
    fps: average frames a second of each video's file, as it states them; NaN
      where they are not known, and in datasets prepared by older versions.
    held_out: 1 where a conversation is never trained on, but evaluated; the
      same for all conversations about a video. Zeros if not given.
    rejected: as `tokens`, with the rejected answer in place of the last one; 0
      where a record has no rejected answer. Zeros if not given.
  """

  modality: UInt8[np.ndarray, "N"]
  tokens: Int32[np.ndarray, "N"]
  prompt: Int32[np.ndarray, "N"]
  answer: Int32[np.ndarray, "N"]
  images: Int32[np.ndarray, "N"]
  width: Int32[np.ndarray, "N"]
  height: Int32[np.ndarray, "N"]
  video: Int32[np.ndarray, "N"]
  source: Int32[np.ndarray, "N"]
  stream: Int32[np.ndarray, "N"]
  videos: tuple[str, ...]
  sources: tuple[str, ...]
  streams: tuple[str, ...]
  duration: Float64[np.ndarray, "M"]
  num_frames: Int32[np.ndarray, "M"]
  fps: Float64[np.ndarray, "M"]
  # None only until the columns are made.
  held_out: UInt8[np.ndarray, "N"] = None  # pyrefly: ignore[bad-assignment]
  rejected: Int32[np.ndarray, "N"] = None  # pyrefly: ignore[bad-assignment]

  def __post_init__(self) -> None:
    for name, dtype in (("held_out", np.uint8), ("rejected", np.int32)):
      if getattr(self, name) is None:
        object.__setattr__(self, name, np.zeros(len(self), dtype))

  def __len__(self) -> int:
    return len(self.modality)

  def save(self, path: str | os.PathLike) -> None:
    """Writes one uncompressed .npz."""
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in ("held_out", "rejected") and not value.any():
        continue  # the file of older versions
      name = _NAMES_IN_FILE.get(field.name, field.name)
      arrays[name] = _pack(value) if isinstance(value, tuple) else value
    with open(path, "wb") as file:
      np.savez(file, **arrays)

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Columns":
    """Reads what `save` wrote.

    Raises:
      UserError: the file is missing or damaged, has columns of another
        version, or numbers that do not fit one another.
    """
    fields = [field.name for field in dataclasses.fields(cls)]
    wanted = [_NAMES_IN_FILE.get(name, name) for name in fields]
    try:
      schema.check_file(path, remedy="`prepare` writes it")
      found: dict[str, Any] = _read_members(path, wanted)
      found.setdefault("fps", np.full(len(found["duration"]), np.nan))
      found.setdefault("held_out", np.zeros_like(found["modality"]))
      found.setdefault("rejected", np.zeros_like(found["tokens"]))
      for name in _NAMES:
        found[name] = _unpack(found[name], name)
      _check_lengths(found)
      _check_numbers(found)
    except _UNREADABLE as error:
      raise UserError(
        f"{path} cannot be read as the columns of a prepared dataset"
        f" ({error}); run `python -m hourjax.prepare` again"
      ) from None
    return cls(**{name: found[n] for name, n in zip(fields, wanted)})


class ColumnsBuilder:
  """Collects columns one conversation at a time."""

  def __init__(self) -> None:
    kinds = {"modality": "B"}
    names = (*Measures._fields, "video", "source", "stream")
    self._columns = {n: array.array(kinds.get(n, "i")) for n in names}
    self._duration, self._num_frames = array.array("d"), array.array("i")
    self._fps = array.array("d")
    self._names: dict[str, dict[str, int]] = {
      kind: {} for kind in ("videos", "sources", "streams")
    }

  def add(
    self,
    measures: Measures,
    source: str,
    stream: str,
    video: str | None = None,
    duration: float | None = None,
    num_frames: int = 0,
    fps: float | None = None,
  ) -> None:
    """Adds a conversation.

    Args:
      measures: its numbers.
      source: name of its data source.
      stream: name of its stream.
      video: name of its video, if it has one.
      duration: of the video in seconds; None where it is not known.
      num_frames: in the video's file; 0 where it is not known.
      fps: average frames a second of the file; None where they are not known.
        Of several conversations about a video the first that knows tells each
        of the three.
    """
    number = -1
    if video is not None:
      number = self._number("videos", video)
      if number == len(self._duration):
        self._duration.append(np.nan)
        self._num_frames.append(0)
        self._fps.append(np.nan)
      if duration is not None and np.isnan(self._duration[number]):
        self._duration[number] = duration
      self._num_frames[number] = self._num_frames[number] or num_frames
      if fps is not None and np.isnan(self._fps[number]):
        self._fps[number] = fps
    row = measures._asdict() | {
      "video": number,
      "source": self._number("sources", source),
      "stream": self._number("streams", stream),
    }
    for name, value in row.items():
      self._columns[name].append(value)

  def build(self) -> Columns:
    """Returns the columns so far."""
    kinds = {"modality": np.uint8}
    columns: dict[str, Any] = {
      name: np.array(column, kinds.get(name, np.int32))
      for name, column in self._columns.items()
    }
    columns |= {kind: tuple(names) for kind, names in self._names.items()}
    return Columns(
      **columns,
      duration=np.array(self._duration, np.float64),
      num_frames=np.array(self._num_frames, np.int32),
      fps=np.array(self._fps, np.float64),
    )

  def _number(self, kind: str, name: str) -> int:
    """Returns the number of a name, a new one if it is new."""
    names = self._names[kind]
    return names.setdefault(name, len(names))


def measure_record(
  record: Record,
  tokenizer: Tokenizer,
  media_root: str | os.PathLike | None,
) -> Measures:
  """Counts one record's tokens, and reads the size of a single image.

  Args:
    record: checked.
    tokenizer: that training will use.
    media_root: folder of the images.

  Raises:
    UserError: an image that is needed and cannot be read.
  """

  def encoded(turns: Sequence[Turn]) -> Conversation:
    return encode_conversation(
      turns,
      tokenizer,
      video=MEASURED_AS if record.modality == "video" else None,
      slots=record.modality != "text",
    )

  conversation = encoded(record.turns)
  spoken = conversation.ids != IMAGE
  rejected = 0
  if record.rejected is not None:
    other = encoded([*record.turns[:-1], Turn("gpt", record.rejected)])
    rejected = int((other.ids != IMAGE).sum())
  count = len(record.media) if record.modality == "image" else 0
  width, height = 0, 0
  if count == 1:
    width, height = _image_size(record, media_root)
  return Measures(
    MODALITIES.index(record.modality),
    tokens=int(spoken.sum()),
    prompt=int((spoken & (conversation.labels == IGNORE)).sum()),
    answer=int(spoken[: conversation.answer].sum()),
    images=count,
    width=width,
    height=height,
    rejected=rejected,
  )


def _image_size(
  record: Record, media_root: str | os.PathLike | None
) -> tuple[int, int]:
  """Returns (width, height) of a record's only image."""
  if media_root is None:
    raise UserError(
      f"record {record.id}: its tokens depend on the size of"
      f" {record.media[0]}; give the media folder"
    )
  return images.image_size(pathlib.Path(media_root) / record.media[0])


def _read_members(
  path: str | os.PathLike, names: list[str]
) -> dict[str, np.ndarray]:
  """Reads arrays of an .npz as `Columns.save` writes it.

  As `np.load` does, but memory is taken only for values that the file holds:
  neither a header's claim nor a compressed member is believed.
  """
  found = {}
  with zipfile.ZipFile(path) as archive:
    if (size := os.path.getsize(path)) > _MOST_BYTES:
      raise ValueError(f"it has {size} bytes, at most {_MOST_BYTES} are meant")
    present = {member.filename for member in archive.infolist()}
    for name in names:
      if name in _ADDED and f"{name}.npy" not in present:
        continue
      info = archive.getinfo(f"{name}.npy")
      if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
        raise ValueError(
          f"{name} is compressed, or larger than the file of {size} bytes"
        )
      with archive.open(info) as member:
        # A ZipExtFile is a BufferedIOBase, whatever its stub says.
        shape, dtype = npy.read_header(member)  # pyrefly: ignore[bad-argument-type]
        values = bytearray(member.read())
      kinds = {np.float64: _FLOATS, np.uint8: _BYTES}
      kind = next((k for k, of in kinds.items() if name in of), np.int32)
      if len(shape) != 1 or dtype != kind:
        raise ValueError(
          f"{name} is an array {shape} of {dtype}, not [N] of {np.dtype(kind)}"
        )
      if (claimed := npy.array_bytes(shape, dtype)) != len(values):
        raise ValueError(f"{name} claims {claimed} bytes and has {len(values)}")
      found[name] = np.frombuffer(values, dtype)
  return found


def _check_lengths(columns: dict) -> None:
  """Checks that columns have one length; raises ValueError if not."""
  lengths = {name: len(column) for name, column in columns.items()}
  of_video = ("videos", "duration", "pictures", "fps")
  videos = [lengths.pop(name) for name in of_video]
  for name in ("sources", "streams"):
    lengths.pop(name)
  if len(set(lengths.values())) > 1 or len(set(videos)) > 1:
    raise ValueError(f"columns of different lengths: {lengths}, {videos}")


def _check_numbers(columns: Mapping[str, Any]) -> None:
  """Checks each number; raises ValueError that names the first wrong one.

  Args:
    columns: by their names in the file.
  """
  most = np.iinfo(np.int32).max
  limits = dict.fromkeys(Measures._fields, (0, most))
  limits |= {
    "modality": (0, len(MODALITIES) - 1),
    "video": (-1, len(columns["videos"]) - 1),
    "source": (0, len(columns["sources"]) - 1),
    "stream": (0, len(columns["streams"]) - 1),
    "pictures": (0, most),
    "held_out": (0, 1),
  }
  for name, (low, high) in limits.items():
    values = columns[name]
    if len(values) and not low <= values.min() <= values.max() <= high:
      at = int(np.argmax((values < low) | (values > high)))
      raise ValueError(f"{name} {at} is {values[at]}, not {low} to {high}")
  duration, modality = columns["duration"], columns["modality"]
  fps = columns["fps"]
  single = (modality == MODALITIES.index("image")) & (columns["images"] == 1)
  video = modality == MODALITIES.index("video")
  held_out = columns["held_out"]
  of_video = np.zeros(len(duration) + 1, np.uint8)  # the last one of no video
  of_video[columns["video"][video]] = held_out[video]
  wrong = {
    f"duration is no number from 0 to {LONGEST:.0f} s": ~(
      np.isnan(duration) | ((duration >= 0) & (duration <= LONGEST))
    ),
    f"fps is no number above 0 and to {_FASTEST:.0f}": ~(
      np.isnan(fps) | ((fps > 0) & (fps <= _FASTEST))
    ),
    "modality and video do not agree": video != (columns["video"] >= 0),
    "width or height of the single image is 0": single
    & (np.minimum(columns["width"], columns["height"]) < 1),
    "a video is held out in one conversation and not in another": video
    & (of_video[columns["video"]] != held_out),
  }
  for what, where in wrong.items():
    if where.any():
      raise ValueError(f"{what}, first at {int(where.argmax())}")


def _pack(names: tuple[str, ...]) -> np.ndarray:
  """Returns names as JSON in bytes.

  An array of str would take as much for each name as for the longest.
  """
  return np.frombuffer(json.dumps(names).encode(), np.uint8)


def _unpack(packed: np.ndarray, kind: str) -> tuple[str, ...]:
  """Reads what `_pack` returned."""
  names = schema.parse_json(packed.tobytes(), kind, remedy="prepare again")
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise ValueError(f"{kind} is {schema.shorten(names)}, not a list of names")
  if len(set(names)) < len(names):
    raise ValueError(f"{kind} has a name twice")
  return tuple(names)
