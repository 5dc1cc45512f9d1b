"""Fresh parameters against statistics of the official initialisation.

The official code has two routes: `from_config` draws every weight with
deviation 0.02 and leaves the newline as memory that nobody wrote; the other
draws the newline with width ** -0.5. Ours agrees on norms, biases and the
newline. Weights have in_width ** -0.5 instead of 0.02: the same at the real
widths, and what a tiny model needs to learn from scratch. MemAug's second MLP
layer, whose input is four times as wide as the decoder, has width ** -0.5 too.
"""

import hashlib

import jax
import numpy as np
import pytest

from hourjax.models.config import HOUR_LLAVA_3B, HOUR_LLAVA_7B, TINY
from hourjax.models.params import init_params
from tests import golden_cases, golden_files, official
from tests.test_held import SAME_BITS

STATS = golden_files.load_json("init_stats.json")
FROM_CONFIG, FROM_MODULES = (
  STATS.get(route, {})
  for route in (
    "built_in_init_from_config",
    "built_by_initialize_vision_modules",
  )
)
NEWLINE = "model.image_newline"
WIDER = [name for name in FROM_CONFIG if name.endswith(".mlp.2.weight")]


OFFICIAL = 0.02
# Of TINY's parameters by seed 0, at the version of tests/held.
EARLIER = "745df9b6975e401deddf3d6208dc037396ab65f9529cfbe7a34916c7ed9d7286"


@pytest.fixture(scope="module")
def drawn():
  config, _ = golden_cases.checkpoint() if STATS else (TINY, None)
  params = jax.tree.map(np.asarray, init_params(config, seed=0))
  return config, params


def _check(ours, stats):
  """Both are samples of n numbers: five standard errors of the difference."""
  assert list(ours.shape) == stats["shape"]
  n = ours.size
  assert ours.std() == pytest.approx(stats["std"], rel=5 / n**0.5, abs=0)
  error = 5 * stats["std"] * (2 / n) ** 0.5
  assert ours.mean() == pytest.approx(stats["mean"], rel=0, abs=error)


@pytest.mark.slow
@pytest.mark.parametrize("name", [k for k in FROM_CONFIG if k != NEWLINE])
def test_agrees_with_the_official_init(drawn, name):
  config, params = drawn
  ours = official.to_official(params, config)[name]
  stats = dict(FROM_CONFIG[name])
  if stats["std"]:
    assert stats["std"] == pytest.approx(OFFICIAL, rel=0.05)
    width = config.decoder.width if name in WIDER else ours.shape[1]
    stats["std"] = width**-0.5
  _check(ours, stats)


@pytest.mark.parametrize("config", [HOUR_LLAVA_3B, HOUR_LLAVA_7B])
def test_weights_are_official_at_real_widths(config):
  assert config.decoder.width**-0.5 == pytest.approx(OFFICIAL, rel=0.2)


@pytest.mark.slow
@pytest.mark.skipif(not FROM_MODULES, reason=golden_files.NO_GOLDEN)
def test_newline_is_initialised(drawn):
  config, params = drawn
  ours = official.to_official(params, config)[NEWLINE]
  _check(ours, FROM_MODULES[NEWLINE])


@pytest.mark.slow
def test_every_parameter_is_finite_and_small(drawn):
  _, params = drawn
  for path, value in params.items():
    assert value.dtype == np.float32
    assert np.isfinite(value).all() and np.abs(value).max() < 2, path
  assert params["newline"].std() > 0.05


@pytest.mark.slow
def test_layers_differ_and_seeds_differ(drawn):
  config, params = drawn
  other = init_params(config, seed=1)
  for path, value in params.items():
    if not path.endswith("/kernel"):
      continue
    assert not np.array_equal(other[path], value), path
    if "/layers/" in path:
      assert not np.array_equal(value[0], value[1]), path


@pytest.mark.slow
@pytest.mark.skipif(not SAME_BITS, reason="another processor or jaxlib")
def test_draws_are_those_of_earlier_versions():
  """But for MemAug's fc2, which was drawn with half of its deviation."""
  params = jax.tree.map(np.asarray, init_params(TINY, seed=0))
  scaled = "memaug/layers/fc2/kernel"
  params[scaled] = params[scaled] / 2  # exact
  found = hashlib.sha256()
  for path, value in sorted(params.items()):
    found.update(path.encode() + value.tobytes())
  assert found.hexdigest() == EARLIER


@pytest.mark.slow
def test_same_seed_same_parameters(drawn):
  config, params = drawn
  again = init_params(config, seed=0)
  for path, value in params.items():
    np.testing.assert_array_equal(again[path], value)
