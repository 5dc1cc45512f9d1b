"""`config.json` of published checkpoints, read completely or refused.

The file can describe more models than this one: with other rotary embeddings,
windows, heads, projectors, or ways to pool. Every key under which the same
weights would compute something else is either read or refused by its name.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from hourjax import schema
from hourjax.errors import UserError
from hourjax.models.config import DecoderConfig, ModelConfig, VisionConfig
from hourjax.weights.own_keys import (
  OwnKeys,
  PublishedRules,
  check_known,
  more_fields,
)

SO400M = "google/siglip-so400m-patch14-384"
_WINDOW = 32_768  # no conversation is longer, so wider windows have no effect
# What transformers assumes where config.json does not say it.
_ROPE_BASE = 10_000.0
_QWEN3_HEAD_DIM = 128
_NEEDED = (
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "intermediate_size",
)
_NO_CONFIG = "give a checkpoint folder with config.json and safetensors files"
_REMEDY = "take the config.json that these weights came with, or another model"


_Vocabulary = Annotated[int, Field(ge=1, le=2**24)]
_Width = Annotated[int, Field(ge=1, le=2**17)]
_VisionWidth = Annotated[int, Field(ge=1, le=2**16)]
_Layers = Annotated[int, Field(ge=1, le=1024)]
_Heads = Annotated[int, Field(ge=1, le=4096)]
_Mlp = Annotated[int, Field(ge=1, le=2**20)]
_HeadDim = Annotated[int, Field(ge=1, le=2**12)]
_Depth = Annotated[int, Field(ge=0, le=256)]
_Side = Annotated[int, Field(ge=1, le=256)]
_ImageSize = Annotated[int, Field(ge=1, le=2**14)]
_PatchSize = Annotated[int, Field(ge=1, le=2**10)]
_Eps = Annotated[float, Field(ge=0, lt=1)]
_Base = Annotated[float, Field(gt=1, lt=1e15)]
_Part = DecoderConfig | VisionConfig


class _Config(schema.Schema):
  """Describes the keys of `config.json` that are read."""

  vocab_size: _Vocabulary
  hidden_size: _Width
  num_hidden_layers: _Layers
  num_attention_heads: _Heads
  num_key_value_heads: _Heads | None
  intermediate_size: _Mlp
  head_dim: _HeadDim | None = None
  attention_bias: bool | None = None
  tie_word_embeddings: bool | None = None
  rope_theta: _Base | None = None
  rope_scaling: dict[str, Any] | None = None
  rope_parameters: dict[str, Any] | None = None
  rms_norm_eps: _Eps = 1e-6
  use_sliding_window: bool | None = None
  sliding_window: int | None = 4096
  max_window_layers: int = 28
  layer_types: list[str] | None = None
  model_type: str | None = None
  memaug_depth: _Depth = 4
  pool_side: _Side = 8
  mm_vision_tower: str | None = None
  mm_hidden_size: int | None = None
  spatial_sampling_type: str | None = None
  image_grid_pinpoints: list[list[int]] | str | None = None
  vision_config: dict[str, Any] | None = None
  image_aspect_ratio: str | None = None
  hourjax: OwnKeys | None = None


class _Vision(schema.Schema):
  """Describes a SigLIP tower with Hugging Face's keys."""

  image_size: _ImageSize
  patch_size: _PatchSize
  hidden_size: _VisionWidth
  num_hidden_layers: _Layers
  num_attention_heads: _Heads
  intermediate_size: _Mlp
  layer_norm_eps: _Eps = 1e-6


# By key, the values under which the decoder computes what ours does. Absent
# keys and null mean the first of these, as in transformers.
_DECODER = {
  "hidden_act": ("silu", "swish"),
  "qkv_bias": (True,),
  "mlp_bias": (False,),
  "partial_rotary_factor": (1,),
  "use_mrope": (False,),
  "attn_logit_softcapping": (),
  "final_logit_softcapping": (),
  "use_qk_norm": (False,),
  "qk_layernorm": (False,),
  "num_experts": (0,),
  "num_local_experts": (0,),
  "quantization_config": (),
  "compression_config": (),
}
_VISION = {
  "hidden_act": ("gelu_pytorch_tanh",),
  "num_channels": (3,),
}
# The same for what happens to images and frames before the decoder.
_FRAMES = {
  "mm_projector_type": ("mlp2x_gelu",),
  "mm_resampler_type": ("memaug",),
  "mm_vision_select_layer": (-2,),
  "mm_vision_select_feature": ("patch",),
  "mm_patch_merge_type": ("spatial_unpad",),
  "mm_spatial_pool_mode": ("bilinear",),
  "mm_newline_position": ("grid",),
  "mm_use_im_start_end": (False,),
  "image_aspect_ratio": ("anyres_max_9", "square"),
  "spatial_sampling_type": ("random", "uniform"),
  "add_faster_video": (False,),
}
_POINTS = ("(1x1),...,(6x6)",)


def read_config(folder: str | pathlib.Path) -> ModelConfig:
  """Reads the model that `config.json` describes.

  The decoder is Qwen3's if `model_type` ends with "qwen3", and else Qwen2's;
  keys that are missing have their defaults in transformers. The tower is
  so400m unless a `vision_config` entry gives other sizes, and frames are
  pooled to 8 x 8 tokens unless a `pool_side` entry says otherwise.

  Args:
    folder: with `config.json`.

  Returns:
    The model, with bfloat16 compute and full rematerialisation.

  Raises:
    UserError: the file is missing, broken, lacks a key, or describes a model
      that computes something else.
  """
  path, raw, config = _read(folder)
  decoder, problems = _decoder(config, raw)
  vision = _vision(config, path)
  problems += _others(raw, _FRAMES) + _frames(config, vision)
  _refuse(path, problems)
  own = config.hourjax or OwnKeys()
  return ModelConfig(
    vision=vision,
    decoder=decoder,
    pool_side=config.pool_side,
    memaug_layers=config.memaug_depth,
    dtype=own.dtype,
    **check_known(
      own.model, more_fields(ModelConfig), f"{path}: hourjax.model"
    ),
  )


def read_rules(folder: str | pathlib.Path) -> PublishedRules:
  """Reads how frames are forgotten and images are shown."""
  config = _read(folder)[2]
  own = config.hourjax or OwnKeys()
  spatial = config.spatial_sampling_type or "random"
  return PublishedRules(
    {**own.forgetting, "spatial": spatial},
    own.max_length,
    "plain" if config.image_aspect_ratio == "square" else "tiled",
    own.seed,
  )


def check_start(folder: str | pathlib.Path, model: ModelConfig) -> None:
  """Compares the weights that a training starts from with its model.

  The same tensors with another number of heads or another rotary base are
  another model. How frames become visual tokens is not compared, because
  training decides it. Without a `config.json` nothing is compared.

  Args:
    folder: of the weights.
    model: that is trained.

  Raises:
    UserError: names what differs, or what the weights' configuration has that
      none of our models computes.
  """
  if not (pathlib.Path(folder) / "config.json").exists():
    return
  path, raw, config = _read(folder)
  decoder, problems = _decoder(config, raw)
  pairs: list[tuple[str, _Part, _Part]] = [("decoder", decoder, model.decoder)]
  if config.vision_config is not None or config.mm_vision_tower:
    pairs.append(("vision", _vision(config, path), model.vision))
  for part, found, wanted in pairs:
    theirs, ours = _resolved(found), _resolved(wanted)
    problems += [
      f"{part}.{key} is {theirs[key]!r}, config.model.{part}.{key} is {value!r}"
      for key, value in ours.items()
      if theirs[key] != value
    ]
  _refuse(path, problems)


def siglip_config(raw: Mapping[str, Any], where: str) -> VisionConfig:
  """Reads the tower of a `vision_config` with Hugging Face's keys.

  Args:
    raw: the entry.
    where: it stands, for messages.

  Raises:
    UserError: a size is not given, or it is another kind of tower.
  """
  given = schema.validate(_Vision, dict(raw), where, remedy=_REMEDY)
  problems = _others(raw, _VISION)
  if given.hidden_size % given.num_attention_heads:
    problems.append(
      f"hidden_size is {given.hidden_size}, which num_attention_heads ="
      f" {given.num_attention_heads} does not divide"
    )
  if given.patch_size > given.image_size:
    problems.append(
      f"patch_size is {given.patch_size}, image_size {given.image_size}"
    )
  if given.num_hidden_layers < 2:
    problems.append("num_hidden_layers is 1, and the last layer is not used")
  _refuse(where, problems)
  return VisionConfig(
    image_size=given.image_size,
    patch_size=given.patch_size,
    width=given.hidden_size,
    # The official tower is built with all its layers and loses the last one.
    layers=given.num_hidden_layers - 1,
    heads=given.num_attention_heads,
    mlp=given.intermediate_size,
    norm_eps=given.layer_norm_eps,
  )


def _read(
  folder: str | pathlib.Path,
) -> tuple[pathlib.Path, dict[str, Any], _Config]:
  """Returns the path of config.json, all its keys, and those that are read."""
  path = pathlib.Path(folder) / "config.json"
  raw = schema.read_json(path, remedy=_NO_CONFIG)
  if isinstance(raw, dict):
    lacking = [key for key in _NEEDED if key not in raw]
    if lacking:
      raise UserError(
        f"{path} has no {', '.join(map(repr, lacking))}; it must describe an"
        " Hour-LLaVA model"
      )
  return path, raw, schema.validate(_Config, raw, str(path), remedy=_REMEDY)


def _resolved(config: _Part) -> dict[str, Any]:
  """Returns the fields, the head size as the number that is used."""
  fields = dataclasses.asdict(config)
  if isinstance(config, DecoderConfig):
    fields["head_dim"] = config.head_size
  return fields


def _refuse(where: str | pathlib.Path, problems: list[str]) -> None:
  if problems:
    raise UserError(f"{where}: {'; '.join(problems)}; {_REMEDY}")


def _others(raw: Mapping[str, Any], known: dict[str, tuple]) -> list[str]:
  """Describes keys whose values mean that something else is computed."""
  problems = []
  for key, values in known.items():
    value = raw.get(key)
    # `value in values` would take True for 1.
    same = any(
      value == v and isinstance(value, bool) == isinstance(v, bool)
      for v in values
    )
    if value is not None and not same:
      names = " or ".join(repr(v) for v in values) or "none"
      problems.append(
        f"{key} is {schema.shorten(value)}, implemented is {names}"
      )
  return problems


def _decoder(
  config: _Config, raw: Mapping[str, Any]
) -> tuple[DecoderConfig, list[str]]:
  """Returns the decoder, and what in the file none of ours computes."""
  problems = _others(raw, _DECODER)
  width, heads = config.hidden_size, config.num_attention_heads
  kv_heads = config.num_key_value_heads or heads
  kind = config.model_type or "qwen2"
  qwen3 = kind.lower().endswith("qwen3")
  if kind not in ("qwen2", "qwen3") and not kind.lower().startswith(
    ("hour", "llava")
  ):
    problems.append(
      f"model_type is {kind!r}, implemented are the decoders of Qwen2 and Qwen3"
    )
  head_dim = config.head_dim or (_QWEN3_HEAD_DIM if qwen3 else 0)
  if heads % kv_heads or (not head_dim and width % heads):
    problems.append(
      f"hidden_size {width}, num_attention_heads {heads} and"
      f" num_key_value_heads {kv_heads} do not divide one another"
    )
  elif (head_dim or width // heads) % 4:
    problems.append(
      f"a head has {head_dim or width // heads} channels (head_dim, or"
      f" hidden_size {width} / num_attention_heads {heads}), implemented are"
      " multiples of 4"
    )
  if head_dim * heads == width:
    head_dim = 0  # as it is without the key
  bias = config.attention_bias
  base, wrong = _rope(config)
  decoder = DecoderConfig(
    vocab=config.vocab_size,
    width=width,
    layers=config.num_hidden_layers,
    heads=heads,
    kv_heads=kv_heads,
    mlp=config.intermediate_size,
    tied=bool(config.tie_word_embeddings),
    rope_base=base,
    norm_eps=config.rms_norm_eps,
    head_dim=head_dim,
    qk_norm=qwen3,
    # Tensors that do not fit are refused by their names when they are read.
    attention_bias=not qwen3 if bias is None else bias,
  )
  return decoder, problems + wrong + _windows(config)


def _rope(config: _Config) -> tuple[float, list[str]]:
  """Returns the rotary base, from where any version of transformers puts it."""
  bases, problems = {}, []
  if config.rope_theta is not None:
    bases["rope_theta"] = config.rope_theta
  for name in ("rope_scaling", "rope_parameters"):
    given = getattr(config, name) or {}
    if set(given) == {"full_attention"} and isinstance(
      given["full_attention"], dict
    ):
      given = given["full_attention"]  # one entry for each kind of layer
    for key, value in given.items():
      where = f"{name}.{key}"
      if key in ("rope_type", "type"):
        if value not in (None, "default"):
          problems.append(
            f"{where} is {schema.shorten(value)}, implemented is 'default'"
          )
      elif key == "rope_theta":
        if type(value) in (int, float) and 1 < value < 1e15:
          bases[where] = float(value)
        else:
          problems.append(f"{where} is {schema.shorten(value)}, no base")
      elif value is not None and not (
        key == "partial_rotary_factor" and value == 1
      ):
        problems.append(
          f"{where} is {schema.shorten(value)}, implemented is none"
        )
  if len(set(bases.values())) > 1:
    problems.append(
      "several rotary bases: "
      + ", ".join(f"{key} {value:g}" for key, value in bases.items())
    )
  return next(iter(bases.values()), _ROPE_BASE), problems


def _windows(config: _Config) -> list[str]:
  """Describes layers that would see only a part of the conversation."""
  layers, window = config.num_hidden_layers, config.sliding_window
  problems = []
  if config.layer_types is not None:
    kinds = sorted(set(config.layer_types) - {"full_attention"})
    if kinds:
      problems.append(
        f"layer_types has {schema.shorten(kinds)}, implemented is"
        " 'full_attention'"
      )
    if len(config.layer_types) != layers:
      problems.append(
        f"layer_types has {len(config.layer_types)} entries,"
        f" num_hidden_layers is {layers}"
      )
  elif (
    config.use_sliding_window
    and window is not None
    and window < _WINDOW
    and config.max_window_layers < layers
  ):
    problems.append(
      f"sliding_window is {window} in layers from {config.max_window_layers}"
      f" on (use_sliding_window), implemented is full attention: none, or at"
      f" least {_WINDOW}"
    )
  return problems


def _vision(config: _Config, path: pathlib.Path) -> VisionConfig:
  if config.vision_config is not None:
    return siglip_config(config.vision_config, f"{path}, vision_config")
  tower = config.mm_vision_tower or SO400M
  if "siglip-so400m-patch14-384" not in tower:
    raise UserError(
      f"{path}: mm_vision_tower is {tower!r}, known is {SO400M!r}; add a"
      " vision_config entry with the tower's sizes"
    )
  return VisionConfig()


def _frames(config: _Config, vision: VisionConfig) -> list[str]:
  """Describes how frames or tiles are cut differently from ours."""
  problems = []
  if config.mm_hidden_size not in (None, vision.width):
    problems.append(
      f"mm_hidden_size is {config.mm_hidden_size}, the tower's width is"
      f" {vision.width}"
    )
  points, size = config.image_grid_pinpoints, vision.image_size
  grids = [[a * size, b * size] for a in range(1, 7) for b in range(1, 7)]
  if isinstance(points, list):
    points = sorted(points)
  if points not in (None, grids, *_POINTS):
    problems.append(
      f"image_grid_pinpoints is {schema.shorten(points)}, implemented are all"
      f" grids of 1 x 1 to 6 x 6 tiles of {size} pixels"
    )
  return problems
