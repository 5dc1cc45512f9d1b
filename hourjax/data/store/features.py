"""The feature store: one bfloat16 `.npy` file for each video, and an index.

    ROOT/index-00000.jsonl        {"video", "frames", "duration"} in each line,
                                  and "share" of its frames read if below 1
    ROOT/<video name>.npy         [F, Q, V], stored as numpy's two-byte void
    ROOT/tower.json               fingerprint of the tower that wrote them

ROOT is a folder or a URL such as gs://bucket/folder. Every writing process has
an index of its own (`index-<worker>.jsonl`); readers merge all `index*.jsonl`.
A video is stored once its line is in an index. The array is in place before
that, so an interrupted run leaves no incomplete video. An array without its
line is not used: the video is extracted again, and the array replaced.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, KeysView
from typing import Any

import ml_dtypes
import numpy as np
import pydantic
from jaxtyping import Int, Shaped

from hourjax import schema
from hourjax.atomic_file import TempFiles
from hourjax.data.store.array_file import (
  FeatureWriter,
  Stored,
  header_bytes,
  is_finite,
  parse_header,
)
from hourjax.errors import UserError
from hourjax.jsonl import JsonlWriter, read_rows
from hourjax.storage import Part, is_url, open_storage

# Bytes read at a time: large enough for a bucket, and small enough that the
# check for NaN finds them in the processor's cache.
_BLOCK_BYTES = 1_500_000
TOWER_FILE = "tower.json"
# More than any video has: a wrong line of an index must not take all memory.
MOST_FRAMES, LONGEST = 10**8, 1e7


class FeatureStore:
  """Reads and writes the features of videos under one root; thread-safe."""

  def __init__(
    self,
    root: str | os.PathLike,
    *,
    create: bool = False,
    worker: int | str = 0,
  ):
    """Opens a store.

    Args:
      root: folder or URL.
      create: whether the store may be empty.
      worker: number of this process among those that write, or another label
        for a process that writes arrays but no index.

    Raises:
      UserError: there is no index although `create` is False, the index is
        broken, or the URL cannot be opened.
    """
    self.root = os.fspath(root) if is_url(root) else pathlib.Path(root)
    self.storage = open_storage(root)
    self.temp_files = TempFiles(root, f"{worker:>05}")
    self._index: dict[str, Stored] = {}
    self._share_by_video: dict[str, float] = {}
    keys = [k for k in self.storage.list("index") if k.endswith(".jsonl")]
    if not keys and not create:
      raise UserError(
        f"{root} holds no index*.jsonl; run `python -m hourjax.extract` first"
        " or correct the feature folder"
      )
    for key in keys:
      rows, where = read_rows(self.storage, key), self.storage.location(key)
      for line in (_line(row, where) for row in rows):
        self._index[line.video] = Stored(line.frames, line.duration)
        self._share_by_video[line.video] = line.share
    self._lines = JsonlWriter(self.storage, f"index-{worker:>05}.jsonl")

  def __contains__(self, video: str) -> bool:
    return video in self._index

  def __len__(self) -> int:
    return len(self._index)

  def videos(self) -> KeysView[str]:
    """Returns the names of all stored videos."""
    return self._index.keys()

  def stored(self, video: str) -> Stored:
    """Returns the number of frames and the duration of a stored video.

    Raises:
      KeyError: the video is not in the index.
    """
    return self._index[video]

  def share(self, video: str) -> float:
    """Returns which share of a stored video's frames could be decoded.

    The others are damaged in the file; the features of the nearest frame
    without damage are stored for them.

    Raises:
      KeyError: the video is not in the index.
    """
    return self._share_by_video[video]

  def path(self, video: str) -> pathlib.Path | str:
    """Returns the file or URL of a video's features."""
    return self.storage.location(_key(video))

  def read(
    self, video: str, frames: Int[np.ndarray, "F"], shape: tuple[int, int]
  ) -> Shaped[np.ndarray, "F Q V"]:
    """Reads chosen frames; no bytes of other frames are read.

    Args:
      video: name in the index.
      frames: indices, in any order.
      shape: (Q, V) that the model expects.

    Returns:
      bfloat16 [F, Q, V].

    Raises:
      UserError: as `read_into`.
    """
    out = np.empty((len(frames), *shape), ml_dtypes.bfloat16)
    self.read_into(video, frames, out)
    return out

  def read_into(
    self,
    video: str,
    frames: Int[np.ndarray, "F"],
    out: Shaped[np.ndarray, "F Q V"],
  ) -> None:
    """Fills an array with chosen frames, in place.

    Every value read is checked for NaN and infinity, which costs a quarter of
    the speed of a copy from the page cache (measured: 8.5 instead of 11 GB/s).

    Args:
      video: name in the index.
      frames: indices, in any order.
      out: C-contiguous bfloat16.

    Raises:
      UserError: the file is missing, truncated, of another shape or type than
        the index and `out`, or holds values that are not finite.
      IndexError: the video has no such frame, as the index says.
      ValueError: `out` is not C-contiguous.
    """
    if not out.flags.c_contiguous:
      raise ValueError("out is not C-contiguous, so it cannot be filled")
    count = self._index[video].frames
    if len(frames) and not 0 <= frames.min() <= frames.max() < count:
      raise IndexError(
        f"frames {frames.min()} to {frames.max()} of {video}: it has {count}"
      )
    once, where = np.unique(frames, return_inverse=True)
    try:
      if len(once) < len(frames):
        few = np.empty((len(once), *out.shape[1:]), np.uint16)
        self._fill(video, once, few)
        np.take(few, where, axis=0, out=out.view(np.uint16), mode="clip")
      else:
        self._fill(video, frames, out.view(np.uint16))
    except OSError as error:
      raise UserError(
        f"{self.path(video)} cannot be read ({error}); delete its line in the"
        " index and extract the video again",
        kind="missing" if isinstance(error, FileNotFoundError) else "damaged",
      ) from None

  def writer(
    self, video: str, frames: int, shape: tuple[int, int], duration: float
  ) -> FeatureWriter:
    """Opens a writer for a video whose features arrive in chunks.

    Its `finish` moves the array in place; `record` then adds the video to the
    index.

    Args:
      video: name.
      frames: number of frames that will be added.
      shape: (Q, V) of each frame.
      duration: of the video, in seconds.
    """
    return FeatureWriter(
      self.storage,
      _key(video),
      self.temp_files.new_path(),
      Stored(frames, round(float(duration), 2)),
      shape,
    )

  def record(self, video: str, stored: Stored, share: float = 1.0) -> None:
    """Writes the index line of a video whose array is in place.

    Args:
      video: name.
      stored: frames and duration.
      share: of the frames that could be decoded.
    """
    row = {"video": video, **stored._asdict()}
    self._lines.add(row if share == 1 else row | {"share": share})
    self._index[video], self._share_by_video[video] = stored, share

  def write(
    self, video: str, features: Shaped[np.ndarray, "F Q V"], duration: float
  ) -> None:
    """Stores one video whose features are in memory.

    Args:
      video: name.
      features: of any float type; stored as bfloat16.
      duration: of the video, in seconds.

    Raises:
      UserError: some values are not finite.
    """
    shape = features.shape[1:]
    with self.writer(video, len(features), shape, duration) as writer:
      writer.add(features)
    self.record(video, writer.stored)

  def claim(self, tower: str, shape: tuple[int, int]) -> None:
    """Records which tower writes; a store holds the features of one tower only.

    Args:
      tower: fingerprint of its parameters.
      shape: (Q, V) of a frame.

    Raises:
      UserError: the store holds another tower's features, or does not respond.
    """
    mine = {"tower": tower, "tokens": shape[0], "width": shape[1]}
    theirs: Any = "unreadable"
    try:
      content = self.storage.read(TOWER_FILE)
    except FileNotFoundError:
      self.storage.write(TOWER_FILE, json.dumps(mine).encode())
      return
    except OSError:
      content = b""
    with contextlib.suppress(UserError):
      theirs = schema.parse_json(content, TOWER_FILE, remedy="")
    if theirs != mine:
      raise UserError(
        f"{self.storage.location(TOWER_FILE)} says"
        f" {schema.shorten(theirs, 200)}, this run's tower"
        f" is {mine}; give the same --tower, or another --out"
      )

  def _fill(self, video: str, frames: np.ndarray, out: np.ndarray) -> None:
    """Reads frames, all different, into uint16 [F, Q, V]."""
    shape = (self._index[video].frames, *out.shape[1:])
    header = np.empty(len(header_bytes(shape)), np.uint8)
    end = header.nbytes + 2 * int(np.prod(shape))
    parts = [(0, header), (end - 1, np.empty(1, np.uint8))]
    blocks = list(_blocks(frames, out, header.nbytes))
    filled = self.storage.read_parts(_key(video), parts + blocks)
    next(filled)
    self._check_header(video, header.tobytes(), shape)
    next(filled)  # the last byte, so that a truncated file is always refused
    for (_, block), _ in zip(blocks, filled):
      if not is_finite(block.view(np.uint16)):
        raise UserError(
          f"{self.path(video)} holds NaN or infinite values; delete it and its"
          " line in the index, and extract the video again",
          kind="not_finite",
        )

  def _check_header(
    self, video: str, header: bytes, expected: tuple[int, ...]
  ) -> None:
    """Refuses a file of another shape or type."""
    if header == header_bytes(expected):
      return
    shape, dtype = parse_header(header)
    if (shape, dtype) != (expected, np.dtype("V2")):
      raise UserError(
        f"{self.path(video)} holds {dtype} {shape}, the index and the model"
        f" expect bfloat16 {expected}; extract with this model's tower",
        kind="shape",
      )


def _key(video: str) -> str:
  """Returns the name of a video's array in the storage."""
  return f"{video}.npy"


class _Line(schema.Schema):
  """Describes a line of the index; other keys are ignored."""

  video: schema.FileName
  frames: int = pydantic.Field(ge=0, le=MOST_FRAMES)
  duration: float = pydantic.Field(ge=0, le=LONGEST)
  share: float = pydantic.Field(1.0, ge=0, le=1)


def _line(row: dict, where: str | os.PathLike) -> _Line:
  """Checks a line of the index."""
  return schema.validate(
    _Line,
    row,
    f"{where}: {schema.shorten(row, 200)}",
    remedy="delete the line and extract again",
  )


def _blocks(frames: np.ndarray, out: np.ndarray, start: int) -> Iterator[Part]:
  """Yields the byte offset of each run of frames, and the bytes it fills.

  With two frames a block, frames 3 4 5 9 are read as 3 4, 5, 9.
  """
  if not len(frames):
    return
  rows = out.reshape(len(out), -1).view(np.uint8)
  most = max(1, _BLOCK_BYTES // rows.shape[1])
  breaks = np.flatnonzero(np.diff(frames) != 1) + 1
  for run in np.split(np.arange(len(frames)), breaks):
    for at in range(run[0], run[-1] + 1, most):
      stop = min(at + most, run[-1] + 1)
      offset = start + int(frames[at]) * rows.shape[1]
      yield offset, rows[at:stop].reshape(-1)
