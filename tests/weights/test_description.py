"""config.json and what else describes an exported folder."""

import dataclasses
import json

import pytest

from hourjax.errors import UserError
from hourjax.models.config import HOUR_LLAVA_3B, HOUR_LLAVA_7B, TINY
from hourjax.weights import description
from hourjax.weights.config import read_config, read_rules
from hourjax.weights.own_keys import PublishedRules
from tests import golden_files
from tests.weights import folders

RULES = PublishedRules(
  {"spatial": "uniform", "temporal": "keyframe", "ratio": 2, "max_frames": 64},
  max_length=4096,
  single_image="plain",
  seed=7,
)
USUAL = PublishedRules({"spatial": "random"}, 32_768, "tiled", 0)
TOKENS = description.Tokens(end=151_645, pad=151_643)
# Of the file, not of the model; or written otherwise on purpose.
LEFT_OUT = {"_attn_implementation_autoset", "transformers_version"}


def _raw(folder):
  return json.loads((folder / "config.json").read_text())


def test_every_key_of_the_official_file(tmp_path):
  """That of the oracle's tiny model, which the official code wrote."""
  meta = golden_files.meta()
  if not meta:
    pytest.skip(golden_files.NO_GOLDEN)
  official = meta["files"]["tiny_full.weights.safetensors"]["config"]
  (tmp_path / "official").mkdir()
  sizes = meta["files"]["tiny_full.weights.safetensors"]["vision_config"]
  (tmp_path / "official/config.json").write_text(
    json.dumps(official | {"vision_config": sizes})
  )
  config = read_config(tmp_path / "official")
  description.write_config(config, tmp_path, rules=USUAL)
  ours = _raw(tmp_path)
  # Training switches the cache off; its tower has no name that one could fetch.
  other = {"use_cache": True, "mm_vision_tower": "siglip-width48-patch2-54"}
  for key, value in (official | other).items():
    if key not in LEFT_OUT:
      assert ours[key] == value, key
  assert ours["architectures"] == ["HourLlavaQwenForCausalLM"]
  assert read_config(tmp_path) == config


@pytest.mark.parametrize("config", [HOUR_LLAVA_3B, HOUR_LLAVA_7B])
def test_the_published_models(tmp_path, config):
  description.write_config(
    config, tmp_path, rules=USUAL, tokens=TOKENS, dtype="bfloat16"
  )
  raw = _raw(tmp_path)
  # What the official classes build their parts from.
  assert raw["mm_vision_tower"] == "google/siglip-so400m-patch14-384"
  assert raw["image_grid_pinpoints"][0] == [384, 384]
  assert len(raw["image_grid_pinpoints"]) == 36
  assert raw["mm_hidden_size"] == 1152 and raw["memaug_depth"] == 4
  assert raw["tie_word_embeddings"] == (config is HOUR_LLAVA_3B)
  assert raw["eos_token_id"] == 151_645 and raw["torch_dtype"] == "bfloat16"
  assert read_config(tmp_path) == config
  assert not description.official_problems(config, USUAL)


def test_rules_of_the_training_come_back(tmp_path):
  config = dataclasses.replace(folders.UNTIED, dtype="float32")
  description.write_config(config, tmp_path, rules=RULES)
  assert read_rules(tmp_path) == RULES
  assert read_config(tmp_path) == config
  raw = _raw(tmp_path)
  assert raw["spatial_sampling_type"] == "uniform"
  assert raw["image_aspect_ratio"] == "square"
  assert raw["tokenizer_model_max_length"] == 4096


@pytest.mark.parametrize(
  "own, message",
  [
    ({"model": {"memory_scale": 0.5}}, "hourjax.model has memory_scale=0.5"),
    ({"dtype": "int8"}, "dtype"),
    ({"positions": True}, "positions"),
    ({"seed": -1}, "seed"),
    ([], "hourjax is"),
  ],
)
def test_keys_of_another_version(tmp_path, own, message):
  description.write_config(folders.UNTIED, tmp_path)
  folders.describe(tmp_path, hourjax=own)
  with pytest.raises(UserError, match=message):
    read_config(tmp_path)


def test_what_the_official_code_cannot_run(tmp_path):
  decoder = dataclasses.replace(
    TINY.decoder, head_dim=24, qk_norm=True, attention_bias=False
  )
  config = dataclasses.replace(TINY, decoder=decoder, pool_side=4)
  said = "; ".join(description.official_problems(config, RULES))
  for words in (
    "decoder is Qwen3's",
    "no bias",
    "24 channels",
    "not SigLIP so400m",
    "4x4 tokens",
    "forgetting.temporal is keyframe",
    "forgetting.max_frames is 64",
  ):
    assert words in said
  description.write_config(config, tmp_path, rules=RULES)
  assert _raw(tmp_path)["model_type"] == "hour_llava_qwen3"
  assert read_config(tmp_path) == dataclasses.replace(config, remat="full")


def test_a_decoder_that_transformers_lacks(tmp_path):
  decoder = dataclasses.replace(TINY.decoder, attention_bias=False)
  with pytest.raises(UserError, match="attention_bias=False and qk_norm=False"):
    description.write_decoder_config(
      decoder, tmp_path, tokens=TOKENS, dtype="float32", max_length=10
    )


def test_licences_and_cells(tmp_path):
  note = description.licence_note(HOUR_LLAVA_3B.decoder, "stage2")
  assert "Qwen Research License" in note and "SigLIP" in note
  assert "Apache-2.0" in description.licence_note(HOUR_LLAVA_7B.decoder, "")
  assert "usually" not in description.licence_note(TINY.decoder, "")
  description.write_card(
    tmp_path,
    title="T",
    library="hourjax",
    paragraphs=["First.", "Last."],
    facts={"data set": "a|b\nc"},
  )
  text = (tmp_path / "README.md").read_text()
  assert text.startswith("---\nlibrary_name: hourjax\n")
  assert "\n| data set | a\\|b c |\n\nLast.\n" in text


def test_how_a_model_was_drawn_is_not_described(tmp_path):
  """It is of no meaning to weights that are there, and hinders no export."""
  config = dataclasses.replace(
    TINY,
    decoder=dataclasses.replace(TINY.decoder, query_init=0.3),
    memaug_init=0.1,
  )
  description.write_config(config, tmp_path, rules=RULES)
  text = (tmp_path / "config.json").read_text()
  assert "query_init" not in text and "memaug_init" not in text
  assert read_config(tmp_path).decoder == TINY.decoder
