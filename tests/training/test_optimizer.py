import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import hourllava
from hourjax.errors import UserError
from hourjax.models.config import TINY
from hourjax.models.params import param_shapes
from hourjax.training.config import build_experiment
from hourjax.training.optimizer import (
  COMPONENTS,
  OptimizerConfig,
  component,
  make_optimizer,
  schedule,
  split_params,
)

SHAPES = param_shapes(TINY)
# See hourjax/README.md, Training.
TRAINED = {
  1: {"memaug"},
  2: {"vision", "projector", "memaug", "decoder", "newline"},
  3: {"projector", "memaug", "decoder", "newline"},
}
ONE_EACH = {
  "vision/w": jnp.array([1.0, -2.0]),
  "projector/w": jnp.array([3.0]),
  "memaug/w": jnp.array([[4.0, 5.0]]),
  "decoder/w": jnp.array([6.0]),
  "newline": jnp.array([7.0]),
}


def _stage(number, size="3b"):
  config = hourllava.get_config(f"size={size},stage={number}")
  return build_experiment(config.to_dict()).optimizer


def _heads(paths):
  return {path.split("/")[0] for path in paths}


def _leaves(state, path):
  """Arrays of the optimizer state that belong to a parameter."""
  return [
    leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state)
    if jax.tree_util.DictKey(path) in keys
  ]


@pytest.mark.parametrize("stage", TRAINED)
def test_stages_train_what_the_paper_says(stage):
  trained, frozen = split_params(SHAPES, _stage(stage))
  assert _heads(trained) == TRAINED[stage]
  assert _heads(frozen) == _heads(SHAPES) - TRAINED[stage]
  assert {**trained, **frozen} == SHAPES
  assert len(trained) + len(frozen) == len(SHAPES)


def test_rates_of_the_stages():
  for stage in TRAINED:
    config = _stage(stage)
    # 5e-6 of the vision tower is only in stage 2.
    assert (config.vision == 5e-6) == (stage == 2)
    assert config.memaug == 1e-4
    assert (config.b1, config.b2, config.eps) == (0.9, 0.999, 1e-8)
    assert config.weight_decay == 0 and config.warmup == 0.03
  assert _stage(3, "7b").decoder == _stage(3).decoder / 2 == 1e-5


@pytest.mark.parametrize("stage", TRAINED)
def test_frozen_parts_have_no_optimizer_state(stage):
  config = _stage(stage)
  params = {path: np.zeros((2, 3), np.float32) for path in SHAPES}
  trained, frozen = split_params(params, config)
  state = make_optimizer(config, 100, trained).init(trained)
  for path in trained:
    assert [leaf.shape for leaf in _leaves(state, path)] == [(2, 3)] * 2
  for path in frozen:
    assert not _leaves(state, path)
  arrays = [x for x in jax.tree.leaves(state) if np.ndim(x)]
  assert len(arrays) == 2 * len(trained)


def test_newline_trains_with_the_decoder():
  assert component("newline") == "decoder"
  assert {component(path) for path in SHAPES} == set(COMPONENTS)
  only = OptimizerConfig(projector=0, memaug=0, decoder=1e-3)
  trained, _ = split_params(SHAPES, only)
  assert _heads(trained) == {"decoder", "newline"}


def test_nothing_trained():
  with pytest.raises(UserError, match=r"vision=0.0.*decoder=0.*raise one"):
    split_params(SHAPES, OptimizerConfig(projector=0, memaug=0, decoder=0))


def test_schedule():
  rate = schedule(2.0, 100, 0.03)
  values = [float(rate(step)) for step in range(101)]
  np.testing.assert_allclose(values[:4], [0, 2 / 3, 4 / 3, 2], rtol=1e-6)
  for step in (4, 50, 99):
    expected = 1 + math.cos(math.pi * (step - 3) / 97)
    assert values[step] == pytest.approx(expected, rel=1e-4)
  assert max(values) == values[3] == 2 and values[100] == 0
  assert float(schedule(2.0, 100, 0.0)(0)) == 2


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_are_adam_with_a_rate_for_each_component(decay):
  config = OptimizerConfig(
    vision=1e-2,
    projector=2e-2,
    memaug=3e-2,
    decoder=4e-2,
    b2=0.95,
    eps=0.5,
    weight_decay=decay,
    warmup=0.0,
  )
  steps, params = 4, ONE_EACH
  optimizer = make_optimizer(config, steps, params)
  state, rng = optimizer.init(params), np.random.default_rng(0)
  expected = {path: np.array(x, np.float64) for path, x in params.items()}
  m = dict.fromkeys(params, 0.0)
  v = dict.fromkeys(params, 0.0)
  for step in range(1, 4):
    grads = {p: rng.normal(size=x.shape) for p, x in expected.items()}
    updates, state = optimizer.update(
      {p: jnp.asarray(g, jnp.float32) for p, g in grads.items()}, state, params
    )
    params = optax.apply_updates(params, updates)
    for path, g in grads.items():
      m[path] = config.b1 * m[path] + (1 - config.b1) * g
      v[path] = config.b2 * v[path] + (1 - config.b2) * g**2
      mean = m[path] / (1 - config.b1**step)
      square = v[path] / (1 - config.b2**step)
      rate = config.rate(component(path))
      rate *= (1 + math.cos(math.pi * (step - 1) / steps)) / 2
      expected[path] -= rate * (
        mean / (np.sqrt(square) + config.eps) + decay * expected[path]
      )
  for path, value in expected.items():
    np.testing.assert_allclose(params[path], value, rtol=1e-5, err_msg=path)


@pytest.mark.slow
def test_clip_is_by_the_norm_of_all_gradients():
  rates = dict.fromkeys(COMPONENTS, 1.0)
  # A large epsilon, since Adam's own scaling would undo the clip.
  plain = OptimizerConfig(**rates, eps=1e3, warmup=0.0)
  clipped = dataclasses.replace(plain, clip=0.5)
  grads = jax.tree.map(jnp.ones_like, ONE_EACH)
  norm = math.sqrt(sum(x.size for x in grads.values()))
  first = {}
  for config in (plain, clipped):
    optimizer = make_optimizer(config, 10, ONE_EACH)
    first[config.clip], _ = optimizer.update(
      grads, optimizer.init(ONE_EACH), ONE_EACH
    )
  for path, update in first[0.5].items():
    np.testing.assert_allclose(
      update, first[0][path] * 0.5 / norm, rtol=1e-2, err_msg=path
    )
  small = jax.tree.map(lambda g: g * 0.1 / norm, grads)
  optimizer = make_optimizer(clipped, 10, ONE_EACH)
  kept, _ = optimizer.update(small, optimizer.init(ONE_EACH), ONE_EACH)
  np.testing.assert_allclose(
    kept["newline"], first[0]["newline"] * 0.1 / norm, rtol=1e-2
  )
