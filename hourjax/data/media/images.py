"""Image files as RGB pixels, and their resizing, padding and tiling.

Files of every usual format and depth are read. As in the published training,
EXIF orientation is not applied, transparency is dropped, and of an animation
only the first frame is read. Unlike there, greyscale of more than 8 bits is
scaled: Pillow clips it at 255, which leaves a white image.

Resizing, padding and tiling give the values of the published training bit for
bit. All of hourjax resizes with Pillow's bicubic filter. Sizes are in pixels.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

from hourjax.data.media import parquet_images
from hourjax.errors import UserError

_REMEDY = "save it as JPEG or PNG"
_HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
# Kinds of files that Pillow does not read, by their first bytes.
_FORMATS = (
  (rb"%PDF-", "PDF"),
  (rb"%!PS", "PostScript"),
  (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
  (rb"....ftyp(?:avi[fs]|mif1.{0,40}avif)", "AVIF"),
  (rb"....ftypcrx|FUJIFILMCCD|II\*\0.{4}CR|IIU\0|IIRO|\0MRM", "camera raw"),
  (rb"....ftyp", "a video"),
  (rb"\x1aE\xdf\xa3|FLV\x01|RIFF....AVI ", "a video"),
  (rb"8BPS", "Photoshop"),
  (rb"\x76\x2f\x31\x01", "OpenEXR"),
  (rb"#\?RADIANCE", "Radiance HDR"),
  (rb"PK\x03\x04", "a zip archive"),
  (rb"\x1f\x8b", "packed with gzip"),
  (rb"\x93NUMPY", "a numpy array"),
)
_SVG = re.compile(rb"<svg[\s>]", re.IGNORECASE)
_PAGE = re.compile(
  rb"\s*(?:<!--.*?-->\s*)?<(?:!doctype html|html)", re.IGNORECASE
)
_LFS = b"version https://git-lfs"
# Pillow hands these to another program, which executes the file's content.
_REFUSED = ("EPS", "WMF")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def load_image(path: str | os.PathLike) -> UInt8[np.ndarray, "height width 3"]:
  """Reads an image as RGB.

  Greyscale of 16 bits becomes v * 255 / 65535, of 12 bits v * 255 / 4095. The
  header of a 32-bit image does not state its range: it is the first of 0 to 1
  (only for floats), 0 to 255 and 0 to 65535 that holds all values, and if none
  does, the range from the lowest value to the highest.

  Args:
    path: of a file, or of an image inside a parquet file.

  Raises:
    UserError: the file is missing, not an image, of an unsupported format, or
      damaged.
  """
  with _opened(path) as image:
    if image.mode in _DEEP:
      grey = _grey(np.asarray(image), _white(image), path)
      return np.repeat(grey[..., None], 3, axis=-1)
    return np.array(image.convert("RGB"))


def image_size(path: str | os.PathLike) -> tuple[int, int]:
  """Returns (width, height) in pixels, read from the header only.

  Raises:
    UserError: the file is missing, not an image, or of an unsupported format.
  """
  with _opened(path) as image:
    return image.size


def _white(image: Image.Image) -> tuple[int, bool]:
  """Returns the value of white, and whether the scale is inverted.

  The value is 0 for images of more than 16 bits, whose range is not in the
  header.
  """
  if image.mode == "I" and image.format in ("PNG", "PPM"):
    return 65535, False  # Pillow's mode for 16 bits of theirs
  tags = getattr(image, "tag_v2", {})
  bits = tags.get(258, (16,))[0] if image.mode.startswith("I;16") else 32
  return (1 << bits) - 1 if bits <= 16 else 0, tags.get(262) == 0


def _grey(
  values: np.ndarray, white: tuple[int, bool], path: str | os.PathLike
) -> UInt8[np.ndarray, "height width"]:
  """Scales greyscale values to 0..255."""
  known, inverted = white
  floats = values.dtype.kind == "f"
  values = values.astype(np.float64)
  if not np.isfinite(values).all():
    raise UserError(
      f"{path} has pixels that are no numbers; {_REMEDY}", kind="damaged"
    )
  low, high = float(values.min()), float(values.max())
  ranges = [known] if known else [1] * floats + [255, 65535]
  for most in ranges:
    if low >= 0 and high <= most:
      low, high = 0.0, float(most)
      break
  scaled = (values - low) * (255 / (high - low or 1))
  grey = np.floor(scaled + 0.5).astype(np.uint8)
  return 255 - grey if inverted else grey


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
  """Opens an image; every error of the block inside becomes a UserError."""
  source: str | os.PathLike | io.BytesIO = path
  if parquet_images.inside(path):
    source = io.BytesIO(parquet_images.read(path))
  try:
    with _identified(source, path) as image:
      if image.format in _REFUSED:
        raise _unsupported(path, image.format)
      yield image
  except UserError:
    raise
  except Image.DecompressionBombError as error:
    raise UserError(f"{path} is too large: {error}; scale it down") from error
  except OSError as error:
    reason = error.strerror or str(error)
    kind = "missing" if isinstance(error, FileNotFoundError) else "damaged"
    raise UserError(f"cannot read image {path}: {reason}", kind=kind) from error
  except Exception as error:  # PIL raises many kinds on damaged files
    remedy = "fetch it again"
    if "MAX_TEXT" in str(error):
      remedy = "save it without its comments"
    raise UserError(
      f"cannot decode image {path}: {error or type(error).__name__}; {remedy}",
      kind="damaged",
    ) from error


def _identified(
  source: str | os.PathLike | io.BytesIO, path: str | os.PathLike
) -> Image.Image:
  """Opens an image with Pillow, or raises a UserError that names its format."""
  try:
    return Image.open(source)
  except UnidentifiedImageError as error:
    head, size = _head(source)
    brands = head[8:64] if head[4:8] == b"ftyp" else b""
    if brands[:4] in _HEIF and b"avif" not in brands:
      if not _heif():
        raise _unsupported(
          path, "HEIC", "or install pillow-heif: pip install pillow-heif"
        ) from error
      return Image.open(source)  # Pillow now has the HEIC plugin
    if head.startswith(_LFS):
      raise UserError(
        f"{path} is a Git-LFS pointer, not the image itself; fetch it with"
        " `git lfs pull`, or download it again",
        kind="damaged",
      ) from error
    if _PAGE.match(head):
      raise UserError(
        f"{path} is not an image but a web page ({size} bytes); fetch it again",
        kind="damaged",
      ) from error
    if _SVG.search(head):
      raise _unsupported(path, "SVG") from error
    for pattern, name in _FORMATS:
      if re.match(pattern, head, re.DOTALL):
        raise _unsupported(path, name) from error
    raise UserError(
      f"{path} is not an image ({size} bytes); fetch it again", kind="damaged"
    ) from error


def _unsupported(
  path: str | os.PathLike, name: str, more: str = ""
) -> UserError:
  """Returns the error of an image in a format that is not read."""
  remedy = f"{_REMEDY}, {more}" if more else _REMEDY
  return UserError(
    f"{path} is of an unsupported format ({name}); {remedy}", kind="unsupported"
  )


def _head(source: str | os.PathLike | io.BytesIO) -> tuple[bytes, int]:
  """Reads the first bytes of a file, and how many it has."""
  if isinstance(source, io.BytesIO):
    content = source.getvalue()
    return content[:2048], len(content)
  with open(source, "rb") as file:
    return file.read(2048), os.path.getsize(source)


def _heif() -> bool:
  """Registers Pillow's HEIC plugin; returns whether it is installed."""
  try:
    import pillow_heif  # optional, and seldom needed
  except ImportError:
    return False
  pillow_heif.register_heif_opener()
  return True


# SigLIP's processor: x / 255, then mean 0.5 and deviation 0.5. Written in its
# order of float64 and float32 operations, since the values must be the same.
_VALUES = (
  (np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)
) / np.float32(0.5)

_MEAN_COLOUR = int(0.5 * 255)  # 127: the processor's mean, cut to an integer


@dataclasses.dataclass(frozen=True)
class AnyresGeometry:
  """Describes how an image is tiled, and which of its features are kept.

  Attributes:
    grid_w: tiles from left to right.
    grid_h: tiles from top to bottom.
    tiles: all tiles, the base tile (the whole image) included.
    unpadded_h: rows of features without the padding.
    unpadded_w: columns of features without the padding.
    scale: sqrt(features / features of `max_tiles` tiles).
    resized_h: rows after scaling down, which happens where scale > 1.1.
    resized_w: columns after scaling down.
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
  image: UInt8[np.ndarray, "height width 3"], size: int | tuple[int, int]
) -> UInt8[np.ndarray, "new_height new_width 3"]:
  """Resizes an image (bicubic), without keeping the aspect ratio.

  Args:
    image: uint8 RGB.
    size: side of a square, or width and height, in pixels.
  """
  width, height = (size, size) if isinstance(size, int) else size
  return _resize(image, width, height)


def to_pixels(image: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
  """Scales pixel values from 0..255 to [-1, 1], as SigLIP expects them."""
  return _VALUES[image]


def pad_to_square(
  image: UInt8[np.ndarray, "height width 3"],
) -> UInt8[np.ndarray, "side side 3"]:
  """Centres an image on a grey square, as done for one image among several."""
  height, width = image.shape[:2]
  side = max(height, width)
  return _centred(image, side, side, _MEAN_COLOUR)


def best_resolution(
  width: int, height: int, tile: int = 384, max_grid: int = 6
) -> tuple[int, int]:
  """Returns the (width, height) in whole tiles that fits an image best.

  The best grid keeps most of the image's pixels; among those it has the fewest
  pixels of padding; among equals it comes first in the order 1x1, 1x2, ..., 6x6
  (width first).

  Args:
    width: of the image, in pixels.
    height: of the image, in pixels.
    tile: side of a tile, in pixels.
    max_grid: the most tiles along a side.

  Raises:
    UserError: the image is so narrow that no pixel is left in any grid.
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
  """Computes the tiles and features of an image (`anyres_max_9`).

  See hourjax/README.md, Images. Grids are 1x1 to 6x6. Example of 640 x 480: 2 x
  2 tiles give 54 x 54 features. The image is wider than that grid, so all 54
  columns stay; int(480 * 54 / 640) = 40 rows belong to the image, and 14 // 2 =
  7 rows are cut off above and below, which leaves 40 x 54 features.

  Args:
    width: of the image, in pixels.
    height: of the image, in pixels.
    tile: side of a tile, in pixels.
    side: features along the side of a tile.
    max_tiles: an image of more features than these tiles have is scaled down.

  Raises:
    UserError: as `best_resolution`; also if no feature of the image is left,
      as of very narrow images with few features in each tile.
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
  """Cuts an image into tiles: first the whole image as one, then row by row.

  For the row-by-row tiles the image is scaled to fit its best resolution and
  centred on black.

  Raises:
    UserError: as `best_resolution`.
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
  """Resizes with Pillow's bicubic filter, width first and then height."""
  if image.shape[:2] == (height, width):
    return image  # PIL would return an equal copy
  # Width first, then height: the order of every Pillow before 13, and hence of
  # the published training. Pillow 13 may choose the other order, which changes
  # 7 % of the values (https://github.com/python-pillow/Pillow/pull/9549).
  bicubic = Image.Resampling.BICUBIC
  wide = Image.fromarray(image).resize((width, image.shape[0]), bicubic)
  return np.asarray(wide.resize((width, height), bicubic))


def _centred(
  image: np.ndarray, width: int, height: int, colour: int
) -> np.ndarray:
  """Returns the image centred on a canvas of one grey value."""
  h, w = image.shape[:2]
  top, left = (height - h) // 2, (width - w) // 2
  canvas = np.full((height, width, 3), colour, np.uint8)
  canvas[top : top + h, left : left + w] = image
  return canvas
