"""Forgetting: which memory tokens the decoder gets to see (SPEC section 1).

Each function maps a grid of memory tokens to kept indices; nothing else in
the system knows about forgetting. Randomness comes from a generator that the
caller seeds with (seed, epoch, sample).
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from hourjax.data.repository import Grid, Repository
from hourjax.errors import UserError

Spatial = Literal["random", "uniform"]
Temporal = Literal["uniform", "random", "keyframe"]


@dataclasses.dataclass(frozen=True)
class Forgetting:
  """How much is kept: 1 of `ratio` tokens of a frame and of the frames.

  Attributes:
    spatial: "random" draws tokens without replacement; "uniform" keeps every
      second row and column.
    temporal: "uniform" keeps evenly spaced frames, "random" draws them,
      "keyframe" keeps those that differ most from their neighbours.
    ratio: kept share, as its inverse.
    max_frames: at most so many frames are kept.
  """

  spatial: Spatial = "random"
  temporal: Temporal = "uniform"
  ratio: int = 4
  max_frames: int = 512

  def __post_init__(self):
    for name, options in [
      ("spatial", ("random", "uniform")),
      ("temporal", ("uniform", "random", "keyframe")),
    ]:
      value = getattr(self, name)
      if value not in options:
        raise UserError(
          f"forgetting.{name} is {value!r}; choose one of {', '.join(options)}"
        )


def kept_tokens(
  repository: Repository,
  rule: Forgetting,
  rng: np.random.Generator,
  *,
  frame_features: np.ndarray | None = None,
) -> list[np.ndarray]:
  """Kept memory indices for each slot, ascending within each grid, int32.

  Args:
    repository: the memory of one sample.
    rule: what to keep.
    rng: used only by the random rules.
    frame_features: float [F, V], mean tower feature of each shown frame;
      needed by "keyframe".
  """
  kept = []
  for slot in repository.slots:
    grids = []
    for grid in slot:
      frames = np.arange(grid.index.shape[0])
      if grid.temporal:
        frames = kept_frames(len(frames), rule, rng, frame_features)
      cells = kept_cells(grid, len(frames), rule, rng)
      grids.append(keep(grid, frames, cells))
    kept.append(np.concatenate(grids))
  return kept


def keep(grid: Grid, frames: np.ndarray, cells: np.ndarray) -> np.ndarray:
  """Memory indices of chosen cells and the newlines of chosen frames.

  Args:
    grid: F frames of h x w cells.
    frames: int [n] kept frames, ascending.
    cells: int [n, m] kept cells of each kept frame, in row-major numbering.
  """
  flat = grid.index.reshape(grid.index.shape[0], -1)
  tokens = np.take_along_axis(flat[frames], cells, axis=1)
  both = np.concatenate([tokens, grid.newline[frames]], axis=1)
  return np.sort(both, axis=1).reshape(-1).astype(np.int32)


def kept_frames(
  frames: int,
  rule: Forgetting,
  rng: np.random.Generator,
  frame_features: np.ndarray | None = None,
) -> np.ndarray:
  """Frames that temporal forgetting keeps, ascending.

  For 16 frames and ratio 4, "uniform" keeps linspace(0, 15, 4) cut to int:
  [0 5 10 15].
  """
  count = max(1, min(rule.max_frames, frames // rule.ratio))
  if rule.temporal == "random":
    return np.sort(rng.choice(frames, count, replace=False))
  if rule.temporal == "keyframe":
    if frame_features is None:
      raise UserError(
        "forgetting.temporal=keyframe needs stored features; extract the"
        " videos first or choose uniform"
      )
    likeness = neighbour_similarity(frame_features)
    return np.sort(np.argsort(likeness, kind="stable")[:count])
  return np.linspace(0, frames - 1, count).astype(int)


def neighbour_similarity(
  features: np.ndarray, neighbours: int = 8
) -> np.ndarray:
  """Mean cosine similarity of each frame to its `neighbours` nearest frames.

  Args:
    features: float [F, V].
    neighbours: half of them before and half after; fewer at the ends.

  Returns:
    float32 [F].
  """
  x = np.asarray(features, np.float32)
  x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  total, count = np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
  for gap in range(1, neighbours // 2 + 1):
    if gap >= len(x):
      break
    cosine = np.sum(x[gap:] * x[:-gap], axis=1)
    total[gap:] += cosine
    total[:-gap] += cosine
    count[gap:] += 1
    count[:-gap] += 1
  return total / np.maximum(count, 1)


def kept_cells(
  grid: Grid, frames: int, rule: Forgetting, rng: np.random.Generator
) -> np.ndarray:
  """Kept cells of each of `frames` kept frames, ascending, int [frames, m].

  m is ceil(h * w / ratio), or ceil(h / 2) * ceil(w / 2) for "uniform".
  """
  _, high, wide = grid.index.shape
  if rule.spatial == "uniform":
    cells = np.arange(high * wide).reshape(high, wide)[::2, ::2].reshape(-1)
    return np.broadcast_to(cells, (frames, cells.size))
  count = math.ceil(high * wide / rule.ratio)
  order = np.argsort(rng.random((frames, high * wide)), axis=1)
  return np.sort(order[:, :count], axis=1)
