"""Hour-LLaVA checkpoints under their official names, in and out.

A checkpoint is a folder with `config.json` and `model.safetensors`, or shards
listed in `model.safetensors.index.json`.
"""

import json
import pathlib
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hourjax.errors import UserError
from hourjax.models.config import DecoderConfig, ModelConfig, VisionConfig
from hourjax.weights.names import Entry, key_table

Params = dict[str, np.ndarray]
_INDEX = "model.safetensors.index.json"
_SO400M = "google/siglip-so400m-patch14-384"
_SHARD_BYTES = 4 * 2**30


def read_config(folder: str | pathlib.Path) -> ModelConfig:
  """The model that `config.json` describes; bfloat16 compute, full remat.

  The tower is so400m unless a `vision_config` entry gives other sizes, and
  frames are pooled to 8 x 8 unless a `pool_side` does.

  Raises:
    UserError: if the file is missing, broken or lacks a key.
  """
  path = pathlib.Path(folder) / "config.json"
  try:
    raw = json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(
      f"{path} does not exist; give a checkpoint folder with config.json and"
      " safetensors files"
    ) from None
  except json.JSONDecodeError as error:
    raise UserError(f"{path} is not JSON ({error}); copy it again") from None
  try:
    return ModelConfig(
      vision=_vision_config(raw, path),
      decoder=DecoderConfig(
        vocab=raw["vocab_size"],
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        mlp=raw["intermediate_size"],
        tied=raw.get("tie_word_embeddings", False),
        rope_base=float(raw.get("rope_theta", 1e6)),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
      ),
      pool_side=raw.get("pool_side", 8),
      memaug_layers=raw.get("memaug_depth", 4),
    )
  except KeyError as error:
    raise UserError(
      f"{path} has no {error}; it must describe an Hour-LLaVA model"
    ) from None


def _vision_config(raw: dict, path) -> VisionConfig:
  given = raw.get("vision_config")
  if given is None:
    tower = raw.get("mm_vision_tower", _SO400M)
    if "siglip-so400m-patch14-384" not in tower:
      raise UserError(
        f"{path}: mm_vision_tower is {tower!r}, known is {_SO400M!r}; add a"
        " vision_config entry with the tower's sizes"
      )
    return VisionConfig()
  return siglip_config(given)


def siglip_config(given: Mapping[str, Any]) -> VisionConfig:
  """The tower of a `vision_config` in Hugging Face's terms.

  Raises:
    KeyError: a size is not given.
  """
  return VisionConfig(
    image_size=given["image_size"],
    patch_size=given["patch_size"],
    width=given["hidden_size"],
    # The official tower is built with all its layers and loses the last one.
    layers=given["num_hidden_layers"] - 1,
    heads=given["num_attention_heads"],
    mlp=given["intermediate_size"],
    norm_eps=given.get("layer_norm_eps", 1e-6),
  )


def write_config(config: ModelConfig, folder: str | pathlib.Path) -> None:
  """Writes the `config.json` that `read_config` reads."""
  decoder, vision = config.decoder, config.vision
  raw = {
    "model_type": "hour_llava_qwen",
    "vocab_size": decoder.vocab,
    "hidden_size": decoder.width,
    "num_hidden_layers": decoder.layers,
    "num_attention_heads": decoder.heads,
    "num_key_value_heads": decoder.kv_heads,
    "intermediate_size": decoder.mlp,
    "tie_word_embeddings": decoder.tied,
    "rope_theta": decoder.rope_base,
    "rms_norm_eps": decoder.norm_eps,
    "memaug_depth": config.memaug_layers,
    "pool_side": config.pool_side,
    "vision_config": {
      "image_size": vision.image_size,
      "patch_size": vision.patch_size,
      "hidden_size": vision.width,
      "num_hidden_layers": vision.layers + 1,
      "num_attention_heads": vision.heads,
      "intermediate_size": vision.mlp,
      "layer_norm_eps": vision.norm_eps,
    },
  }
  path = pathlib.Path(folder) / "config.json"
  path.write_text(json.dumps(raw, indent=2) + "\n")


def load_params(
  folder: str | pathlib.Path,
  config: ModelConfig,
  shapes: dict[str, tuple[int, ...]],
  *,
  dtype=np.float32,
  optional: Set[str] = frozenset(),
) -> Params:
  """Reads a checkpoint into our parameters.

  Tensors are read one at a time, so the peak is the result and one tensor.

  Args:
    folder: of the checkpoint.
    config: the model to fill.
    shapes: its parameters, path to shape (`models.params.param_shapes`).
    dtype: of the result.
    optional: parameters that the checkpoint may lack; they are then left out.

  Returns:
    Arrays by path.

  Raises:
    UserError: lists all missing, unexpected and misshapen names at once.
  """
  files = tensor_files(pathlib.Path(folder))
  with TensorReader(files) as reader:
    table = _present(key_table(config), optional, reader)
    found = reader.names()
    if config.decoder.tied:
      found -= {"lm_head.weight"}  # the embedding again, under a second name
    check_names(table, shapes, reader, found, folder)
    return read_entries(table, shapes, reader, dtype)


def read_entries(
  table: list[Entry],
  shapes: Mapping[str, tuple[int, ...]],
  reader: "TensorReader",
  dtype,
) -> Params:
  """Our parameters of the entries, from tensors that were checked."""
  params = {
    path: np.empty(shapes[path], dtype)
    for entry in table
    for path in entry.paths
  }
  for entry in table:
    for layer, name in enumerate(entry.names()):
      parts = entry.to_ours(reader.tensor(name))
      for path, part in zip(entry.paths, parts, strict=True):
        target = params[path]
        target[layer if entry.layers else ...] = part
  return params


def save_params(
  params: Params,
  config: ModelConfig,
  folder: str | pathlib.Path,
  *,
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes our parameters as an official checkpoint folder, in shards."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_config(config, folder)
  shard, size, files, index = {}, 0, [], {}

  def flush():
    nonlocal shard, size
    name = f"model-{len(files) + 1:05d}.safetensors"
    save_file(shard, folder / name)
    files.append(name)
    index.update(dict.fromkeys(shard, name))
    shard, size = {}, 0

  for entry in key_table(config):
    for layer, name in enumerate(entry.names()):
      arrays = [params[path] for path in entry.paths]
      if entry.layers:
        arrays = [array[layer] for array in arrays]
      tensor = np.ascontiguousarray(entry.to_official(arrays))
      if shard and size + tensor.nbytes > shard_bytes:
        flush()
      shard[name] = tensor
      size += tensor.nbytes
  flush()
  (folder / _INDEX).write_text(
    json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n"
  )


class TensorReader:
  """Tensors of several safetensors files, opened once, read one by one."""

  def __init__(self, files: list[pathlib.Path]):
    self._files, self._where = files, {}

  def __enter__(self):
    for path in self._files:
      try:
        # "flax" would need jax here; "np" cannot hold bfloat16 before 2.1,
        # so ml_dtypes is registered by importing it with numpy.
        handle = safe_open(path, framework="np")
      except Exception as error:
        raise UserError(
          f"{path} is not a readable safetensors file ({error}); copy it again"
        ) from None
      for name in handle.keys():  # noqa: SIM118 (not a mapping)
        self._where[name] = handle
    return self

  def __exit__(self, *_):
    self._where.clear()

  def names(self) -> set[str]:
    return set(self._where)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._where[name].get_slice(name).get_shape())

  def tensor(self, name: str) -> np.ndarray:
    return self._where[name].get_tensor(name)


def tensor_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Safetensors files of a checkpoint folder.

  Raises:
    UserError: none, or listed ones that are missing.
  """
  index = folder / _INDEX
  if index.exists():
    names = set(json.loads(index.read_text())["weight_map"].values())
    files = [folder / name for name in sorted(names)]
  else:
    files = sorted(folder.glob("*.safetensors"))
  missing = [path.name for path in files if not path.exists()]
  if missing:
    raise UserError(
      f"{index} lists {', '.join(missing)}, which {folder} lacks; copy the"
      " missing shards"
    )
  if not files:
    raise UserError(f"{folder} holds no safetensors file")
  return files


def _present(table: list[Entry], optional: Set[str], reader) -> list[Entry]:
  """The table without optional entries of which no tensor is there."""
  found = reader.names()
  return [
    entry
    for entry in table
    if not optional.issuperset(entry.paths) or found & set(entry.names())
  ]


def check_names(
  table: list[Entry],
  shapes: Mapping[str, tuple[int, ...]],
  reader: TensorReader,
  found: Set[str],
  folder: str | pathlib.Path,
) -> None:
  """Compares names and shapes of the table with the tensors `found`.

  Raises:
    UserError: lists all missing, unexpected and misshapen names.
  """
  wanted = {}
  for entry in table:
    ours = [shapes[path][1 if entry.layers else 0 :] for path in entry.paths]
    shape = entry.official_shape(ours)
    wanted.update(dict.fromkeys(entry.names(), shape))
  problems = [f"missing: {name}" for name in sorted(set(wanted) - found)]
  problems += [f"unexpected: {name}" for name in sorted(found - set(wanted))]
  for name in sorted(set(wanted) & found):
    if reader.shape(name) != tuple(wanted[name]):
      problems.append(
        f"shape of {name}: checkpoint {reader.shape(name)}, model"
        f" {tuple(wanted[name])}"
      )
  if problems:
    raise UserError(
      f"{folder} does not fit the model ({len(problems)} problems); is its"
      " config.json the one these weights came with?\n  "
      + "\n  ".join(problems)
    )
