import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import hourllava
from hourjax.errors import UserError
from hourjax.models.config import TINY
from hourjax.models.params import param_shapes
from hourjax.training.checkpoint_format import named_arrays
from hourjax.training.config import build_experiment
from hourjax.training.optimizer import (
  COMPONENTS,
  OptimizerConfig,
  component,
  decays,
  make_optimizer,
  schedule,
  split_params,
  uses_muon,
)
from hourjax.weights.names import TOWER, key_table

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
  "decoder/layers/norm1/scale": jnp.array([8.0]),
  "memaug/layers/fc1/bias": jnp.array([9.0, -1.0]),
}
SPARED = {"decoder/layers/norm1/scale", "memaug/layers/fc1/bias"}
# Streams of a stage in thousands of samples, steps of an epoch and of its
# warm-up by size, counted by hand from hourjax/README.md, Training.
STEPS = {
  ("3b", 1): ([3200], 128, 25_000, 750),
  ("3b", 2): ([560], 128, 4375, 132),
  ("3b", 3): ([2525, 1925], 128, 34_767, 1044),
  ("7b", 1): ([3200], 128, 25_000, 750),
  ("7b", 2): ([560], 128, 4375, 132),
  ("7b", 3): ([2525, 1925], 256, 17_384, 522),
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
  for size, stage, rate in [
    ("3b", 1, 0), ("3b", 2, 2e-5), ("3b", 3, 2e-5),
    ("7b", 1, 0), ("7b", 2, 1e-5), ("7b", 3, 2e-5),
  ]:  # fmt: skip
    assert _stage(stage, size).decoder == rate


@pytest.mark.parametrize("size", ["3b", "7b"])
@pytest.mark.parametrize("stage", TRAINED)
def test_gradients_are_clipped_as_in_the_official_runs(stage, size):
  assert _stage(stage, size).clip == 1.0
  assert OptimizerConfig().clip == 0  # of runs that were saved without the key


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
  assert max(values) == values[3] == 2 and values[100] == 0 < values[99]
  assert float(schedule(2.0, 100, 0.0)(0)) == 2


def test_the_first_update_has_rate_0():
  """As in the official trainer, whose schedule starts at 0 too."""
  optimizer = make_optimizer(OptimizerConfig(warmup=0.03), 50, ONE_EACH)
  grads = jax.tree.map(jnp.ones_like, ONE_EACH)
  state, moved = optimizer.init(ONE_EACH), []
  for _ in range(3):
    updates, state = optimizer.update(grads, state, ONE_EACH)
    moved.append(float(updates["memaug/w"][0, 0]))
  # Half of the peak of 1e-4, and all of it: 3 % of 50 steps are two.
  np.testing.assert_allclose(moved, [0, -0.5e-4, -1e-4], rtol=1e-4)


@pytest.mark.parametrize(("size", "stage"), STEPS)
def test_rates_are_those_of_the_official_trainer(size, stage):
  """At every step of an epoch, within the rounding of float32."""
  pytest.importorskip("torch")
  optimization = pytest.importorskip("transformers.optimization")
  streams, batch, steps, rise = STEPS[size, stage]
  assert sum(math.ceil(1000 * n / batch) for n in streams) == steps
  config = _stage(stage, size)
  official = _official_schedule(optimization, config.warmup, steps)
  assert official.warmup == rise
  expected = np.array([official.factor(step) for step in range(steps)])
  assert expected[0] == 0 and expected[rise] == 1 and 0 < expected[-1] < 1e-6
  for name in COMPONENTS:
    if peak := config.rate(name):
      ours = schedule(peak, steps, config.warmup)(jnp.arange(steps))
      np.testing.assert_allclose(
        ours, peak * expected, rtol=1e-6, atol=2e-7 * peak
      )


@pytest.mark.parametrize("steps", [1, 2, 33, 34, 100, 101])
def test_warmup_of_short_runs_is_the_official_one(steps):
  """By the rates that a real optimizer has when it takes its steps."""
  torch = pytest.importorskip("torch")
  optimization = pytest.importorskip("transformers.optimization")
  official = _official_schedule(optimization, 0.03, steps)
  taken = []
  for _ in range(steps):
    taken.append(official.optimizer.param_groups[0]["lr"])
    official.optimizer.step()
    official.scheduler.step()
  assert isinstance(official.optimizer, torch.optim.Optimizer)
  ours = schedule(1.0, steps, 0.03)(jnp.arange(steps))
  np.testing.assert_allclose(ours, taken, rtol=1e-6, atol=2e-7)


def _official_schedule(optimization, warmup, steps):
  """The official trainer's schedule at a learning rate of 1."""
  import torch
  from transformers import TrainingArguments

  # The method reads nothing else of the arguments, whose own checks need
  # packages that are not installed here.
  share = types.SimpleNamespace(warmup_steps=warmup)
  rise = TrainingArguments.get_warmup_steps(share, steps)
  optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
  scheduler = optimization.get_cosine_schedule_with_warmup(
    optimizer, rise, steps
  )
  return types.SimpleNamespace(
    warmup=rise,
    factor=scheduler.lr_lambdas[0],
    optimizer=optimizer,
    scheduler=scheduler,
  )


def test_a_single_rate_is_that_of_all_that_is_trained():
  own = _stage(2)
  single = dataclasses.replace(own, single_rate=3e-5)
  assert [own.rate(name) for name in COMPONENTS] == [5e-6, 1e-4, 1e-4, 2e-5]
  assert {single.rate(name) for name in COMPONENTS} == {3e-5}
  # What is frozen stays frozen.
  first = dataclasses.replace(_stage(1), single_rate=3e-5)
  assert _heads(split_params(SHAPES, first)[0]) == {"memaug"}
  still = dataclasses.replace(single, warmup=0.0, eps=1e-12)
  grads = jax.tree.map(jnp.ones_like, ONE_EACH)
  optimizer = make_optimizer(still, 100, ONE_EACH)
  updates, _ = optimizer.update(grads, optimizer.init(ONE_EACH), ONE_EACH)
  for path, update in updates.items():
    np.testing.assert_allclose(update, -3e-5, rtol=1e-4, err_msg=path)


def test_decay_spares_what_the_official_trainer_spares():
  """By the names of Qwen2's and SigLIP's parameters in transformers."""
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  decoder = transformers.Qwen2ForCausalLM(
    transformers.Qwen2Config(
      vocab_size=32, hidden_size=16, intermediate_size=16,
      num_hidden_layers=TINY.decoder.layers, num_attention_heads=2,
      num_key_value_heads=1, tie_word_embeddings=False,
    )
  )  # fmt: skip
  tower = transformers.SiglipVisionModel(
    transformers.SiglipVisionConfig(
      hidden_size=16, intermediate_size=16, num_attention_heads=2,
      num_hidden_layers=TINY.vision.layers, image_size=28, patch_size=14,
      vision_use_head=False,
    )
  )  # fmt: skip
  officials = {"": decoder, TOWER: tower}
  names, spared = set(), set()
  for prefix, model in officials.items():
    own = {name for name, _ in model.named_parameters()}
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    names |= {prefix + name for name in own}
    spared |= {prefix + name for name in own - set(decayed)}
  seen = 0
  for entry in key_table(TINY):
    for name in entry.names():
      if name in names:
        seen += 1
        assert decays(entry.paths[0]) == (name not in spared), name
  assert seen > 40 and 0 < len(spared) < seen
  # Of the parts that transformers does not have, by the same rules.
  assert decays("newline") and decays("memaug/layers/fc1/kernel")
  assert not decays("memaug/layers/norm1/scale")
  assert not decays("projector/fc1/bias")
  kinds = {path.rpartition("/")[2] for path in SHAPES}
  assert kinds == {
    "bias", "embedding", "kernel", "newline", "position", "scale"
  }  # fmt: skip


def test_without_decay_the_state_is_what_it_was():
  """Checkpoints from before norms were spared are restored into it."""
  states = [
    make_optimizer(OptimizerConfig(weight_decay=decay), 10, ONE_EACH).init(
      ONE_EACH
    )
    for decay in (0.0, 0.1)
  ]
  constant = optax.adamw(lambda _: 1e-4, weight_decay=0.0)
  before = optax.partition(
    dict.fromkeys(COMPONENTS, constant),
    {path: component(path) for path in ONE_EACH},
  ).init(ONE_EACH)
  assert jax.tree.structure(states[0]) == jax.tree.structure(before)
  # A run with decay has its arrays under the same names too.
  plain, decayed = map(named_arrays, states)
  assert list(plain) == list(decayed)


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
        mean / (np.sqrt(square) + config.eps)
        + (decay if path not in SPARED else 0) * expected[path]
      )
  for path, value in expected.items():
    np.testing.assert_allclose(params[path], value, rtol=1e-5, err_msg=path)


def test_muon_updates_kernels_by_their_orthogonal_factor():
  """A stack of matrices is orthogonalised layer by layer; biases get Adam."""
  rng = np.random.default_rng(0)
  params = {
    "decoder/layers/layers/up/kernel": jnp.zeros((2, 8, 24)),
    "decoder/layers/layers/up/bias": jnp.zeros((2, 24)),
    "decoder/embedding": jnp.zeros((12, 8)),
    "projector/fc1/kernel": jnp.zeros((8, 8)),
  }
  config = OptimizerConfig(name="muon", projector=1e-2, decoder=2e-2, warmup=0)
  optimizer = make_optimizer(config, 10, params)
  adam = make_optimizer(dataclasses.replace(config, name="adamw"), 10, params)
  grads = {
    p: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    for p, x in params.items()
  }
  state = optimizer.init(params)
  updates, _ = optimizer.update(grads, state, params)
  plain, _ = adam.update(grads, adam.init(params), params)
  for path, update in updates.items():
    if not path.endswith("kernel"):
      np.testing.assert_array_equal(update, plain[path])
      continue
    for matrix, grad in zip(
      np.reshape(update, (-1, *update.shape[-2:])),
      np.reshape(grads[path], (-1, *update.shape[-2:])),
      strict=True,
    ):
      u, _, v = np.linalg.svd(grad, full_matrices=False)
      # Newton-Schulz leaves singular values of 0.7 to 1.2 (Muon's authors).
      scale = config.rate(component(path)) * 0.2 * max(matrix.shape) ** 0.5
      values = np.diag(-u.T @ matrix @ v.T) / scale
      assert (values > 0.6).all() and (values < 1.25).all()
      rest = np.linalg.norm(u.T @ matrix @ v.T + np.diag(values) * scale)
      assert rest < 1e-3 * scale
  # One moment for a kernel, two for everything else.
  for path in params:
    moments = 1 if path.endswith("kernel") else 2
    assert len(_leaves(state, path)) == moments, path


def test_muon_decays_kernels_and_spares_biases():
  """Without gradients all that moves is what decays."""
  params = {
    "memaug/layers/fc1/kernel": jnp.ones((2, 8, 16)),
    "memaug/layers/fc1/bias": jnp.ones((2, 16)),
    "decoder/embedding": jnp.ones((12, 8)),
  }
  rates = dict.fromkeys(("memaug", "decoder"), 1e-2)
  config = OptimizerConfig(name="muon", weight_decay=0.5, warmup=0, **rates)
  optimizer = make_optimizer(config, 10, params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  for path, update in updates.items():
    expected = 0.0 if path.endswith("bias") else -1e-2 * 0.5
    np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=path)


def test_muon_leaves_patches_and_embeddings_to_adam():
  chosen = {path for path in SHAPES if uses_muon(path)}
  assert {path.rpartition("/")[2] for path in chosen} == {"kernel"}
  assert {p for p in SHAPES if p.endswith("kernel")} - chosen == {
    "vision/patch/kernel"
  }


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
