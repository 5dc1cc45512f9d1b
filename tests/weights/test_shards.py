"""Files in shards: their layout from shapes alone, and what is in them."""

import json
import math
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from hourjax.errors import UserError
from hourjax.models.config import SIZES
from hourjax.weights.folder import INDEX
from hourjax.weights.names import key_table
from hourjax.weights.shards import SHARD_BYTES, ShardWriter, layout
from tests import golden_files, official
from tests.weights import folders

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
REAL = golden_files.load_json("params_real.json") or {"shapes": {}}
SMALL = folders.UNTIED


@pytest.mark.parametrize("name", REAL["shapes"])
def test_layout_of_the_published_models(name):
  """Names and shapes are the official ones; no weights are made."""
  config = SIZES[next(size for size in SIZES if size in name)]
  shapes = folders.shapes(config)
  dtypes = dict.fromkeys(shapes, BFLOAT16)
  places = layout(key_table(config), shapes, dtypes)
  expected = dict(REAL["shapes"][name])
  if config.decoder.tied:
    # In the state dict twice, in the files once: transformers ties them.
    assert REAL["totals"][name]["lm_head_tied_to_embed_tokens"]
    del expected["lm_head.weight"]
  assert {n: list(p.shape) for n, p in places.items()} == expected
  total = REAL["totals"][name]["counts"]["total"]
  assert sum(place.nbytes for place in places.values()) == 2 * total
  sizes = {}
  for place in places.values():
    # Without a gap, in the order of the table.
    assert place.start == sizes.get(place.file, 0)
    sizes[place.file] = place.start + place.nbytes
  count = len(sizes)
  assert count == math.ceil(2 * total / SHARD_BYTES)
  assert max(sizes.values()) <= SHARD_BYTES
  assert list(sizes) == [
    f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
  ]


def test_layers_lie_together():
  shapes = folders.shapes(SMALL)
  dtypes = dict.fromkeys(shapes, BFLOAT16)
  names = list(layout(key_table(SMALL), shapes, dtypes))
  layers = [
    int(name.split(".")[2]) for name in names if name.startswith("model.layers")
  ]
  assert layers == sorted(layers) and set(layers) == {0, 1, 2}


def _write(folder, params, config=SMALL, dtype=np.float32, **options):
  shapes = {path: value.shape for path, value in params.items()}
  dtypes = dict.fromkeys(shapes, np.dtype(dtype))
  folder.mkdir(exist_ok=True)
  return ShardWriter(folder, key_table(config), shapes, dtypes, **options)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("config", [SMALL, folders.TIED])
def test_in_any_order_and_twice(tmp_path, config, dtype):
  """As where a checkpoint turns out to be damaged half-way."""
  params = folders.drawn(config)
  order = sorted(params, reverse=True)
  with _write(tmp_path, params, config, dtype, shard_bytes=3000) as shards:
    for path in order[:5]:
      shards.write(path, np.ones_like(params[path]))
    written = sum(shards.write(path, params[path]) for path in order)
    assert shards.write("decoder/unknown", np.ones(3)) == 0
  assert written == shards.nbytes
  expected = official.to_official(params, config)
  got = {}
  for path in tmp_path.glob("*.safetensors"):
    got |= load_file(path)
    with safe_open(path, "numpy") as file:
      assert file.metadata() == {"format": "pt"}
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    assert got[name].dtype == dtype
    np.testing.assert_array_equal(got[name], value.astype(dtype), err_msg=name)
  index = json.loads((tmp_path / INDEX).read_text())
  assert index["metadata"] == {"total_size": written}


def test_large_parameters_go_in_blocks(tmp_path, monkeypatch):
  """A transposed kernel is cut along its columns, which are official rows."""
  monkeypatch.setattr("hourjax.weights.shards._BLOCK", 40)
  params = folders.drawn(SMALL)
  with _write(tmp_path, params) as shards:
    for path, value in params.items():
      shards.write(path, value)
  folders.assert_drawn(folders.load(tmp_path))


def test_numbers_that_are_not_finite(tmp_path):
  params = dict(folders.drawn(SMALL))
  path = "decoder/layers/layers/gate/kernel"
  # Finite in float32, not in bfloat16, which rounds it up.
  for number in (np.nan, -np.inf, np.float32(3.4e38)):
    value = params[path].copy()
    value[2, 3, 1] = number
    with (
      pytest.raises(UserError, match=r"layers\.2\.mlp\.gate_proj.* not finite"),
      _write(tmp_path, params, dtype=BFLOAT16) as shards,
    ):
      shards.write(path, value)
  assert not (tmp_path / INDEX).exists()


def test_what_does_not_fit(tmp_path, monkeypatch):
  params = folders.drawn(SMALL)
  with (
    pytest.raises(UserError, match=r"newline is \(3,\) .* and \(16,\) in the"),
    _write(tmp_path / "a", params) as shards,
  ):
    shards.write("newline", np.ones(3, np.float32))
  with (
    pytest.raises(ValueError, match="not written: decoder/embedding"),
    _write(tmp_path / "b", params) as shards,
  ):
    for path in params:
      if path != "decoder/embedding":
        shards.write(path, params[path])
  usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with (
    pytest.raises(UserError, match=r"has 0\.00 GB free and the weights take"),
    _write(tmp_path / "c", params),
  ):
    pass
  assert not list((tmp_path / "c").iterdir())
