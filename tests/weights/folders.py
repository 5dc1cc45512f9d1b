"""A small published folder, and ways to make of it what people have."""

import functools
import json
import pathlib
from collections.abc import Callable

import numpy as np
from safetensors.numpy import load_file, save_file

from hourjax.models.config import TINY, DecoderConfig, ModelConfig, VisionConfig
from hourjax.models.params import param_shapes
from hourjax.weights.checkpoint import load_params
from hourjax.weights.shards import save_params

UNTIED = ModelConfig(
  VisionConfig(image_size=6, patch_size=2, width=8, layers=2, heads=2, mlp=12),
  DecoderConfig(
    vocab=40, width=16, layers=3, heads=4, kv_heads=2, mlp=24, tied=False
  ),
  pool_side=2,
  memaug_layers=2,
)
TIED = ModelConfig(
  TINY.vision,
  DecoderConfig(
    vocab=40, width=16, layers=1, heads=2, kv_heads=1, mlp=8, tied=True
  ),
  memaug_layers=1,
)
shapes = functools.cache(param_shapes)


@functools.cache
def drawn(config: ModelConfig) -> dict[str, np.ndarray]:
  """float32 parameters by path."""
  rng = np.random.default_rng(0)
  return {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in shapes(config).items()
  }


def save(
  folder: pathlib.Path, config: ModelConfig = UNTIED, **options
) -> pathlib.Path:
  """The folder, with `drawn` in it."""
  save_params(drawn(config), config, folder, **options)
  return folder


def load(folder: pathlib.Path, config: ModelConfig = UNTIED, **options) -> dict:
  """What is read of it."""
  return load_params(folder, config, shapes(config), **options)


def edit(folder: pathlib.Path, change: Callable[[dict], dict | None]) -> None:
  """Changes the tensors of a folder of one shard, and its index."""
  (path,) = folder.glob("model-*.safetensors")
  tensors = load_file(path)
  tensors = change(tensors) or tensors
  save_file(tensors, path)
  index = folder / "model.safetensors.index.json"
  index.write_text(
    json.dumps(
      {"metadata": {}, "weight_map": dict.fromkeys(tensors, path.name)}
    )
  )


def in_one_file(folder: pathlib.Path) -> pathlib.Path:
  """The weights as model.safetensors, without an index."""
  (path,) = folder.glob("model-*.safetensors")
  (folder / "model.safetensors.index.json").unlink()
  return path.rename(folder / "model.safetensors")


def describe(folder: pathlib.Path, **keys) -> None:
  """Changes config.json; `...` takes a key out."""
  path = folder / "config.json"
  raw = json.loads(path.read_text()) | keys
  path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def assert_drawn(got: dict, config: ModelConfig = UNTIED) -> None:
  """Every bit of every parameter."""
  expected = drawn(config)
  assert set(got) == set(expected)
  for path, value in expected.items():
    np.testing.assert_array_equal(got[path], value, err_msg=path)
