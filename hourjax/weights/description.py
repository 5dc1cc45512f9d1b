"""What an exported folder says about itself, beside its tensors.

    config.json               every key that the official code, transformers or
                              `weights.config` reads
    generation_config.json    how transformers ends an answer
    preprocessor_config.json  how transformers scales images for a tower alone
    README.md                 the model card

The official classes build projector, newline and MemAug only where config.json
names a tower, a projector and a resampler. Where it is silent they come up
without these parts, and no error says so.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hourjax.errors import UserError
from hourjax.models.config import (
  QWEN2_5_3B,
  QWEN2_7B,
  DecoderConfig,
  ModelConfig,
  VisionConfig,
)
from hourjax.weights.config import SO400M, read_config
from hourjax.weights.own_keys import PublishedRules, more_fields

_WINDOW = 32_768
_TILES = 6  # tiles along a side of the largest canvas
# What the official scripts set for every stage and size.
_OFFICIAL = {
  "add_faster_video": False,
  "add_time_instruction": True,
  "faster_token_stride": 10,
  "force_sample": True,
  "image_crop_resolution": None,
  "image_split_resolution": None,
  "mm_newline_position": "grid",
  "mm_patch_merge_type": "spatial_unpad",
  "mm_projector_type": "mlp2x_gelu",
  "mm_resampler_type": "memaug",
  "mm_spatial_pool_mode": "bilinear",
  "mm_spatial_pool_stride": None,
  "mm_use_im_patch_token": False,
  "mm_use_im_start_end": False,
  "mm_vision_select_feature": "patch",
  "mm_vision_select_layer": -2,
  "pos_skipping_range": 4096,
  "tokenizer_padding_side": "right",
  "use_mm_proj": True,
  "use_pos_skipping": False,
  "vision_tower_pretrained": None,
}


class Tokens(NamedTuple):
  """Holds ids of the tokenizer that config.json names.

  Attributes:
    end: of a turn, `<|im_end|>`.
    pad: fills rows, `<|endoftext|>`.
  """

  end: int
  pad: int


def write_config(
  config: ModelConfig,
  folder: str | pathlib.Path,
  *,
  rules: PublishedRules | None = None,
  tokens: Tokens | None = None,
  dtype: str | None = None,
) -> None:
  """Writes the `config.json` of a whole model.

  Args:
    config: of the model.
    folder: to write into.
    rules: how the training showed frames and conversations; by default as the
      official one does, and with bfloat16 computation.
    tokens: of the model's tokenizer, if known.
    dtype: of the tensors, if known.

  Raises:
    UserError: config.json has no words for a field of the model.
  """
  decoder, vision = config.decoder, config.vision
  family = "qwen3" if decoder.qk_norm else "qwen"
  size = vision.image_size
  sides = range(1, _TILES + 1)
  length = rules.max_length if rules else _WINDOW
  raw: dict[str, Any] = {
    "architectures": [f"HourLlava{family.capitalize()}ForCausalLM"],
    "model_type": f"hour_llava_{family}",
    **_decoder_keys(decoder, tokens, dtype, length),
    **_OFFICIAL,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [
      [a * size, b * size] for a in sides for b in sides
    ],
    "memaug_depth": config.memaug_layers,
    "mm_hidden_size": vision.width,
    "mm_vision_tower": _tower_name(vision),
    "pool_side": config.pool_side,
    "spatial_sampling_type": "random",
    "tokenizer_model_max_length": length,
    "vision_config": {
      **_tower_keys(vision),
      "num_hidden_layers": vision.layers + 1,
    },
  }
  if rules is not None:
    forgetting = dict(rules.forgetting)
    raw["spatial_sampling_type"] = forgetting.pop("spatial")
    if rules.single_image == "plain":
      raw["image_aspect_ratio"] = "square"
    raw["hourjax"] = {
      "dtype": config.dtype,
      "forgetting": forgetting,
      "max_length": rules.max_length,
      "model": more_fields(config),
      "seed": rules.seed,
    }
  folder = pathlib.Path(folder)
  _write_json(folder / "config.json", raw)
  if rules is not None:
    _check_read_back(config, folder)


# How wide a head is is compared below; how fresh queries were drawn is of no
# meaning to weights that are there.
_NOT_COMPARED = ("head_dim", "query_init")


def _check_read_back(config: ModelConfig, folder: pathlib.Path) -> None:
  """Makes sure that the file describes the model that was meant."""
  found = read_config(folder)
  wrong = [
    f"{part}.{key}={value!r}"
    for part, mine, theirs in (
      ("decoder", config.decoder, found.decoder),
      ("vision", config.vision, found.vision),
    )
    for key, value in vars(mine).items()
    if vars(theirs)[key] != value and key not in _NOT_COMPARED
  ]
  if config.decoder.head_size != found.decoder.head_size:
    wrong.append(f"decoder.head_dim={config.decoder.head_dim}")
  if wrong:
    raise UserError(
      f"config.json has no words for {', '.join(wrong)} of config.model; a"
      " model with it cannot be exported, only answered with from its workdir"
    )


def write_decoder_config(
  decoder: DecoderConfig,
  folder: pathlib.Path,
  *,
  tokens: Tokens,
  dtype: str,
  max_length: int,
) -> None:
  """Writes the `config.json` of the decoder alone, as Qwen2 or Qwen3.

  Args:
    decoder: to describe.
    folder: to write into.
    tokens: of the model's tokenizer.
    dtype: of the tensors.
    max_length: most tokens of a conversation.

  Raises:
    UserError: neither of them computes what this decoder does.
  """
  if not decoder.qk_norm and not decoder.attention_bias:
    raise UserError(
      "config.model.decoder has attention_bias=False and qk_norm=False;"
      " transformers' Qwen2 always adds a bias to queries, keys and values, and"
      " its Qwen3 always normalises queries and keys: export --part=all"
    )
  family = "Qwen3" if decoder.qk_norm else "Qwen2"
  raw = {
    "architectures": [f"{family}ForCausalLM"],
    "model_type": family.lower(),
    **_decoder_keys(decoder, tokens, dtype, max_length),
  }
  _write_json(folder / "config.json", raw)


def write_tower_config(
  vision: VisionConfig, folder: pathlib.Path, *, dtype: str
) -> None:
  """Writes the files that describe the tower alone, as SiglipVisionModel.

  It has the layers that are run and no head. Its features are the hidden state
  after the last layer (`mm_vision_select_layer` -1), before the last norm.

  Args:
    vision: to describe.
    folder: to write into.
    dtype: of the tensors.
  """
  raw = {
    "architectures": ["SiglipVisionModel"],
    "model_type": "siglip_vision_model",
    **_tower_keys(vision),
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "mm_vision_select_layer": -1,
    "num_channels": 3,
    "num_hidden_layers": vision.layers,
    "torch_dtype": dtype,
    "vision_use_head": False,
  }
  _write_json(folder / "config.json", raw)
  size = {"height": vision.image_size, "width": vision.image_size}
  scale = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
    "size": size,
  }
  _write_json(folder / "preprocessor_config.json", scale)


def write_generation_config(folder: pathlib.Path, tokens: Tokens) -> None:
  """Writes how transformers ends an answer: greedily, at the end of a turn."""
  raw = {
    "bos_token_id": tokens.pad,
    "do_sample": False,
    "eos_token_id": [tokens.end, tokens.pad],
    "pad_token_id": tokens.pad,
  }
  _write_json(folder / "generation_config.json", raw)


def official_problems(config: ModelConfig, rules: PublishedRules) -> list[str]:
  """Returns why the official code cannot run a model; empty if it can."""
  decoder = config.decoder
  # Of the official class: Qwen2's.
  found = [
    (decoder.qk_norm, "its decoder is Qwen3's"),
    (not decoder.attention_bias, "its attention has no bias"),
    (
      decoder.head_size * decoder.heads != decoder.width,
      f"its heads have {decoder.head_size} channels of their own",
    ),
    (
      config.vision != VisionConfig(),
      "its tower is not SigLIP so400m patch14-384",
    ),
    (
      config.pool_side != 8,
      f"a frame has {config.pool_side}x{config.pool_side} tokens, not 8x8",
    ),
  ]
  usual = {"temporal": "uniform", "ratio": 4, "max_frames": 512}
  found += [
    (rules.forgetting.get(key, value) != value,
     f"forgetting.{key} is {rules.forgetting.get(key)}, not {value}")
    for key, value in usual.items()
  ]  # fmt: skip
  defaults = more_fields(ModelConfig)
  found += [
    (value != defaults[key], f"model.{key} is {value}")
    for key, value in more_fields(config).items()
  ]
  return [text for is_so, text in found if is_so]


def licence_note(decoder: DecoderConfig, start: str) -> str:
  """Returns what the model card says about licences.

  Args:
    decoder: of the model.
    start: what the training started from; empty if it drew its weights.
  """
  known = {
    QWEN2_5_3B: "Qwen2.5-3B-Instruct, under the Qwen Research License",
    QWEN2_7B: "Qwen2-7B-Instruct, under Apache-2.0",
  }
  parts = []
  if decoder in known:
    parts.append(f"A decoder of this size is usually {known[decoder]}.")
  if start:
    parts.append(
      "Weights keep the licence of those that a training started from; SigLIP"
      " so400m's is Apache-2.0."
    )
  parts.append(
    "Videos, images and questions of the training data have licences of their"
    " own. Whoever publishes these weights states them all here."
  )
  return " ".join(parts)


def write_card(
  folder: pathlib.Path,
  *,
  title: str,
  library: str,
  paragraphs: Sequence[str],
  facts: Mapping[str, str],
) -> None:
  """Writes README.md, the model card.

  Args:
    folder: to write into.
    title: of the card.
    library: that loads the folder.
    paragraphs: of text, the first below the title, the others below the table.
    facts: rows of the table.
  """
  lines = [
    "---",
    f"library_name: {library}",
    "license: other",
    "tags: [hour-llava, video-text-to-text]",
    "---",
    "",
    f"# {title}",
    "",
    paragraphs[0],
    "",
    "| what | value |",
    "|---|---|",
    *(f"| {key} | {_cell(value)} |" for key, value in facts.items()),
  ]
  for paragraph in paragraphs[1:]:
    lines += ["", paragraph]
  (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
  """Returns text as it may stand in a table."""
  return " ".join(text.split()).replace("|", "\\|")


def _decoder_keys(
  decoder: DecoderConfig,
  tokens: Tokens | None,
  dtype: str | None,
  max_length: int,
) -> dict[str, Any]:
  """Returns the keys of Qwen2's configuration, or of Qwen3's."""
  raw: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": decoder.width,
    "initializer_range": 0.02,
    "intermediate_size": decoder.mlp,
    "max_position_embeddings": max(_WINDOW, max_length),
    "max_window_layers": 28,
    "num_attention_heads": decoder.heads,
    "num_hidden_layers": decoder.layers,
    "num_key_value_heads": decoder.kv_heads,
    "rms_norm_eps": decoder.norm_eps,
    "rope_scaling": None,
    "rope_theta": decoder.rope_base,
    "sliding_window": None,
    "tie_word_embeddings": decoder.tied,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": decoder.vocab,
  }
  if decoder.qk_norm or decoder.head_dim:
    raw["head_dim"] = decoder.head_size
  if decoder.qk_norm or not decoder.attention_bias:
    raw["attention_bias"] = decoder.attention_bias
  if tokens is not None:
    raw |= {"bos_token_id": tokens.pad, "eos_token_id": tokens.end}
  if dtype is not None:
    raw["torch_dtype"] = dtype
  return raw


def _tower_keys(vision: VisionConfig) -> dict[str, Any]:
  """Returns SigLIP's keys, without the number of layers."""
  return {
    "hidden_size": vision.width,
    "image_size": vision.image_size,
    "intermediate_size": vision.mlp,
    "layer_norm_eps": vision.norm_eps,
    "num_attention_heads": vision.heads,
    "patch_size": vision.patch_size,
  }


def _tower_name(vision: VisionConfig) -> str:
  """Returns the name under which the official code fetches the tower.

  It knows so400m alone. Another tower gets a name that is no repository, so
  that nothing else is fetched in its place.
  """
  if vision == VisionConfig():
    return SO400M
  return (
    f"siglip-width{vision.width}-patch{vision.patch_size}-{vision.image_size}"
  )


def _write_json(path: pathlib.Path, raw: Mapping[str, Any]) -> None:
  text = json.dumps(dict(sorted(raw.items())), indent=2)
  path.write_text(text + "\n", encoding="utf-8")
