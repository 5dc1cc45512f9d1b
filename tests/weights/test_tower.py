import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hourjax.errors import UserError
from hourjax.models.config import TINY, DecoderConfig, ModelConfig, VisionConfig
from hourjax.models.params import param_shapes
from hourjax.weights.checkpoint import load_params, load_tower
from hourjax.weights.shards import save_params
from tests import golden_files, official

SMALL = ModelConfig(
  VisionConfig(image_size=6, patch_size=2, width=8, layers=2, heads=2, mlp=12),
  DecoderConfig(
    vocab=40, width=16, layers=1, heads=2, kv_heads=1, mlp=8, tied=True
  ),
  memaug_layers=1,
)
THERE = "model.vision_tower.vision_tower.vision_model."


def _random(config):
  rng = np.random.default_rng(0)
  return {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in param_shapes(config).items()
  }


def _tower(params):
  return {p: value for p, value in params.items() if p.startswith("vision/")}


def _vision(config, **changes):
  vision = config.vision
  return {
    "hidden_size": vision.width,
    "image_size": vision.image_size,
    "intermediate_size": vision.mlp,
    "model_type": "siglip_vision_model",
    "num_attention_heads": vision.heads,
    "num_hidden_layers": vision.layers + 1,
    "patch_size": vision.patch_size,
  } | changes


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
  """A model, and its Hour-LLaVA checkpoint folder."""
  folder = tmp_path_factory.mktemp("hour-llava")
  params = _random(SMALL)
  save_params(params, SMALL, folder)
  return params, folder


def _siglip_tensors(folder):
  """The published layout: a last layer, a head and a text model besides."""
  (path,) = folder.glob("*.safetensors")
  tensors = {
    name.replace(THERE, "vision_model."): value
    for name, value in load_file(path).items()
    if name.startswith(THERE)
  }
  layers = SMALL.vision.layers
  for name in list(tensors):
    if "layers.0." in name:
      last = name.replace("layers.0.", f"layers.{layers}.")
      tensors[last] = np.full_like(tensors[name], 7)
  tensors["vision_model.head.probe"] = np.ones((1, 1, 8), np.float32)
  tensors["vision_model.head.attention.in_proj_weight"] = np.ones(
    (24, 8), np.float32
  )
  tensors["text_model.embeddings.token_embedding.weight"] = np.ones(
    (5, 8), np.float32
  )
  tensors["logit_scale"] = np.ones(1, np.float32)
  return tensors


@pytest.fixture
def siglip(ours, tmp_path):
  tensors = _siglip_tensors(ours[1])
  save_file(tensors, tmp_path / "model.safetensors")
  _config(tmp_path, {"model_type": "siglip", "vision_config": _vision(SMALL)})
  return tmp_path


def _config(folder, raw):
  (folder / "config.json").write_text(json.dumps(raw))


def _load(folder, config=SMALL):
  return load_tower(folder, config, param_shapes(config))


def _assert_same(got, expected):
  assert got.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(got[path], value, err_msg=path)
    assert got[path].dtype == np.float32


def test_a_siglip_folder(ours, siglip):
  _assert_same(_load(siglip), _tower(ours[0]))


def test_a_siglip_folder_of_the_vision_model_alone(ours, siglip):
  _config(siglip, _vision(SMALL))
  _assert_same(_load(siglip), _tower(ours[0]))


def test_sharded_and_in_bfloat16(ours, siglip):
  tensors = _siglip_tensors(ours[1])
  (siglip / "model.safetensors").unlink()
  index = {}
  for i, name in enumerate(tensors):
    file = f"model-{i % 3}.safetensors"
    index[name] = file
  for file in set(index.values()):
    part = {n: v for n, v in tensors.items() if index[n] == file}
    save_file(
      {n: v.astype(ml_dtypes.bfloat16) for n, v in part.items()}, siglip / file
    )
  (siglip / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": index})
  )
  expected = {
    path: value.astype(ml_dtypes.bfloat16).astype(np.float32)
    for path, value in _tower(ours[0]).items()
  }
  _assert_same(_load(siglip), expected)


def test_an_hour_llava_checkpoint(ours):
  params, folder = ours
  _assert_same(_load(folder), _tower(params))
  whole = load_params(folder, SMALL, param_shapes(SMALL))
  _assert_same(_load(folder), _tower(whole))


def test_only_tensors_of_the_tower_are_read(ours, tmp_path):
  """Others may even be missing, as with weights saved without the decoder."""
  (path,) = ours[1].glob("*.safetensors")
  tensors = {n: v for n, v in load_file(path).items() if n.startswith(THERE)}
  save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text((ours[1] / "config.json").read_text())
  _assert_same(_load(tmp_path), _tower(ours[0]))


@pytest.mark.parametrize("key", ["image_size", "patch_size", "hidden_size"])
def test_another_size_is_named_with_both_values(siglip, key):
  raw = _vision(SMALL)
  raw[key] *= 2
  _config(siglip, {"model_type": "siglip", "vision_config": raw})
  ours = {"hidden_size": "width"}.get(key, key)
  message = (
    rf"config.model.vision .*{ours}: .* {raw[key]}, model {raw[key] // 2}"
  )
  with pytest.raises(UserError, match=message):
    _load(siglip)


def test_sizes_that_hugging_face_leaves_out(tmp_path):
  _config(tmp_path, {"model_type": "siglip", "vision_config": {}})
  base = VisionConfig(
    image_size=224, patch_size=16, width=768, layers=11, heads=12, mlp=3072
  )
  config = ModelConfig(base, SMALL.decoder)
  with pytest.raises(UserError, match="holds no safetensors file"):
    load_tower(tmp_path, config, {})


def test_so400m_as_published(tmp_path):
  """The values of google/siglip-so400m-patch14-384's config.json."""
  vision = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
  }
  _config(tmp_path, {"model_type": "siglip", "vision_config": vision})
  with pytest.raises(UserError, match="holds no safetensors file"):
    load_tower(tmp_path, ModelConfig(VisionConfig(), SMALL.decoder), {})


def test_missing_and_misshapen_tensors_are_listed_together(ours, siglip):
  tensors = _siglip_tensors(ours[1])
  del tensors["vision_model.post_layernorm.bias"]
  name = "vision_model.embeddings.position_embedding.weight"
  tensors[name] = tensors[name][:-1].copy()
  save_file(tensors, siglip / "model.safetensors")
  with pytest.raises(UserError, match=r"\(2 problems\)") as error:
    _load(siglip)
  assert "missing: vision_model.post_layernorm.bias" in str(error.value)
  assert f"shape of {name}: checkpoint (8, 8), model (9, 8)" in str(error.value)


@pytest.mark.parametrize(
  "text, message",
  [(None, "--tower takes a SigLIP folder"), ("{", "is not JSON")],
)
def test_folders_that_are_none(tmp_path, text, message):
  if text:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=message):
    _load(tmp_path)


@pytest.mark.parametrize("kind", ["siglip2_vision_model", "clip", None, []])
def test_towers_of_other_kinds_are_named(siglip, kind):
  raw = json.loads((siglip / "config.json").read_text())
  _config(siglip, raw | {"model_type": kind})
  with pytest.raises(UserError, match=r"model_type is .*'siglip'.*--tower"):
    _load(siglip)


NAMES = [
  name.removesuffix(".npz")
  for name, entry in golden_files.present().items()
  if "layers_after_deletion" in entry and name.endswith(".npz")
]


@pytest.mark.parametrize("name", NAMES)
def test_the_oracles_tower(tmp_path, name):
  """Weights as the official code names them, written as a SigLIP folder."""
  raw = golden_files.meta_of(f"{name}.npz")["config"]
  vision = VisionConfig(
    image_size=raw["image_size"],
    patch_size=raw["patch_size"],
    width=raw["hidden_size"],
    layers=raw["num_hidden_layers"] - 1,
    heads=raw["num_attention_heads"],
    mlp=raw["intermediate_size"],
  )
  config = ModelConfig(vision, TINY.decoder)
  file = golden_files.golden_path(f"{name}.weights.safetensors")
  tensors = {
    f"vision_model.{n.split('vision_model.')[-1]}": value
    for n, value in load_file(file).items()
  }
  save_file(tensors, tmp_path / "model.safetensors")
  _config(tmp_path, {"model_type": "siglip", "vision_config": raw})
  expected = official.to_ours(load_file(file), config, "vision")
  got = _load(tmp_path, config)
  assert {path.removeprefix("vision/") for path in got} >= {
    path.removeprefix("vision/") for path in expected
  }
  for path, value in expected.items():
    ours = got[path if path in got else f"vision/{path}"]
    np.testing.assert_array_equal(ours, value, err_msg=path)
