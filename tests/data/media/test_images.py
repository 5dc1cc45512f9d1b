import hashlib
import re

import numpy as np
import pytest
from PIL import Image

from hourjax.data.media import images
from hourjax.errors import UserError
from tests import golden_files

PROCESSOR = golden_files.npz("image_processor.npz")
TILES = golden_files.npz("anyres_tiles.npz")


def _noise(height, width):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def _chw(array):
  return np.moveaxis(array, -1, -3)


def _sha(array):
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _processor_input(kind):
  """The frames that a golden result was made from: [n, height, width, 3]."""
  if kind == "video_":
    return PROCESSOR["video_uint8"]
  image = PROCESSOR["image_uint8"][None]
  # The grey image is the first channel.
  return image[..., :1].repeat(3, -1) if kind == "gray_" else image


# --- against golden ---------------------------------------------------------


@pytest.mark.parametrize("key", [k for k in PROCESSOR if "pixel_values" in k])
def test_resize_matches_golden(key):
  kind, size, as_uint8 = re.fullmatch(
    r"(\w+_)?pixel_values_(\d+)(_as_uint8)?", key
  ).groups()
  got = np.stack([images.resize(i, int(size)) for i in _processor_input(kind)])
  if not as_uint8:
    got = images.to_pixels(got)
  np.testing.assert_array_equal(_chw(got), PROCESSOR[key], strict=True)


@pytest.mark.parametrize(
  "key",
  [
    k
    for k in golden_files.meta_of("image_processor.npz")
    if k.startswith("sha256_") and PROCESSOR
  ],
)
def test_pixels_have_golden_hash(key):
  kind = "video_" if "video" in key else None
  got = np.stack([images.resize(i, 384) for i in _processor_input(kind)])
  expected = golden_files.meta_of("image_processor.npz")[key]
  assert _sha(_chw(images.to_pixels(got))) == expected


@pytest.mark.skipif(
  "value_table" not in PROCESSOR, reason=golden_files.NO_GOLDEN
)
def test_value_table():
  table = PROCESSOR["value_table"]
  got = images.to_pixels(np.arange(256, dtype=np.uint8)).reshape(table.shape)
  np.testing.assert_array_equal(got, table, strict=True)


@pytest.mark.parametrize("key", [k for k in TILES if k.startswith("tiles_")])
def test_tiles_match_golden(key):
  name, chosen = re.fullmatch(r"tiles_(\w)_(.*)as_uint8", key).groups()
  tiles = images.tile_image(TILES[f"image_{name}"])
  meta = golden_files.meta_of("anyres_tiles.npz")
  if f"shape_{name}" in meta:
    assert list(_chw(tiles).shape) == meta[f"shape_{name}"]
  if f"sha256_tiles_{name}_float32" in meta:
    digest = _sha(_chw(images.to_pixels(tiles)))
    assert digest == meta[f"sha256_tiles_{name}_float32"]
  rows = [int(i) for i in re.findall(r"\d+", chosen)] or slice(None)
  np.testing.assert_array_equal(_chw(tiles)[rows], TILES[key], strict=True)


@pytest.mark.parametrize("key", [k for k in TILES if k.startswith("pad_")])
def test_padding_matches_golden(key):
  name = re.fullmatch(r"pad_(\w)_as_uint8", key)[1]
  square = images.pad_to_square(TILES[f"image_{name}"])
  got = _chw(images.resize(square, TILES[key].shape[-1]))
  np.testing.assert_array_equal(got, TILES[key], strict=True)


@pytest.mark.parametrize(
  "row",
  golden_files.load_json("anyres_table.json"),
  ids=lambda row: "{}x{}".format(*row["size_wh"]),
)
def test_geometry_matches_golden(row):
  width, height = row["size_wh"]
  best = images.best_resolution(width, height)
  assert list(best) == row["best_resolution_wh"]
  got = images.anyres_geometry(width, height)
  assert [got.grid_w, got.grid_h] == row["grid_wh"]
  assert got.tiles == row["tiles"]
  assert [got.unpadded_h, got.unpadded_w] == row["unpadded_hw"]
  assert got.scale == row["anyres_max_9_times"]
  assert [got.resized_h, got.resized_w] == row["resized_hw"]


@pytest.mark.parametrize(
  "name",
  [
    n for n, m in golden_files.meta().get("files", {}).items() if "grid_wh" in m
  ],
)
def test_geometry_of_tiled_models(name):
  """Cases such as d1: small tiles, as the tiny model has them."""
  meta = golden_files.meta_of(name)
  (width, height), *others = meta["image_sizes"]
  assert not others
  (_, _, side), (_, *resized) = meta["sampling_calls"]
  tile = meta["image_shapes"][0][-1]
  got = images.anyres_geometry(width, height, tile=tile, side=side)
  assert [got.grid_w, got.grid_h] == meta["grid_wh"]
  assert got.tiles == meta["n_tiles"]
  assert [got.resized_h, got.resized_w] == resized


# --- without golden ---------------------------------------------------------


@pytest.mark.parametrize("shape", [(70, 160), (54, 54), (230, 215), (1, 3)])
def test_tiles_are_cut_row_by_row(shape):
  image = _noise(*shape)
  tiles = images.tile_image(image, tile=54)
  geometry = images.anyres_geometry(shape[1], shape[0], tile=54)
  assert tiles.shape == (geometry.tiles, 54, 54, 3)
  np.testing.assert_array_equal(tiles[0], images.resize(image, 54))
  grid = tiles[1:].reshape(geometry.grid_h, geometry.grid_w, 54, 54, 3)
  rows = [np.concatenate(list(row), axis=1) for row in grid]
  whole = np.concatenate(rows, axis=0)
  assert whole[:, whole.any((0, 2))].shape[1] * shape[0] == pytest.approx(
    whole[whole.any((1, 2))].shape[0] * shape[1], rel=0.05
  )


def test_resize_goes_width_first():
  """The order changes the rounding, and Pillow 13 would choose the other."""
  tall = _noise(900, 500)
  wide = Image.fromarray(tall).resize((384, 900), Image.BICUBIC)
  expected = images.resize(np.asarray(wide), 384)
  np.testing.assert_array_equal(images.resize(tall, 384), expected)


def test_pad_to_square_centres_on_grey():
  image = _noise(4, 9)
  square = images.pad_to_square(image)
  assert square.shape == (9, 9, 3)
  np.testing.assert_array_equal(square[2:6], image)
  assert (square[:2] == 127).all() and (square[6:] == 127).all()
  tall = images.pad_to_square(image.swapaxes(0, 1))
  np.testing.assert_array_equal(tall, square.swapaxes(0, 1))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_load_image_gives_rgb(tmp_path, mode):
  path = tmp_path / "a.png"
  image = Image.fromarray(_noise(5, 7)).convert(mode)
  image.save(path)
  got = images.load_image(path)
  assert got.shape == (5, 7, 3) and got.dtype == np.uint8
  np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


def test_bad_images_name_the_file(tmp_path):
  missing = tmp_path / "missing.png"
  with pytest.raises(UserError, match=r"missing\.png.*No such file"):
    images.load_image(missing)
  text = tmp_path / "text.png"
  text.write_text("hello")
  with pytest.raises(UserError, match=r"text\.png is not an image \(5 bytes"):
    images.load_image(text)
  empty = tmp_path / "empty.png"
  empty.touch()
  with pytest.raises(UserError, match=r"empty\.png is not an image \(0 bytes"):
    images.load_image(empty)
  for suffix in ("png", "jpg"):
    cut = tmp_path / f"cut.{suffix}"
    Image.fromarray(_noise(64, 64)).save(cut)
    cut.write_bytes(cut.read_bytes()[:700])
    with pytest.raises(UserError, match=f"cut.{suffix}"):
      images.load_image(cut)
  with pytest.raises(UserError, match="folder"):
    (tmp_path / "folder").mkdir()
    images.load_image(tmp_path / "folder")


def test_too_narrow_image_is_refused():
  with pytest.raises(UserError, match="1 x 3000 pixels is too narrow"):
    images.anyres_geometry(1, 3000)


@pytest.mark.parametrize("size", [(3000, 10), (10, 3000)])
def test_narrow_images_of_which_no_feature_is_left(size):
  with pytest.raises(UserError, match=r"leaves \d+ x \d+ features .* crop it"):
    images.anyres_geometry(*size, tile=64, side=4)
  geometry = images.anyres_geometry(*size)  # odd sides keep one row
  assert min(geometry.unpadded_h, geometry.unpadded_w) == 1
