"""Official checkpoints written, read again, and refused."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hourjax.errors import UserError
from hourjax.models.config import (
  HOUR_LLAVA_3B,
  HOUR_LLAVA_7B,
  TINY,
  DecoderConfig,
  ModelConfig,
  VisionConfig,
)
from hourjax.models.params import param_shapes
from hourjax.weights.checkpoint import load_params
from hourjax.weights.config import read_config
from hourjax.weights.description import write_config
from hourjax.weights.shards import save_params
from tests import golden_cases, official
from tests.weights import folders

TIED, SMALL = folders.TIED, folders.UNTIED


def _random(config, dtype=np.float32):
  return {p: v.astype(dtype) for p, v in folders.drawn(config).items()}


_load = folders.load


def _assert_equal(got, expected):
  assert set(got) == set(expected)
  for path, value in expected.items():
    np.testing.assert_array_equal(got[path], value, err_msg=path)


def _edit(folder, change):
  """Rewrites a checkpoint of one shard."""
  (path,) = folder.glob("*.safetensors")
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path)


@pytest.fixture
def saved(tmp_path):
  params = _random(SMALL)
  save_params(params, SMALL, tmp_path)
  return tmp_path, params


# --- round trips ------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, TIED])
@pytest.mark.parametrize("shard_bytes", [1, 4000, 10**9])
def test_round_trip_in_shards(tmp_path, config, shard_bytes):
  params = _random(config)
  save_params(params, config, tmp_path, shard_bytes=shard_bytes)
  shards = sorted(tmp_path.glob("*.safetensors"))
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  names = official.to_official(params, config)
  assert set(index["weight_map"]) == set(names)
  assert set(index["weight_map"].values()) == {path.name for path in shards}
  if shard_bytes == 1:
    assert len(shards) == len(names)
  elif shard_bytes == 10**9:
    assert len(shards) == 1
  else:
    assert 1 < len(shards) < len(names)
  for shard in shards:
    for name in load_file(shard):
      assert index["weight_map"][name] == shard.name
  _assert_equal(_load(tmp_path, config), params)


def test_official_weights_survive_import_and_export(tmp_path):
  if not golden_cases.names():
    pytest.skip("no golden folder")
  config, params = golden_cases.checkpoint()
  save_params(params, config, tmp_path)
  (path,) = tmp_path.glob("*.safetensors")
  exported = load_file(path)
  path, _ = golden_cases.official_weights()
  _assert_equal(exported, load_file(path))


def test_without_an_index_all_safetensors_are_read(saved):
  folder, params = saved
  (folder / "model.safetensors.index.json").unlink()
  _assert_equal(_load(folder, SMALL), params)


def test_bfloat16(tmp_path):
  params = _random(SMALL, ml_dtypes.bfloat16)
  save_params(params, SMALL, tmp_path)
  (path,) = tmp_path.glob("*.safetensors")
  assert {x.dtype for x in load_file(path).values()} == {
    np.dtype(ml_dtypes.bfloat16)
  }
  got = _load(tmp_path, SMALL)
  assert {x.dtype for x in got.values()} == {np.dtype(np.float32)}
  _assert_equal(got, {p: v.astype(np.float32) for p, v in params.items()})
  kept = _load(tmp_path, SMALL, dtype=ml_dtypes.bfloat16)
  assert {x.dtype for x in kept.values()} == {np.dtype(ml_dtypes.bfloat16)}
  _assert_equal(kept, params)


# --- configurations ---------------------------------------------------------


@pytest.mark.parametrize("config", [HOUR_LLAVA_3B, HOUR_LLAVA_7B, SMALL, TIED])
def test_config_round_trip(tmp_path, config):
  write_config(config, tmp_path)
  got = read_config(tmp_path)
  assert (got.vision, got.decoder) == (config.vision, config.decoder)
  assert got.memaug_layers == config.memaug_layers
  assert (got.dtype, got.remat) == ("bfloat16", "full")


def _write(folder, **changes):
  write_config(HOUR_LLAVA_3B, folder)
  path = folder / "config.json"
  raw = json.loads(path.read_text())
  raw.update(changes)
  raw = {key: value for key, value in raw.items() if value is not None}
  path.write_text(json.dumps(raw))


def test_known_tower_needs_no_sizes(tmp_path):
  _write(
    tmp_path,
    vision_config=None,
    mm_vision_tower="google/siglip-so400m-patch14-384",
  )
  assert read_config(tmp_path).vision == VisionConfig()
  _write(tmp_path, vision_config=None)
  assert read_config(tmp_path).vision == VisionConfig()


def test_unknown_tower_is_refused(tmp_path):
  _write(tmp_path, vision_config=None, mm_vision_tower="openai/clip")
  with pytest.raises(UserError, match="mm_vision_tower is 'openai/clip'"):
    read_config(tmp_path)


def test_missing_config(tmp_path):
  with pytest.raises(UserError, match=r"config\.json does not exist; give"):
    read_config(tmp_path)


def test_broken_config(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config\.json is not JSON"):
    read_config(tmp_path)
  _write(tmp_path, hidden_size=None)
  with pytest.raises(UserError, match="has no 'hidden_size'"):
    read_config(tmp_path)


# --- what does not fit ------------------------------------------------------


def test_all_problems_in_one_error(saved):
  folder, _ = saved

  def change(tensors):
    del tensors["model.norm.weight"]
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.extra"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].copy()
    tensors["model.vision_resampler.layers.1.self_attn.Wqkv.weight"] = np.zeros(
      (32, 15), np.float32
    )

  _edit(folder, change)
  with pytest.raises(UserError) as error:
    _load(folder, SMALL)
  message = str(error.value)
  assert "(5 problems)" in message and str(folder) in message
  for line in [
    "missing: model.layers.2.mlp.up_proj.weight",
    "missing: model.norm.weight",
    "unexpected: model.extra",
    "shape of lm_head.weight: checkpoint (39, 16), model (40, 16)",
    "shape of model.vision_resampler.layers.1.self_attn.Wqkv.weight:"
    " checkpoint (32, 15), model (32, 16)",
  ]:
    assert f"\n  {line}" in message


def test_weights_without_memaug_say_how_a_training_starts_from_them(saved):
  folder, _ = saved

  def remove(tensors):
    for name in list(tensors):
      if name.startswith("model.vision_resampler."):
        del tensors[name]

  _edit(folder, remove)
  with pytest.raises(UserError, match=r"--config\.draw_missing=memaug"):
    _load(folder, SMALL)


def test_another_models_checkpoint_is_refused(tmp_path):
  save_params(_random(TIED), TIED, tmp_path)
  with pytest.raises(UserError, match="does not fit the model"):
    _load(tmp_path, SMALL)


def test_missing_shard(tmp_path):
  save_params(_random(SMALL), SMALL, tmp_path, shard_bytes=20_000)
  shards = sorted(tmp_path.glob("*.safetensors"))
  assert len(shards) > 2
  for shard in shards[1:3]:
    shard.unlink()
  with pytest.raises(UserError) as error:
    _load(tmp_path, SMALL)
  for shard in shards[1:3]:
    assert shard.name in str(error.value)
  assert "copy the missing shards" in str(error.value)


def test_folder_without_weights(tmp_path):
  with pytest.raises(UserError, match="holds no safetensors file"):
    _load(tmp_path, SMALL)


def test_cut_shard(saved):
  folder, _ = saved
  (path,) = folder.glob("*.safetensors")
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match="not a readable safetensors file"):
    _load(folder, SMALL)


def test_optional_component_may_be_missing(saved):
  """LLaVA-OneVision has no MemAug; half a MemAug is still an error."""
  folder, params = saved
  memaug = {path for path in params if path.startswith("memaug/")}
  _assert_equal(_load(folder, SMALL, optional=memaug), params)
  prefix = "model.vision_resampler."
  one = f"{prefix}layers.0.mlp.0.bias"

  def change(tensors):
    for name in [n for n in tensors if n.startswith(prefix) and n != one]:
      del tensors[name]

  _edit(folder, change)
  with pytest.raises(UserError, match=r"layers\.1\.mlp\.0\.bias"):
    _load(folder, SMALL, optional=memaug)
  _edit(folder, lambda tensors: tensors.pop(one))
  with pytest.raises(UserError, match=f"missing: {prefix}"):
    _load(folder, SMALL)
  rest = {path: v for path, v in params.items() if path not in memaug}
  _assert_equal(_load(folder, SMALL, optional=memaug), rest)


# --- memory -----------------------------------------------------------------

LARGE = ModelConfig(
  TINY.vision,
  DecoderConfig(
    vocab=8_000,
    width=512,
    layers=14,
    heads=8,
    kv_heads=2,
    mlp=2_000,
    tied=False,
  ),
  memaug_layers=1,
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_loading_takes_the_result_and_a_tensor_more(tmp_path, dtype):
  """Of memory that is allocated; the files are not mapped."""
  shapes = param_shapes(LARGE)
  params = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
  save_params(params, LARGE, tmp_path, shard_bytes=60 * 2**20)
  result = sum(value.size for value in params.values())
  result *= np.dtype(dtype).itemsize
  largest = params["decoder/embedding"].nbytes
  assert result > 100 * 2**20 > 5 * largest
  del params

  tracemalloc.start()
  loaded = load_params(tmp_path, LARGE, shapes, dtype=dtype)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert sum(value.nbytes for value in loaded.values()) == result
  threads = 4  # each with a block as read and as cast
  assert result <= peak < result + threads * 2 * largest
