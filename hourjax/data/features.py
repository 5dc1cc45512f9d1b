"""The feature store: one bfloat16 `.npy` a video, and an index.

    ROOT/index.jsonl              {"video", "frames", "duration"} a line
    ROOT/<video name>.npy         [F, Q, V], stored as numpy's two-byte void

A video counts as stored once its line is in the index; the array is renamed
into place before that, so an interrupted run leaves nothing half-written.
"""

import json
import os
import pathlib
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from hourjax.errors import UserError

_INDEX = "index.jsonl"


class Stored(NamedTuple):
  """What the index knows of a video: frames stored and seconds of video."""

  frames: int
  duration: float


class FeatureStore:
  """Reads and writes the features of videos under one folder."""

  def __init__(self, root: str | os.PathLike, *, create: bool = False):
    """Opens a store.

    Raises:
      UserError: if the index is missing (and `create` is False) or broken.
    """
    self.root = pathlib.Path(root)
    self._index: dict[str, Stored] = {}
    path = self.root / _INDEX
    if path.exists():
      self._read_index(path)
    elif not create:
      raise UserError(
        f"{path} does not exist; run `python -m hourjax.extract` first or"
        " correct the feature folder"
      )
    self.root.mkdir(parents=True, exist_ok=True)

  def __contains__(self, video: str) -> bool:
    return video in self._index

  def __len__(self) -> int:
    return len(self._index)

  def stored(self, video: str) -> Stored:
    """Frames and duration of a stored video."""
    return self._index[video]

  def path(self, video: str) -> pathlib.Path:
    """File of a video's features."""
    return self.root / f"{video}.npy"

  def read(
    self, video: str, frames: np.ndarray, shape: tuple[int, int]
  ) -> Shaped[np.ndarray, "F Q V"]:
    """Chosen frames in bfloat16; only their bytes are read.

    Args:
      video: name in the index.
      frames: int [F].
      shape: (Q, V) that the model expects.

    Raises:
      UserError: if the file is missing, truncated, or of another shape.
    """
    path = self.path(video)
    try:
      array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
      raise UserError(
        f"{path} cannot be read ({error}); delete it and its line in"
        f" {_INDEX} and extract the video again"
      ) from None
    expected = (self._index[video].frames, *shape)
    if array.shape != expected or array.dtype.itemsize != 2:
      raise UserError(
        f"{path} holds {array.dtype} {array.shape}, the index and the model"
        f" expect bfloat16 {expected}; extract with this model's tower"
      )
    return np.asarray(array[frames]).view(ml_dtypes.bfloat16)

  def write(
    self, video: str, features: Shaped[np.ndarray, "F Q V"], duration: float
  ) -> None:
    """Stores one video: array first, then its line in the index."""
    path = self.path(video)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
      np.save(file, features.astype(ml_dtypes.bfloat16).view("V2"))
    partial.rename(path)
    entry = Stored(len(features), round(float(duration), 2))
    line = json.dumps({"video": video, **entry._asdict()})
    with open(self.root / _INDEX, "a") as file:
      file.write(line + "\n")
    self._index[video] = entry

  def _read_index(self, path):
    for number, line in enumerate(path.read_text().splitlines(), start=1):
      try:
        raw = json.loads(line)
        self._index[raw["video"]] = Stored(raw["frames"], raw["duration"])
      except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
          f"{path}, line {number} is broken ({error}); delete the line and"
          " extract again"
        ) from None
