"""The memory repository: where every memory token of a sample comes from.

Visual tokens of a sample are numbered as its encoder delivers them: frame by
frame (or tile by tile), and row by row within each. The functions here lay them
out as the memory, one function for each modality; they compute indices alone.
See hourjax/README.md, Memory repository.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from hourjax.data.media.frame_rules import MIN_FRAMES
from hourjax.data.media.images import AnyresGeometry

NEWLINE = -1  # the source of a newline token


@dataclasses.dataclass(frozen=True)
class Grid:
  """Holds memory tokens among which forgetting chooses.

  Attributes:
    index: int32 [F, h, w] indices into the memory.
    newline: int32 [F, n] newline tokens: one that stays with each frame, or
      one for each row (n = h), which stays where a token of the row does, or
      none.
    temporal: whether whole frames are forgotten too (videos).
  """

  index: np.ndarray
  newline: np.ndarray
  temporal: bool = False


@dataclasses.dataclass(frozen=True)
class Repository:
  """Describes the memory of one sample.

  Attributes:
    source: int32 [S], for each memory token the number of its visual token,
      NEWLINE, or `visual` + r for blended token r.
    position: int32 [S] for RoPE.
    slots: for each `<image>` in the text, the grids behind it.
    visual: number of visual tokens that the sample brings.
    blend_source: int32 [R, 4], the visual tokens that each blended token
      mixes.
    blend_weight: float32 [R, 4], how much of each.
    attended: bool [S], whether MemAug's queries attend to a memory token; None
      if to all (see `memory_options`).
  """

  source: np.ndarray
  position: np.ndarray
  slots: tuple[tuple[Grid, ...], ...]
  visual: int
  blend_source: np.ndarray
  blend_weight: np.ndarray
  attended: np.ndarray | None = None


_NO_BLENDS = (np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32))


def empty_repository() -> Repository:
  """Returns the memory of a text: no tokens, no slot."""
  none = np.zeros(0, np.int32)
  return Repository(none, none, (), 0, *_NO_BLENDS)


def repeated_frames(frames: int) -> np.ndarray:
  """Returns int32 frame indices, repeated to MIN_FRAMES if there are fewer.

  The official code cuts linspace to int. If MIN_FRAMES were 4, two frames
  would give linspace(0, 1, 4) = 0 0.33 0.67 1, cut to 0 0 0 1.
  """
  if frames >= MIN_FRAMES:
    return np.arange(frames, dtype=np.int32)
  return np.linspace(0, frames - 1, MIN_FRAMES).astype(np.int32)


def video_repository(frames: int, side: int) -> Repository:
  """Lays out a video: for each frame side x side tokens and a newline.

  Positions are 0, 1, 2, ... With side 1 and two frames (if they were not
  repeated):

      source    0 -1  1 -1      frame 0, newline, frame 1, newline
      position  0  1  2  3
      grid.index [[[0]] [[2]]]  grid.newline [[1] [3]]

  Args:
    frames: frames that the video brings (before the repetition).
    side: tokens along one side of a pooled frame.
  """
  tokens = side * side
  repeated = repeated_frames(frames)
  # [F, tokens + 1]: the last column is made too long, for the newlines.
  source = repeated[:, None] * tokens + np.arange(tokens + 1, dtype=np.int32)
  source[:, -1] = NEWLINE
  size = source.size
  index = np.arange(size, dtype=np.int32).reshape(source.shape)
  grid = Grid(index[:, :-1].reshape(-1, side, side), index[:, -1:], True)
  position = np.arange(size, dtype=np.int32)
  return Repository(
    source.reshape(-1), position, ((grid,),), frames * tokens, *_NO_BLENDS
  )


def images_repository(images: int, side: int) -> Repository:
  """Lays out untiled images: side x side tokens and a newline each.

  Tokens are numbered through all images, and every newline has the position
  after the last of them. Each image is behind its own `<image>`. Two images of
  1 token each:

      source    0 -1  1 -1
      position  0  2  1  2
  """
  tokens = side * side
  source = np.arange(images * tokens, dtype=np.int32).reshape(images, tokens)
  ends = np.full((images, 1), NEWLINE, np.int32)
  position = np.concatenate([source, ends * 0 + images * tokens], axis=1)
  index = np.arange(position.size, dtype=np.int32).reshape(position.shape)
  slots = tuple(
    (Grid(row[None, :-1].reshape(1, side, side), row[None, -1:]),)
    for row in index
  )
  return Repository(
    np.concatenate([source, ends], axis=1).reshape(-1),
    position.reshape(-1),
    slots,
    images * tokens,
    *_NO_BLENDS,
  )


def tiled_repository(geometry: AnyresGeometry, side: int) -> Repository:
  """Lays out one image as a base tile and a grid of tiles.

  The base tile's tokens come first, at the positions of the nearest tokens of
  the unpadded (and scaled-down) grid; then the grid row by row, a newline
  after each row, all newlines at the position after the grid's last token.
  See hourjax/README.md, Images. With side 1 and a grid of 1 x 2 tiles:

      source    0   1  2 -1    the base tile, two tiles, newline
      position  0   0  1  2

  Args:
    geometry: of the tiles.
    side: tokens along one side of a tile.
  """
  tokens = side * side
  high, wide = geometry.resized_h, geometry.resized_w
  cells = np.arange(high * wide, dtype=np.int32).reshape(high, wide)
  nearest_row, nearest_column = (
    nearest_positions(n, side) for n in (high, wide)
  )
  base_position = cells[nearest_row][:, nearest_column].reshape(-1)
  visual = geometry.tiles * tokens
  grid_source = _unpadded_sources(geometry, side)
  blends = _NO_BLENDS
  if grid_source.shape != (high, wide):
    blends = _bilinear(grid_source, high, wide)
    grid_source = visual + cells  # every cell is a blended token
  ends = np.full((high, 1), NEWLINE, np.int32)
  rows = np.concatenate([grid_source, ends], axis=1)
  positions = np.concatenate([cells, ends * 0 + high * wide], axis=1)
  index = tokens + np.arange(rows.size, dtype=np.int32).reshape(rows.shape)
  base = np.arange(tokens, dtype=np.int32)
  return Repository(
    np.concatenate([base, rows.reshape(-1)]),
    np.concatenate([base_position, positions.reshape(-1)]),
    (
      (
        Grid(base.reshape(1, side, side), np.zeros((1, 0), np.int32)),
        Grid(index[None, :, :-1], index[None, :, -1]),
      ),
    ),
    visual,
    *blends,
  )


def nearest_positions(length: int, side: int) -> np.ndarray:
  """Returns round(linspace(0, length - 1, side)) as torch computes it.

  torch steps in float32 from both ends towards the middle, and halves are
  rounded to even. For length 3 and side 2 this is [0 2].

  Returns:
    int64 [side].
  """
  if side == 1:
    return np.zeros(1, np.int64)
  end = np.float32(length - 1)
  step = end / np.float32(side - 1)
  i = np.arange(side, dtype=np.float32)
  up, down = step * i, end - step * (np.float32(side - 1) - i)
  line = np.where(np.arange(side) < side // 2, up, down)
  return np.rint(line).astype(np.int64)


def _unpadded_sources(geometry: AnyresGeometry, side: int) -> np.ndarray:
  """Returns the visual token of each cell of the unpadded grid, int32 [h, w].

  The grid of tiles without what was padded at its borders. Tile 0 is the base
  tile; with side 2 and a grid of 1 x 2 tiles of which one row is left, cells
  are the tokens [4 5 8 9]: the upper halves of tiles 1 and 2.
  """
  high, wide = geometry.grid_h * side, geometry.grid_w * side
  y = np.arange(geometry.unpadded_h) + (high - geometry.unpadded_h) // 2
  x = np.arange(geometry.unpadded_w) + (wide - geometry.unpadded_w) // 2
  tile = 1 + (y // side)[:, None] * geometry.grid_w + (x // side)[None, :]
  within = (y % side)[:, None] * side + (x % side)[None, :]
  return (tile * side * side + within).astype(np.int32)


def _bilinear(
  source: Int32[np.ndarray, "h w"], high: int, wide: int
) -> tuple[Int32[np.ndarray, "R 4"], Float32[np.ndarray, "R 4"]]:
  """Returns sources and weights of a grid that is scaled to high x wide.

  Each of the R = high * wide cells mixes the four tokens around its centre.
  """
  y0, y1, fy = _interpolation(source.shape[0], high)
  x0, x1, fx = _interpolation(source.shape[1], wide)
  corners = [(y0, x0), (y0, x1), (y1, x0), (y1, x1)]
  sources = np.stack([source[np.ix_(y, x)] for y, x in corners], axis=-1)
  weights = np.stack(
    [np.outer(a, b) for a in (1 - fy, fy) for b in (1 - fx, fx)], axis=-1
  )
  return sources.reshape(-1, 4), weights.reshape(-1, 4).astype(np.float32)


def _interpolation(
  old: int, new: int
) -> tuple[
  Int64[np.ndarray, "n"], Int64[np.ndarray, "n"], Float64[np.ndarray, "n"]
]:
  """Returns lower neighbour, upper neighbour and the upper one's weight.

  Along one side, with half-pixel centres. From 4 cells to 2, the new cells lie
  at 0.5 and 2.5: neighbours [0 2] and [1 3], weights [0.5 0.5].
  """
  # In float32 steps, as torch does. In float64 the difference to the official
  # numbers would be larger than that of the whole model.
  at = (np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5
  at = np.clip(at, 0, old - 1)
  low = np.floor(at).astype(int)
  return low, np.minimum(low + 1, old - 1), at - low
