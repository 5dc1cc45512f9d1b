import io
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageFile

from hourjax.data.media import images
from hourjax.data.media.images import image_size, load_image
from hourjax.errors import UserError

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def _grey(path):
  got = load_image(path)
  assert got.dtype == np.uint8 and (got == got[..., :1]).all()
  assert image_size(path) == (got.shape[1], got.shape[0])
  return got[..., 0]


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bits_become_eight(tmp_path, name):
  values = np.round(RAMP * 65535).astype(np.uint16)
  Image.fromarray(values).save(tmp_path / name)
  got = _grey(tmp_path / name)
  np.testing.assert_array_equal(got, np.arange(256).reshape(16, 16))
  # Dark ones stay dark: the header tells how bright white is.
  for part, brightest in ((16, 16), (512, 0)):
    Image.fromarray(values // part).save(tmp_path / name)
    assert _grey(tmp_path / name).max() == brightest


def test_big_endian_sixteen_bits(tmp_path):
  values = np.round(RAMP * 65535).astype(">u2")
  path = tmp_path / "a.tiff"
  Image.frombytes("I;16B", (16, 16), values.tobytes()).save(path)
  np.testing.assert_array_equal(_grey(path).ravel(), np.arange(256))


def _tiff(values, bits, photometric):
  """A TIFF of one row, as microscopes write it and Pillow cannot."""
  if bits == 12:  # two values in three bytes
    digits = "".join(f"{value:03x}" for value in values)
    data = bytes.fromhex(digits)
  else:
    data = np.asarray(values, "<u2").tobytes()
  tags = [
    *((256, len(values)), (257, 1), (258, bits), (259, 1), (262, photometric)),
    *((273, 8), (277, 1), (278, 1), (279, len(data))),
  ]
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
  head = b"II*\0" + struct.pack("<I", 8 + len(data))
  return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_bits_and_white_of_a_tiff(tmp_path, bits, photometric):
  most = 2**bits - 1
  values = [0, most // 2, most, most // 16]
  path = tmp_path / "a.tiff"
  path.write_bytes(_tiff(values, bits, photometric))
  try:
    got = _grey(path)[0].astype(int)
  except UserError as error:  # Pillow knows no 12 bits of which 0 is white
    assert (bits, photometric) == (12, 0)
    assert str(path) in str(error)
    return
  expected = np.array([0, 127, 255, 16])
  expected = expected if photometric else 255 - expected
  assert abs(got - expected).max() <= 1


DEEP = {
  "floats to 1": (RAMP.astype(np.float32), np.arange(256)),
  "floats to 255": (np.float32(RAMP * 255), np.arange(256)),
  "floats to 65535": (np.float32(RAMP * 65535), np.arange(256)),
  "floats below zero": (np.float32(RAMP * 3 - 1), np.arange(256)),
  "floats beyond": (np.float32(RAMP * 1e9), np.arange(256)),
  "one float": (np.full((16, 16), -7, np.float32), np.zeros(256)),
  "integers to 255": (np.int32(RAMP * 255), np.int32(RAMP * 255)),
  "integers to 65535": (np.int32(np.round(RAMP * 65535)), np.arange(256)),
  "large integers": (
    np.int32(np.round(RAMP * 255) * 2**22),
    np.arange(256),
  ),
  "negative integers": (np.int32(np.round(RAMP * 255)) - 255, np.arange(256)),
}


@pytest.mark.parametrize("name", DEEP)
def test_thirty_two_bits_are_never_cut_off(tmp_path, name):
  values, expected = DEEP[name]
  path = tmp_path / "a.tiff"
  Image.fromarray(values).save(path)
  np.testing.assert_array_equal(_grey(path).ravel(), np.ravel(expected))


def test_pixels_that_are_no_numbers(tmp_path):
  path = tmp_path / "a.tiff"
  Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path)
  with pytest.raises(UserError, match="pixels that are no numbers"):
    load_image(path)


def _colours(width=64, height=48):
  out = np.zeros((height, width, 3), np.uint8)
  out[: height // 2, : width // 2] = (230, 30, 30)
  out[height // 2 :, width // 2 :] = (30, 30, 230)
  return Image.fromarray(out)


def _animated(path):
  rest = [Image.new("RGB", (64, 48))] * 2
  _colours().save(path, save_all=True, append_images=rest, duration=100)


def _palette(path):
  _colours().quantize(8).save(path, transparency=0)


def _turned(path):
  exif = Image.Exif()
  exif[274] = 6
  _colours().save(path, quality=95, exif=exif)


KINDS = {
  "cmyk.jpg": lambda p: _colours().convert("CMYK").save(p, quality=95),
  "cmyk.tiff": lambda p: _colours().convert("CMYK").save(p),
  "animated.gif": _animated,
  "animated.webp": _animated,
  "animated.png": _animated,
  "palette.png": _palette,
  "palette.gif": _palette,
  "turned.jpg": _turned,  # as in training, not applied
  "plain.bmp": lambda p: _colours().save(p),
  "alpha.png": lambda p: _colours().convert("RGBA").save(p),
  "two.avif": lambda p: _colours().save(p, quality=95),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_images(tmp_path, name):
  path = tmp_path / name
  KINDS[name](path)
  got = load_image(path).astype(int)
  assert got.shape == (48, 64, 3) and image_size(path) == (64, 48)
  for (y, x), colour in (
    ((12, 16), (230, 30, 30)),
    ((36, 48), (30, 30, 230)),
    ((12, 48), (0, 0, 0)),
  ):
    assert abs(got[y, x] - colour).max() <= 12


@pytest.mark.parametrize("size", [(1, 1), (4000, 2), (3, 900)])
def test_small_and_thin_images_are_tiled(tmp_path, size):
  path = tmp_path / "a.png"
  _colours(*size).save(path)
  tiles = images.tile_image(load_image(path))
  assert len(tiles) == images.anyres_geometry(*image_size(path)).tiles


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(2000)
NAMED = {
  "phone.jpg": (HEIC, r"unsupported format \(HEIC\).*pip install pillow-heif"),
  "a.svg": (b'<?xml version="1.0"?>\n<svg width="9"/>', r"format \(SVG\)"),
  "page.jpg": (b"\n<!DOCTYPE HTML><p>403", "not an image but a web page"),
  "a.pdf": (b"%PDF-1.7", r"format \(PDF\); save it as"),
  "a.jxl": (b"\xff\x0a" + bytes(9), r"format \(JPEG XL\)"),
  "a.avif": (b"\0\0\0\x1cftypavif" + bytes(9), r"format \(AVIF\)|decode"),
  "a.png": (b"\0\0\0\x20ftypisom" + bytes(9), r"format \(a video\)"),
  "b.png": (b"\x1aE\xdf\xa3" + bytes(9), r"format \(a video\)"),
  "a.cr3": (b"\0\0\0\x18ftypcrx " + bytes(9), r"format \(camera raw\)"),
  "a.psd.jpg": (b"8BPX" + bytes(9), "is not an image"),
  "lfs.png": (b"version https://git-lfs.github.com/spec", "a Git-LFS pointer"),
  "text.png": (b"hello", r"is not an image \(5 bytes"),
  "a.npy": (b"\x93NUMPY" + bytes(90), r"format \(a numpy array\)"),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("read", [load_image, image_size])
def test_what_is_no_image_is_named(tmp_path, monkeypatch, name, read):
  monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
  content, message = NAMED[name]
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    read(tmp_path / name)
  assert str(tmp_path / name) in str(error.value)


def test_heic_is_read_where_the_plugin_is(tmp_path, monkeypatch):
  """The plugin is played by one that knows the first bytes alone."""

  def register():
    class Heif(ImageFile.ImageFile):
      format = "HEIF"

      def _open(self):
        self._size, self._mode = (5, 4), "L"
        self.tile = [ImageFile._Tile("raw", (0, 0, 5, 4), 100, "L")]

    Image.register_open("HEIF", Heif, lambda head: head[4:12] == b"ftypheic")

  plugin = types.SimpleNamespace(register_heif_opener=register)
  monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
  known = (Image.ID.copy(), Image.OPEN.copy())
  path = tmp_path / "renamed.jpg"
  path.write_bytes(HEIC)
  try:
    assert image_size(path) == (5, 4)
    assert load_image(path).shape == (4, 5, 3)
  finally:
    Image.ID[:], Image.OPEN = known


def test_images_that_run_programs_are_refused(tmp_path):
  path = tmp_path / "a.png"
  _colours().save(path, format="EPS")
  with pytest.raises(UserError, match=r"unsupported format \(EPS\)"):
    load_image(path)


def test_bombs_are_refused_by_name(tmp_path, monkeypatch):
  path = tmp_path / "a.png"
  Image.new("1", (200, 100)).save(path)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
  for read in (image_size, load_image):
    with pytest.raises(
      UserError, match=r"a\.png is too large: .*scale it down"
    ):
      read(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damage_is_a_user_error(tmp_path, form):
  content = io.BytesIO()
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 255, (40, 40, 3), np.uint8)
  Image.fromarray(noise).save(content, form)
  content = content.getvalue()
  path = tmp_path / "a.img"
  for _ in range(60):
    damaged = bytearray(content[: rng.integers(4, len(content))])
    for at in rng.integers(0, len(damaged), 6):
      damaged[at] = rng.integers(256)
    path.write_bytes(damaged)
    for read in (image_size, load_image):
      try:
        read(path)
      except UserError as error:
        assert str(path) in str(error)
