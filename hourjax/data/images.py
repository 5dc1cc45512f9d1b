"""Images: resizing, padding and tiling, bit for bit as in training.

Sizes are in pixels. The one resize of the whole system is PIL's bicubic one.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from hourjax.data.image_files import image_size, load_image
from hourjax.errors import UserError

__all__ = ["image_size", "load_image"]  # read from files

# SigLIP's processor: x / 255, then mean 0.5 and deviation 0.5. Written in its
# order of float64 and float32 operations, since the values must be the same.
_VALUES = (
  (np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)
) / np.float32(0.5)

_MEAN_COLOUR = int(0.5 * 255)  # 127: the processor's mean, cut to an integer


@dataclasses.dataclass(frozen=True)
class AnyresGeometry:
  """How an image is tiled and what is left of its grid of features.

  Attributes:
    grid_w: tiles from left to right.
    grid_h: tiles from top to bottom.
    tiles: all tiles, the base tile (the whole image) included.
    unpadded_h: rows of features once the padding is cut off.
    unpadded_w: columns likewise.
    scale: sqrt(features / features of `max_tiles` tiles).
    resized_h: rows after scaling down, which happens where scale > 1.1.
    resized_w: columns likewise.
  """

  grid_w: int
  grid_h: int
  tiles: int
  unpadded_h: int
  unpadded_w: int
  scale: float
  resized_h: int
  resized_w: int


def resize(
  image: UInt8[np.ndarray, "height width 3"], size: int
) -> UInt8[np.ndarray, "size size 3"]:
  """Bicubic, straight to a square; the aspect ratio is not kept."""
  return _resize(image, size, size)


def to_pixels(image: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
  """0..255 to [-1, 1], as SigLIP expects it."""
  return _VALUES[image]


def pad_to_square(
  image: UInt8[np.ndarray, "height width 3"],
) -> UInt8[np.ndarray, "side side 3"]:
  """Centres the image on a grey square; for one image among several."""
  height, width = image.shape[:2]
  side = max(height, width)
  return _centred(image, side, side, _MEAN_COLOUR)


def best_resolution(
  width: int, height: int, tile: int = 384, max_grid: int = 6
) -> tuple[int, int]:
  """The (width, height), in whole tiles, that shows an image best.

  Best is what keeps most of the image's pixels, then what wastes fewest. Of
  equals the first counts, in the order 1x1, 1x2, ..., 6x6 (width first).

  Raises:
    UserError: the image is so narrow that it vanishes in every grid.
  """
  best, best_kept, least_wasted = None, 0, math.inf
  steps = [tile * n for n in range(1, max_grid + 1)]
  for w, h in ((w, h) for w in steps for h in steps):
    scale = min(w / width, h / height)
    scaled = int(width * scale) * int(height * scale)
    kept = min(scaled, width * height)
    wasted = w * h - kept
    if kept > best_kept or (kept == best_kept and wasted < least_wasted):
      best_kept, least_wasted = kept, wasted
      best = (w, h) if kept else None
  if best is None:
    raise UserError(
      f"an image of {width} x {height} pixels is too narrow for {max_grid} x "
      f"{max_grid} tiles of {tile}; crop it"
    )
  return best


def anyres_geometry(
  width: int,
  height: int,
  tile: int = 384,
  side: int = 27,
  max_tiles: int = 9,
) -> AnyresGeometry:
  """The tiles and features of an image (`anyres_max_9`, grids 1x1 to 6x6).

  A worked example, 640 x 480: 2 x 2 tiles give 54 x 54 features; the image is
  wider than that, so 54 columns stay, int(480 * 54 / 640) = 40 rows are image
  and 14 // 2 = 7 rows are cut off above and below: 40 x 54.

  Args:
    width: of the image, in pixels.
    height: of the image, in pixels.
    tile: side of a tile, in pixels.
    side: features along the side of a tile.
    max_tiles: more features than these tiles have are scaled down.

  Raises:
    UserError: see `best_resolution`; also where no feature of the image is
      left, which only few features a tile and very narrow images bring about.
  """
  best_w, best_h = best_resolution(width, height, tile)
  grid_w, grid_h = best_w // tile, best_h // tile
  rows, columns = grid_h * side, grid_w * side
  # Halves of the padding are cut, so an odd row of padding stays.
  if width / height > columns / rows:
    rows -= (rows - int(height * (columns / width))) // 2 * 2
  else:
    columns -= (columns - int(width * (rows / height))) // 2 * 2
  if not rows or not columns:
    raise UserError(
      f"an image of {width} x {height} pixels leaves {columns} x {rows}"
      f" features of its {grid_w} x {grid_h} tiles; crop it"
    )
  scale = math.sqrt(rows * columns / (max_tiles * side**2))
  shrink = scale > 1.1
  return AnyresGeometry(
    grid_w=grid_w,
    grid_h=grid_h,
    tiles=1 + grid_w * grid_h,
    unpadded_h=rows,
    unpadded_w=columns,
    scale=scale,
    resized_h=int(rows // scale) if shrink else rows,
    resized_w=int(columns // scale) if shrink else columns,
  )


def tile_image(
  image: UInt8[np.ndarray, "height width 3"], tile: int = 384
) -> UInt8[np.ndarray, "tiles tile tile 3"]:
  """The whole image as one tile, then its tiles row by row.

  For the latter the image is scaled to fit its best resolution and centred on
  black.

  Raises:
    UserError: see `best_resolution`.
  """
  height, width = image.shape[:2]
  best_w, best_h = best_resolution(width, height, tile)
  scale_w, scale_h = best_w / width, best_h / height
  if scale_w < scale_h:
    new_w, new_h = best_w, min(math.ceil(height * scale_w), best_h)
  else:
    new_w, new_h = min(math.ceil(width * scale_h), best_w), best_h
  canvas = _centred(_resize(image, new_w, new_h), best_w, best_h, 0)
  grid_h, grid_w = best_h // tile, best_w // tile
  # [gh*tile, gw*tile, 3] -> [gh, tile, gw, tile, 3] -> [gh*gw, tile, tile, 3]
  tiles = canvas.reshape(grid_h, tile, grid_w, tile, 3).swapaxes(1, 2)
  tiles = tiles.reshape(-1, tile, tile, 3)
  return np.concatenate([resize(image, tile)[None], tiles])


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
  if image.shape[:2] == (height, width):
    return image  # PIL would return an equal copy
  # Width first, then height: the order of every Pillow before 13, and hence of
  # the published training. Pillow 13 may choose the other order, which changes
  # 7 % of the values (https://github.com/python-pillow/Pillow/pull/9549).
  wide = Image.fromarray(image).resize((width, image.shape[0]), Image.BICUBIC)
  return np.asarray(wide.resize((width, height), Image.BICUBIC))


def _centred(
  image: np.ndarray, width: int, height: int, colour: int
) -> np.ndarray:
  h, w = image.shape[:2]
  top, left = (height - h) // 2, (width - w) // 2
  canvas = np.full((height, width, 3), colour, np.uint8)
  canvas[top : top + h, left : left + w] = image
  return canvas
