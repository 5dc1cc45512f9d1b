"""Image files to pixels, whatever their format and depth.

As in training, EXIF orientation is not applied, transparency is dropped, and of
an animation the first picture counts. Unlike there, greyscale of more than 8
bits is scaled: Pillow cuts it off at 255, which leaves white.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from hourjax.data import parquet_images
from hourjax.errors import UserError

_REMEDY = "save it as JPEG or PNG"
_HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
# What a file that is no image for Pillow is, by its first bytes.
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
# Pillow hands these to another program, which runs what the file says.
_REFUSED = ("EPS", "WMF")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def load_image(path: str | os.PathLike) -> UInt8[np.ndarray, "height width 3"]:
  """Reads an image as RGB.

  Greyscale of 16 bits becomes v * 255 / 65535, of 12 bits v * 255 / 4095. One
  of 32 bits, whose range no header tells, is taken as 0 to 1 (floats alone), 0
  to 255 or 0 to 65535, the first that holds all its values, or else from its
  lowest to its highest.

  Args:
    path: of a file, or of an image inside a parquet file.

  Raises:
    UserError: missing, not an image, of an unsupported format, or damaged.
  """
  with _opened(path) as image:
    if image.mode in _DEEP:
      grey = _grey(np.asarray(image), _white(image), path)
      return np.repeat(grey[..., None], 3, axis=-1)
    return np.array(image.convert("RGB"))


def image_size(path: str | os.PathLike) -> tuple[int, int]:
  """(width, height) in pixels, from the header alone.

  Raises:
    UserError: missing, not an image, or of an unsupported format.
  """
  with _opened(path) as image:
    return image.size


def _white(image: Image.Image) -> tuple[int, bool]:
  """The highest value of 16 bits or fewer, 0 where no header tells it; and
  whether 0 is white.
  """
  if image.mode == "I" and image.format in ("PNG", "PPM"):
    return 65535, False  # Pillow's mode for 16 bits of theirs
  tags = getattr(image, "tag_v2", {})
  bits = tags.get(258, (16,))[0] if image.mode.startswith("I;16") else 32
  return (1 << bits) - 1 if bits <= 16 else 0, tags.get(262) == 0


def _grey(
  values: np.ndarray, white: tuple[int, bool], path
) -> UInt8[np.ndarray, "height width"]:
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
def _opened(path) -> Iterator[Image.Image]:
  """An image file; what goes wrong inside becomes a UserError."""
  source = path
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


def _identified(source, path) -> Image.Image:
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
      return Image.open(source)  # known now
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


def _unsupported(path, name: str, more: str = "") -> UserError:
  remedy = f"{_REMEDY}, {more}" if more else _REMEDY
  return UserError(
    f"{path} is of an unsupported format ({name}); {remedy}", kind="unsupported"
  )


def _head(source) -> tuple[bytes, int]:
  """The first bytes of a file, and how many it has."""
  if isinstance(source, io.BytesIO):
    content = source.getvalue()
    return content[:2048], len(content)
  with open(source, "rb") as file:
    return file.read(2048), os.path.getsize(source)


def _heif() -> bool:
  """Makes Pillow read HEIC where its plugin is installed."""
  try:
    import pillow_heif  # optional, and seldom needed
  except ImportError:
    return False
  pillow_heif.register_heif_opener()
  return True
