"""config.json: what it says is read or refused, never ignored."""

import dataclasses
import json

import pytest

from hourjax.errors import UserError
from hourjax.models.config import HOUR_LLAVA_3B, VisionConfig
from hourjax.weights.config import check_start, read_config, read_rules
from hourjax.weights.description import write_config
from tests.weights import folders

MODEL = HOUR_LLAVA_3B
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
GRIDS = [[a * 384, b * 384] for b in range(1, 7) for a in range(1, 7)]


@pytest.fixture
def folder(tmp_path):
  write_config(MODEL, tmp_path)
  return tmp_path


# Keys beside which the model is the same.
SAME = [
  {"rope_scaling": None},
  {"rope_scaling": {"type": "default"}},
  {"rope_scaling": {"rope_type": "default", "factor": None}},
  {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
  {"rope_theta": ..., "rope_parameters": {"rope_theta": 1000000}},
  {
    "rope_theta": ...,
    "rope_parameters": {
      "full_attention": {"rope_theta": 1e6, "rope_type": "default"}
    },
  },
  {"rope_parameters": {"partial_rotary_factor": 1.0}},
  {"head_dim": 128},
  {"head_dim": None},
  {"hidden_act": "silu"},
  {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
  {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 36},
  {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 0},
  {"use_sliding_window": True, "sliding_window": None},
  {"layer_types": ["full_attention"] * 36},
  {"attention_bias": True, "mlp_bias": False, "quantization_config": None},
  {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2},
  {"mm_hidden_size": 1152, "mm_spatial_pool_mode": "bilinear"},
  {"image_grid_pinpoints": GRIDS},
  {"image_grid_pinpoints": "(1x1),...,(6x6)"},
  {"model_type": "llava"},
  {"model_type": "qwen2", "mm_resampler_type": "memaug"},
  {"transformers_version": "5.24.0", "auto_map": {"x": [1]}, "use_cache": 1},
]


@pytest.mark.parametrize("keys", SAME)
def test_what_changes_nothing(folder, keys):
  folders.describe(folder, **keys)
  assert read_config(folder) == MODEL
  check_start(folder, MODEL)


# Keys that make another function of the same tensors, and how they are named.
OTHER = [
  ({"rope_scaling": YARN}, r"rope_scaling\.type is 'yarn'"),
  ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "'linear'"),
  ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic'"),
  ({"rope_scaling": {"rope_type": "llama3"}}, "'llama3'"),
  ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
  ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope'"),
  ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling\.factor is 4\.0"),
  ({"rope_parameters": YARN}, r"rope_parameters\.type is 'yarn'"),
  ({"rope_parameters": {"rope_theta": 1e4}}, "several rotary bases"),
  ({"rope_parameters": {"rope_theta": "1e6"}}, "is '1e6', no base"),
  ({"rope_parameters": {"rope_theta": True}}, "is True, no base"),
  ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "is 0.5"),
  ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
  ({"head_dim": 66}, "a head has 66 channels"),
  ({"hidden_act": "gelu"}, "hidden_act is 'gelu', implemented is 'silu'"),
  ({"mlp_bias": True}, "mlp_bias is True"),
  ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
  ({"num_experts": 60}, "num_experts is 60"),
  ({"quantization_config": {"bits": 4}}, "quantization_config is"),
  (
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 35},
    "sliding_window is 8 in layers from 35 on",
  ),
  (
    {"use_sliding_window": True, "sliding_window": ...},
    "sliding_window is 4096 in layers from 28 on",
  ),
  ({"layer_types": ["sliding_attention"] * 36}, "'sliding_attention'"),
  ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
  ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
  ({"model_type": "mistral"}, "model_type is 'mistral'"),
]


@pytest.mark.parametrize("keys, message", OTHER)
def test_another_decoder(folder, keys, message):
  folders.describe(folder, **keys)
  with pytest.raises(UserError, match=message):
    read_config(folder)
  with pytest.raises(UserError, match=message):
    check_start(folder, MODEL)


# Keys that make another of our decoders, and its fields.
VARIANTS = [
  ({"head_dim": 64}, {"head_dim": 64}),
  ({"attention_bias": False}, {"attention_bias": False}),
  (
    {"model_type": "qwen3", "head_dim": ..., "attention_bias": ...},
    {"qk_norm": True, "attention_bias": False},
  ),
  (
    {"model_type": "llava_qwen3", "head_dim": 64, "attention_bias": False},
    {"qk_norm": True, "attention_bias": False, "head_dim": 64},
  ),
  (  # transformers' Qwen3 has heads of 128 channels where nothing is said
    {"model_type": "qwen3", "num_attention_heads": 32, "head_dim": ...},
    {
      "qk_norm": True,
      "attention_bias": False,
      "heads": 32,
      "head_dim": 128,
    },
  ),
]


@pytest.mark.parametrize("keys, fields", VARIANTS)
def test_variants_of_the_decoder(folder, keys, fields):
  folders.describe(folder, **keys)
  config = dataclasses.replace(
    MODEL, decoder=dataclasses.replace(MODEL.decoder, **fields)
  )
  assert read_config(folder) == config
  check_start(folder, config)
  (key, *_) = fields
  with pytest.raises(UserError, match=rf"decoder\.{key} is {fields[key]}"):
    check_start(folder, MODEL)
  write_config(config, folder)
  assert read_config(folder) == config


def test_a_head_size_written_out_is_the_same_model(folder):
  decoder = dataclasses.replace(MODEL.decoder, head_dim=128)
  check_start(folder, dataclasses.replace(MODEL, decoder=decoder))


SHOWN = [
  ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
  ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'"),
  ({"mm_vision_select_layer": -1}, "mm_vision_select_layer is -1"),
  ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
  ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
  ({"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode is 'average'"),
  ({"mm_newline_position": "no_token"}, "mm_newline_position is 'no_token'"),
  ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
  ({"image_aspect_ratio": "pad"}, "image_aspect_ratio is 'pad'"),
  ({"spatial_sampling_type": "top"}, "spatial_sampling_type is 'top'"),
  ({"image_grid_pinpoints": GRIDS[:5]}, "image_grid_pinpoints is"),
  ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, .* width is 1152"),
]


@pytest.mark.parametrize("keys, message", SHOWN)
def test_other_ways_to_show_frames(folder, keys, message):
  """They are no part of the weights: a training may start from these."""
  folders.describe(folder, **keys)
  with pytest.raises(UserError, match=message):
    read_config(folder)
  check_start(folder, MODEL)


@pytest.mark.parametrize("key", ["rope_theta", "rope_parameters.rope_theta"])
def test_the_rotary_base_is_read(folder, key):
  if key == "rope_theta":
    folders.describe(folder, rope_theta=5e5)
  else:
    folders.describe(
      folder, rope_theta=..., rope_parameters={"rope_theta": 5e5}
    )
  assert read_config(folder).decoder.rope_base == 5e5


def test_what_is_not_said_is_as_in_qwen2(folder):
  folders.describe(
    folder, rope_theta=..., tie_word_embeddings=..., rms_norm_eps=...
  )
  decoder = read_config(folder).decoder
  assert (decoder.rope_base, decoder.tied, decoder.norm_eps) == (
    1e4,
    False,
    1e-6,
  )
  folders.describe(folder, num_key_value_heads=None)
  assert read_config(folder).decoder.kv_heads == 16


@pytest.mark.slow
def test_the_same_as_transformers():
  """Of its own Qwen2, as it writes it, with and without its defaults."""
  transformers = pytest.importorskip("transformers")
  for keys in ({}, {"rope_theta": 1e6}, {"tie_word_embeddings": True}):
    theirs = transformers.Qwen2Config(
      hidden_size=64, num_attention_heads=4, num_key_value_heads=2, **keys
    )
    raw = theirs.to_diff_dict()
    rope = getattr(theirs, "rope_parameters", None) or raw
    from hourjax.weights import config as ours

    parsed = ours._Config.model_validate(raw)
    decoder, problems = ours._decoder(parsed, raw)
    assert not problems
    assert decoder.rope_base == rope["rope_theta"]
    assert decoder.tied == theirs.tie_word_embeddings
    assert decoder.norm_eps == theirs.rms_norm_eps


def test_how_tokens_are_forgotten_is_read(folder):
  assert read_rules(folder).forgetting == {"spatial": "random"}
  folders.describe(folder, spatial_sampling_type="uniform")
  assert read_config(folder) == MODEL
  assert read_rules(folder).forgetting == {"spatial": "uniform"}


WRONG = [
  ("vocab_size", "151936"),
  ("vocab_size", 1.5),
  ("vocab_size", True),
  ("vocab_size", 10**30),
  ("hidden_size", 0),
  ("hidden_size", -2048),
  ("hidden_size", None),
  ("hidden_size", [2048]),
  ("num_hidden_layers", {}),
  ("num_hidden_layers", 10**9),
  ("num_attention_heads", "16"),
  ("num_attention_heads", 3),
  ("num_key_value_heads", 5),
  ("num_key_value_heads", 0),
  ("rope_theta", "1e6"),
  ("rope_theta", 0),
  ("rope_theta", float("nan")),
  ("rope_theta", float("inf")),
  ("rope_scaling", "yarn"),
  ("rope_parameters", [1]),
  ("rms_norm_eps", -1e-6),
  ("rms_norm_eps", None),
  ("tie_word_embeddings", "true"),
  ("tie_word_embeddings", 1),
  ("layer_types", "full_attention"),
  ("memaug_depth", -1),
  ("memaug_depth", "4"),
  ("pool_side", 0),
  ("mm_vision_tower", ["google/siglip-so400m-patch14-384"]),
  ("model_type", 7),
  ("vision_config", []),
  ("vision_config", {}),
  ("vision_config", {"image_size": 384}),
]


@pytest.mark.parametrize("key, value", WRONG)
def test_values_of_the_wrong_kind(folder, key, value):
  folders.describe(folder, **{key: value})
  with pytest.raises(UserError, match=key.split(".")[0]) as error:
    read_config(folder)
  assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
  "key, value",
  [
    ("image_size", "384"),
    ("patch_size", 0),
    ("patch_size", 400),
    ("hidden_size", None),
    ("num_attention_heads", 7),
    ("num_hidden_layers", 1),
    ("hidden_act", "quick_gelu"),
    ("num_channels", 4),
  ],
)
def test_towers_of_another_kind(folder, key, value):
  raw = json.loads((folder / "config.json").read_text())["vision_config"]
  folders.describe(folder, vision_config=raw | {key: value})
  with pytest.raises(UserError, match=rf"vision_config: .*{key}"):
    read_config(folder)


@pytest.mark.parametrize(
  "text, message",
  [
    ("[]", r"the whole is \[\]: input should be a JSON object"),
    ("null", "the whole is None"),
    ('"a"', "the whole is 'a'"),
    ("", "is not JSON"),
    ("{", "is not JSON"),
    ("[" * 100_000, "nested too deep"),
    ("version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer"),
  ],
)
def test_broken_files(tmp_path, text, message):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(UserError, match=message):
    read_config(tmp_path)


def test_a_byte_order_mark(folder):
  path = folder / "config.json"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert read_config(folder) == MODEL


def test_a_training_starts_from_the_same_model_only(folder):
  """The same tensors with other heads or another base are other weights."""
  check_start(folder, MODEL)
  for changes in ({"heads": 32}, {"rope_base": 1e4}, {"norm_eps": 1e-5}):
    decoder = dataclasses.replace(MODEL.decoder, **changes)
    (key,) = changes
    message = rf"decoder\.{key} is .*, config\.model\.decoder\.{key} is"
    with pytest.raises(UserError, match=message):
      check_start(folder, dataclasses.replace(MODEL, decoder=decoder))
  other = dataclasses.replace(MODEL, vision=VisionConfig(layers=25))
  with pytest.raises(UserError, match=r"vision\.layers is 26"):
    check_start(folder, other)
  # Weights without a tower.
  folders.describe(folder, vision_config=..., mm_vision_tower=...)
  check_start(folder, other)
  (folder / "config.json").unlink()
  check_start(folder, other)
