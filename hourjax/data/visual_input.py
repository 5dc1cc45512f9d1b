"""Visual input of images: their tiles, and the memory that these make.

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


def image_input(
  paths: Sequence[pathlib.Path], spec: RowSpec, single: Single
) -> tuple[Repository, int]:
  """Returns the memory of one or more images, and how many tiles they are.

  No pixels are read: only the size of a single image that is to be tiled is.

  Args:
    paths: of the images.
    spec: of the rows.
    single: how one image is cut, see `SampleOptions`.

  Raises:
    UserError: the size cannot be read.
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
  """Reads the pixels of the tiles that `image_input` counts.

  Args:
    paths: of the images.
    spec: of the rows.
    single: how one image is cut, see `SampleOptions`.

  Raises:
    UserError: an image cannot be read.
  """
  loaded = [images.load_image(path) for path in paths]
  if len(loaded) > 1:
    square = [images.pad_to_square(image) for image in loaded]
    return np.stack([images.resize(x, spec.image_size) for x in square])
  if single == "plain":
    return images.resize(loaded[0], spec.image_size)[None]
  return images.tile_image(loaded[0], spec.image_size)
