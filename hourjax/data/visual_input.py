"""What a sample shows: its memory repository and its visual input.

The one place that turns images into tiles and squares; videos come as stored
features or frames.
"""

import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from hourjax.data.media import images
from hourjax.data.repository import (
  Repository,
  images_repository,
  tiled_repository,
)
from hourjax.data.rows import RowSpec

Single = Literal["tiled", "plain"]


def images_shown(
  paths: Sequence[pathlib.Path], spec: RowSpec, single: Single
) -> tuple[Repository, int]:
  """Memory of one or more images, and how many tiles they are.

  Only the size of a single image that is to be tiled is read.

  Raises:
    UserError: it cannot be read.
  """
  side = round(spec.tile_tokens**0.5)
  if len(paths) > 1 or single == "plain":
    return images_repository(len(paths), side), len(paths)
  width, height = images.image_size(paths[0])
  geometry = images.anyres_geometry(
    width, height, tile=spec.image_size, side=side
  )
  return tiled_repository(geometry, side), geometry.tiles


def read_images(
  paths: Sequence[pathlib.Path], spec: RowSpec, single: Single
) -> UInt8[np.ndarray, "tiles h w 3"]:
  """Pixels of what `images_shown` counts.

  Raises:
    UserError: an image cannot be read.
  """
  pictures = [images.load_image(path) for path in paths]
  if len(pictures) > 1:
    square = [images.pad_to_square(picture) for picture in pictures]
    return np.stack([images.resize(p, spec.image_size) for p in square])
  if single == "plain":
    return images.resize(pictures[0], spec.image_size)[None]
  return images.tile_image(pictures[0], spec.image_size)
