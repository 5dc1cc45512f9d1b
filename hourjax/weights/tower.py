"""The vision tower alone, from published folders."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hourjax import schema
from hourjax.errors import UserError
from hourjax.models.config import ModelConfig, VisionConfig
from hourjax.weights import checkpoint, names
from hourjax.weights.config import read_config, siglip_config
from hourjax.weights.folder import find_tensors
from hourjax.weights.tensors import TensorReader

# What Hugging Face's SigLIP assumes where config.json is silent.
_DEFAULTS = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "image_size": 224,
  "patch_size": 16,
  "layer_norm_eps": 1e-6,
}
_SIGLIP = "vision_model."
_KIND = "siglip_vision_model"
_WHAT = (
  "--tower takes a SigLIP folder, an Hour-LLaVA checkpoint or a workdir of"
  " training"
)


def load_tower(
  folder: str | pathlib.Path,
  config: ModelConfig,
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
  """Reads the tower of a SigLIP folder or of an Hour-LLaVA checkpoint.

  Of a SigLIP folder the last layer and the attention head are left where they
  are (SPEC section 1). Only the tower's tensors are read.

  Args:
    folder: with config.json and safetensors files.
    config: the model whose tower it shall be.
    shapes: of the model's parameters by path.

  Returns:
    float32 arrays by path ("vision/...").

  Raises:
    UserError: another size than the model's, or lists all missing and
      misshapen tensors.
  """
  folder = pathlib.Path(folder)
  _check_sizes(_sizes(folder / "config.json"), config.vision, folder)
  with TensorReader(find_tensors(folder)) as reader:
    siglip = any(name.startswith(_SIGLIP) for name in reader.names())
    table = names.tower_table(config, _SIGLIP if siglip else names.TOWER)
    wanted = {name for entry in table for name in entry.names()}
    found = reader.names() & wanted
    checkpoint.check_names(table, shapes, reader, found, folder)
    return checkpoint.read_entries(table, shapes, reader, np.float32)


def _sizes(path: pathlib.Path) -> VisionConfig:
  raw: Any = schema.read_json(path, remedy=_WHAT)
  if not isinstance(raw, dict):
    raise UserError(f"{path} is {schema.shorten(raw)}, no JSON object; {_WHAT}")
  kind = raw.get("model_type", "")
  if "vocab_size" not in raw and kind not in (_KIND, "siglip"):
    raise UserError(
      f"{path}: model_type is {schema.shorten(kind)}, and no language model is"
      f" described; of towers alone 'siglip' and {_KIND!r} are read; {_WHAT}"
    )
  if kind == _KIND:
    return siglip_config({**_DEFAULTS, **raw}, str(path))
  if kind == "siglip":
    given = raw.get("vision_config") or {}
    if not isinstance(given, dict):
      raise UserError(
        f"{path}: vision_config is {schema.shorten(given)}, no JSON object;"
        f" {_WHAT}"
      )
    return siglip_config({**_DEFAULTS, **given}, f"{path}, vision_config")
  return read_config(path.parent).vision


def _check_sizes(found: VisionConfig, wanted: VisionConfig, folder) -> None:
  found, wanted = dataclasses.asdict(found), dataclasses.asdict(wanted)
  wrong = [
    f"{name}: {folder.name} {found[name]}, model {wanted[name]}"
    for name in wanted
    if found[name] != wanted[name]
  ]
  if wrong:
    raise UserError(
      f"{folder}/config.json describes another tower than config.model.vision"
      " (layers without the last one): " + "; ".join(wrong) + "; give the"
      " tower that the model is made for, or change the configuration"
    )
