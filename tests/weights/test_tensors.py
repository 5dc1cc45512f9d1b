"""safetensors files: read in parts, or refused."""

import json
import os
import pathlib
import struct
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hourjax.errors import UserError
from hourjax.weights import checkpoint, tensors
from hourjax.weights.names import key_table
from hourjax.weights.tensors import TensorReader, aligned, read_header
from tests.weights import folders


def _file(path, header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  path.write_bytes(struct.pack("<Q", length) + text + data)
  return path


def _one(**changes):
  entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
  return {"a": {k: v for k, v in entry.items() if v is not ...}}


@pytest.mark.parametrize(
  "header, data, length",
  [
    (b"", b"", 0),
    (b"{}", b"", 2**60),
    (b"{", b"", None),
    (b"[]", b"", None),
    (b"\xff\xfe", b"", None),
    (b"[" * 50_000, b"", None),
    ({"a": None}, b"", None),
    ({"a": [1]}, b"", None),
    (_one(dtype=3), bytes(8), None),
    (_one(shape=...), bytes(8), None),
    (_one(shape=[-2]), bytes(8), None),
    (_one(shape=["2"]), bytes(8), None),
    (_one(shape=[2.0]), bytes(8), None),
    (_one(shape=[2**62]), bytes(8), None),
    (_one(shape=[3]), bytes(8), None),
    (_one(data_offsets=[0]), bytes(8), None),
    (_one(data_offsets=[8, 0]), bytes(8), None),
    (_one(data_offsets=[4, 12]), bytes(12), None),
    (_one(), bytes(7), None),
    (_one(), bytes(9), None),
    (_one(data_offsets=None), bytes(8), None),
  ],
)
def test_broken_files(tmp_path, header, data, length):
  path = _file(tmp_path / "model.safetensors", header, data, length)
  with pytest.raises(UserError, match="copy it again") as error:
    read_header(path)
  assert str(path) in str(error.value) and len(str(error.value)) < 600


def test_tiny_files_and_pointers(tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(b"abc")
  with pytest.raises(UserError, match="not a readable safetensors file"):
    read_header(path)
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  with pytest.raises(UserError, match="Git-LFS pointer"):
    read_header(path)
  path.unlink()
  with pytest.raises(UserError, match="cannot read"):
    read_header(path)
  path.mkdir()
  with pytest.raises(UserError, match="no regular file"):
    read_header(path)
  os.mkfifo(tmp_path / "pipe")  # whose opening would wait for ever
  with pytest.raises(UserError, match="no regular file"):
    read_header(tmp_path / "pipe")


@pytest.mark.parametrize(
  "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]
)
@pytest.mark.parametrize("target", [np.float32, ml_dtypes.bfloat16])
def test_dtypes(tmp_path, dtype, target):
  values = np.random.default_rng(0).normal(size=(7, 5)).astype(dtype)
  save_file({"a": values}, tmp_path / "x.safetensors")
  with TensorReader(read_header(tmp_path / "x.safetensors")) as reader:
    rows = [rows for _, rows in reader.rows("a", 2, 6, np.dtype(target))]
  np.testing.assert_array_equal(
    np.concatenate(rows), values[2:6].astype(target)
  )


@pytest.mark.parametrize("dtype", [np.int8, np.int64, ml_dtypes.float8_e4m3fn])
def test_dtypes_that_hold_no_weights(tmp_path, dtype):
  folders.save(tmp_path)

  def change(tensors):
    for name in list(tensors):
      if "mlp.up_proj" in name:
        tensors[name] = tensors[name].astype(dtype)

  folders.edit(tmp_path, change)
  message = r"dtype of model\.layers\.\{0\.\.2\}\.mlp\.up_proj\.weight: [IF]"
  with pytest.raises(UserError, match=message):
    folders.load(tmp_path)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
  "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]
)
@pytest.mark.parametrize(
  "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_what_is_not_finite_is_refused(tmp_path, name, dtype, value):
  folders.save(tmp_path)

  def change(tensors):
    tensors[name] = tensors[name].astype(dtype)
    tensors[name].reshape(-1)[-3] = value

  folders.edit(tmp_path, change)
  with pytest.raises(UserError, match=rf"{name} is not finite as .* in 1 of"):
    folders.load(tmp_path)


def test_too_large_for_the_dtype_in_use(tmp_path):
  folders.save(tmp_path)

  def change(tensors):
    tensors["model.norm.weight"] = np.full(16, 1e39)

  folders.edit(tmp_path, change)
  with pytest.raises(UserError, match="not finite as float32 in 16 of 16"):
    folders.load(tmp_path)


@pytest.mark.parametrize("edge", [3e38, -3e38, 0.0, -0.0, 1e-45])
def test_edges_of_what_is_finite(tmp_path, edge):
  folders.save(tmp_path)
  folders.edit(
    tmp_path,
    lambda t: t.update({"model.norm.weight": np.full(16, edge, np.float32)}),
  )
  got = folders.load(tmp_path)["decoder/norm/scale"]
  np.testing.assert_array_equal(got, np.full(16, edge, np.float32))


# --- in parts ----------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 30, 10**6])
def test_any_size_of_blocks(tmp_path, monkeypatch, block):
  monkeypatch.setattr(tensors, "_BLOCK", block)
  monkeypatch.setattr(tensors, "_PATCH", 3)
  folders.assert_drawn(folders.load(folders.save(tmp_path)))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_parts_of_parameters(tmp_path, monkeypatch, dtype):
  """Every layout, split along any of its axes, is that part of the whole."""
  monkeypatch.setattr(tensors, "_BLOCK", 16)
  folders.save(tmp_path)
  whole = folders.load(tmp_path, dtype=dtype)
  found = tensors_of(tmp_path)
  checked = set()
  with TensorReader(found) as reader:
    for entry in key_table(folders.UNTIED):
      for part, path in enumerate(entry.paths):
        shape = whole[path].shape
        for axis, size in enumerate(shape):
          cut = slice(size // 3, size - size // 4)
          index = tuple(
            cut if n == axis else slice(None) for n in range(len(shape))
          )
          got = checkpoint._read(
            entry, part, shape, reader, np.dtype(dtype), lambda _: None, index
          )
          np.testing.assert_array_equal(got, whole[path][index], err_msg=path)
        checked.add(path)
  assert checked == set(whole)


def tensors_of(folder):
  (path,) = folder.glob("model-*.safetensors")
  return read_header(path)


def test_on_a_device_without_a_copy(tmp_path, monkeypatch):
  """The CPU's array is the memory that was read into."""
  folders.save(tmp_path)
  made = []

  def remembered(shape, dtype):
    made.append(aligned(shape, dtype))
    return made[-1]

  monkeypatch.setattr(checkpoint, "aligned", remembered)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  where = dict.fromkeys(folders.shapes(folders.UNTIED), here)
  got = folders.load(tmp_path, shardings=where)
  folders.assert_drawn(got)
  read = {array.ctypes.data for array in made if array.size}
  assert {x.unsafe_buffer_pointer() for x in got.values()} == read


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
  folders.save(tmp_path)
  with TensorReader(tensors_of(tmp_path)) as reader:
    (path,) = tmp_path.glob("model-*.safetensors")
    os.truncate(path, 5000)
    with pytest.raises(UserError, match="it ends before byte"):
      for name in reader.names():
        rows = reader[name].shape[0]
        list(reader.rows(name, 0, rows, np.dtype(np.float32)))


@pytest.mark.slow
def test_several_devices_read_their_parts(tmp_path):
  """And what several of them hold, this process reads once."""
  folders.save(tmp_path)
  done = subprocess.run(
    [sys.executable, "-m", "tests.weights.split", str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=300,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert not done.returncode, done.stderr
  figures = json.loads(done.stdout)
  assert figures["devices"] == 4
  for on in figures["on"]:
    assert on["split"] >= 20
    assert on["read"] == figures["total"]


def test_reading_shows_progress(tmp_path, monkeypatch, capfd):
  folders.save(tmp_path)
  folders.load(tmp_path)
  assert not capfd.readouterr().err  # so little
  monkeypatch.setattr(tensors, "_BAR_BYTES", 0)
  folders.load(tmp_path)
  assert "reading weights" in capfd.readouterr().err
