"""Names, shapes and counts of all parameters, against the official ones."""

import dataclasses
import math
import re

import numpy as np
import pytest

from hourjax.models.config import SIZES, TINY
from hourjax.models.params import init_params, param_shapes
from hourjax.training.optimizer import OptimizerConfig, split_params
from hourjax.weights.names import key_table
from tests import golden_cases, golden_files

REAL = golden_files.load_json("params_real.json") or {"shapes": {}}

# Learning rates of tower, projector, MemAug and decoder: hourjax/README.md,
# Training.
STAGES = {
  "stage1": (0.0, 0.0, 1e-4, 0.0),
  "stage2": (5e-6, 1e-4, 1e-4, 2e-5),
  "stage3": (0.0, 1e-4, 1e-4, 2e-5),
}
# Official names of components, ours.
COMPONENTS = {
  "image_newline": "newline",
  "llm": "decoder",
  "vision_tower": "vision",
  "mm_projector": "projector",
  "vision_resampler(memaug)": "memaug",
}

real = pytest.mark.parametrize("name", REAL["shapes"])


def _config(name):
  return SIZES[re.search("|".join(SIZES), name)[0]]


def _official_shapes(config):
  shapes, used = param_shapes(config), set()
  official = {}
  for entry in key_table(config):
    for path in entry.paths:
      assert path not in used
      used.add(path)
      if entry.layers:
        assert shapes[path][0] == entry.layers
    ours = [shapes[path][1 if entry.layers else 0 :] for path in entry.paths]
    for name in entry.names():
      assert name not in official
      official[name] = list(entry.official_shape(ours))
  assert used == set(shapes)
  return official


@real
def test_names_and_shapes(name):
  config = _config(name)
  expected = dict(REAL["shapes"][name])
  if config.decoder.tied:
    # Listed twice, stored once.
    assert REAL["totals"][name]["lm_head_tied_to_embed_tokens"]
    del expected["lm_head.weight"]
  assert _official_shapes(config) == expected
  assert len(expected) == REAL["totals"][name]["n_parameters_tensors"]


def test_names_and_shapes_of_the_tiny_model():
  expected = golden_files.load_json("params_tiny.json")
  if not expected:
    pytest.skip(golden_files.NO_GOLDEN)
  config, params = golden_cases.checkpoint()
  assert _official_shapes(config) == expected
  assert {p: v.shape for p, v in params.items()} == param_shapes(config)


@real
def test_counts(name):
  shapes, counts = param_shapes(_config(name)), REAL["totals"][name]["counts"]
  for official, ours in COMPONENTS.items():
    of_component = {
      path: shape
      for path, shape in shapes.items()
      if path.split("/")[0] == ours
    }
    assert sum(map(math.prod, of_component.values())) == counts[official], (
      official
    )
  assert _count(shapes) == counts["total"]
  assert set(counts) == {*COMPONENTS, "total"}
  per_block = [
    math.prod(shape[1:])
    for path, shape in shapes.items()
    if path.startswith("memaug/")
  ]
  assert sum(per_block) == REAL["totals"][name]["per_memaug_block"]


@real
def test_trainable_counts(name):
  shapes = param_shapes(_config(name))
  expected = REAL["totals"][name]["trainable"]
  assert set(expected) == set(STAGES)
  for stage, (vision, projector, memaug, decoder) in STAGES.items():
    rates = OptimizerConfig(vision, projector, memaug, decoder)
    trained, frozen = split_params(shapes, rates)
    assert _count(trained) == expected[stage], stage
    assert {**trained, **frozen} == shapes


def test_published_sizes_without_golden():
  """As in hourjax/README.md, Model."""
  totals = {"3b": 3_700_088_352, "7b": 8_676_494_880}
  for size, total in totals.items():
    assert _count(param_shapes(SIZES[size])) == total


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
  return sum(map(math.prod, shapes.values()))


def test_queries_may_begin_as_keys():
  """In the decoder and in MemAug; nothing else is drawn differently."""
  fields = {"heads": 4, "kv_heads": 2, "head_dim": 8}
  plain = dataclasses.replace(
    TINY, decoder=dataclasses.replace(TINY.decoder, **fields)
  )
  alike = dataclasses.replace(
    TINY, decoder=dataclasses.replace(TINY.decoder, query_init=0.5, **fields)
  )
  drawn, params = init_params(plain, 0), init_params(alike, 0)
  queries = {p for p in params if p.endswith("/q/kernel") and "vision" not in p}
  assert {p.split("/")[-3] for p in queries} == {
    "attn", "self_attn", "cross_attn"
  }  # fmt: skip
  for path, value in params.items():
    if path not in queries:
      np.testing.assert_array_equal(value, drawn[path], err_msg=path)
      continue
    key = np.asarray(params[path.replace("/q/", "/k/")])
    depth, width, _ = key.shape
    # Heads 0 and 1 read key head 0, heads 2 and 3 key head 1.
    heads = np.asarray(value).reshape(depth, width, 4, 8)
    expected = 0.5 * key.reshape(depth, width, 2, 8)[:, :, [0, 0, 1, 1]]
    np.testing.assert_array_equal(heads, expected, err_msg=path)


def test_a_fresh_memaug_may_begin_with_the_kept_tokens():
  """Its sublayers then add nothing; what is before them is drawn as ever."""
  drawn = init_params(TINY, 0)
  quiet = init_params(dataclasses.replace(TINY, memaug_init=0.0), 0)
  silent = {path for path, value in quiet.items() if not np.any(value)}
  silent -= {path for path, value in drawn.items() if not np.any(value)}
  memaug = "memaug/layers"
  assert silent == {
    f"{memaug}/self_attn/o/kernel",
    f"{memaug}/cross_attn/o/kernel",
    f"{memaug}/fc2/kernel",
  }
  for path in quiet.keys() - silent:
    np.testing.assert_array_equal(quiet[path], drawn[path], err_msg=path)
