"""Operations against a hand count and against the model's own products."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import partial_eval

from hourjax.data.rows import RowSpec, Size, empty_rows
from hourjax.models import flops
from hourjax.models.config import HOUR_LLAVA_3B, HOUR_LLAVA_7B, TINY
from hourjax.models.flops import Work, count_flops, sample_flops
from hourjax.models.params import param_shapes, with_params
from hourjax.training.optimizer import (
  COMPONENTS,
  OptimizerConfig,
  split_params,
)
from hourjax.training.train_step import loss_sum

STAGE3 = {"projector", "memaug", "decoder"}
# An hour: 3,600 frames of 65 tokens, 512 of 17 kept, a thousand of text; the
# hand count takes logits at all positions.
T, S, L = 9_700, 234_000, 9_713
HOUR = Work(
  images=0,
  stored=230_400,
  encoded=0,
  memory=S,
  queries=T,
  decoder=L,
  labels=L,
  self_pairs=T * T,
  cross_pairs=T * S,
  causal_pairs=L * L / 2,
)
# TFLOP of 3B, forward and with backward, as counted by hand before any code.
HAND = {
  "projector": (3.0, 8.0),
  "memaug_self_attention": (3.1, 10.8),
  "memaug_projections": (3.4, 10.1),
  "memaug_cross_attention": (74.5, 261),
  "memaug_mlp": (2.6, 7.8),
  "decoder_linears": (53.9, 162),
  "decoder_attention": (13.9, 48.8),
  "lm_head": (6.1, 18.1),
}


def test_an_hour_as_counted_by_hand():
  parts = count_flops(HOUR_LLAVA_3B, HOUR, STAGE3, executed=True)
  for name, (forward, both) in HAND.items():
    part = parts[name]
    # The hand count is rounded to a tenth.
    assert part.forward / 1e12 == pytest.approx(forward, rel=0.01, abs=0.06)
    assert (part.forward + part.backward) / 1e12 == pytest.approx(
      both, rel=0.01, abs=0.06
    )


def test_the_tower_learns_from_videos_of_at_most_128_frames():
  """Of longer ones that come as pixels only its forward pass is useful."""
  sizes = np.zeros((3, 7), np.int64)
  sizes[:, Size.names().index("frames")] = [128, 129, 256]
  work = flops.sample_work(HOUR_LLAVA_3B, sizes)
  assert work.images.tolist() == [128, 129, 256]
  tower = count_flops(HOUR_LLAVA_3B, work, {"vision"})["tower"]
  assert tower.backward[0] > tower.forward[0]
  assert tower.backward[1:].tolist() == [0, 0]
  np.testing.assert_allclose(
    tower.forward / work.images, tower.forward[0] / 128
  )


@pytest.mark.parametrize(
  ("config", "forward", "both"),
  [(HOUR_LLAVA_3B, 160, 526), (HOUR_LLAVA_7B, 319, 1033)],
)
def test_totals_of_an_hour(config, forward, both):
  parts = count_flops(config, HOUR, STAGE3, executed=True)
  assert sum(p.forward for p in parts.values()) / 1e12 == pytest.approx(
    forward, rel=0.01
  )
  assert sum(p.forward + p.backward for p in parts.values()) / 1e12 == (
    pytest.approx(both, rel=0.01)
  )


def test_one_decoder_layer_by_hand():
  """7B: two tokens through the weights of one layer, written out."""
  work = Work(*[0.0] * 10)._replace(decoder=2)
  layer = 3584 * 3584 * 2 + 3584 * 512 * 2 + 3 * 3584 * 18_944
  part = count_flops(HOUR_LLAVA_7B, work, STAGE3)["decoder_linears"]
  assert part.forward == 2 * 2 * layer * 28
  assert part.backward == 2 * part.forward


def test_tower_by_hand():
  """A frame: 2,399 TFLOP are 3,600 of them through 27 layers."""
  work = Work(*[0.0] * 10)._replace(images=3600)
  part = count_flops(HOUR_LLAVA_3B, work, STAGE3)["tower"]
  assert part.forward * 27 / 26 / 1e12 == pytest.approx(2399, rel=0.002)
  assert part.backward == 0


def test_useful_counts_nothing_twice():
  useful = count_flops(HOUR_LLAVA_3B, HOUR, STAGE3)
  executed = count_flops(HOUR_LLAVA_3B, HOUR, STAGE3, executed=True)
  for name, part in useful.items():
    assert part.again == 0
    assert part.forward == executed[name].forward
    if "attention" in name:
      assert part.backward == 2 * part.forward
      assert executed[name].backward == 2.5 * part.forward


def test_full_remat_computes_linears_again():
  parts = count_flops(HOUR_LLAVA_3B, HOUR, STAGE3, executed=True)
  memaug, decoder = parts["memaug_mlp"], parts["decoder_linears"]
  assert memaug.again == memaug.forward
  # All but the product with `down`.
  down = 2 * 9_713 * 36 * 2048 * 11_008
  assert decoder.again == pytest.approx(decoder.forward - down)
  assert parts["lm_head"].again == 0


def test_frozen_parts_have_no_weight_gradients():
  """Stage 1: only MemAug trains; gradients go through the decoder to it."""
  parts = count_flops(HOUR_LLAVA_3B, HOUR, {"memaug"})
  assert parts["projector"].backward == 0
  linears = parts["decoder_linears"]
  assert linears.backward == linears.forward
  # Weights of k and v on the memory, which itself needs no gradient.
  memory = 2 * S * 2 * 2048 * 256 * 4
  queries = parts["memaug_projections"].forward - memory
  assert parts["memaug_projections"].backward == memory + 2 * queries


def test_samples_are_an_array_and_add_up():
  sizes = np.array(
    [
      [230_400, 0, 0, 0, S, T, L],
      [0, 0, 0, 0, 0, 0, 100],
      [0, 2, 3, 7, 500, 60, 90],
    ]
  )
  each = sample_flops(HOUR_LLAVA_3B, sizes, STAGE3)
  assert each.shape == (3,) and each.dtype == np.float64
  for row, value in zip(sizes, each):
    alone = sample_flops(HOUR_LLAVA_3B, row[None], STAGE3)
    assert alone[0] == value
  work = flops.sample_work(HOUR_LLAVA_3B, sizes)
  assert work.labels.tolist() == [13, 50, 30]
  assert work.encoded.tolist() == [0, 0, 2 * 64 + 3 * 729]
  assert work.images.tolist() == [0, 0, 5]


# What the model multiplies --------------------------------------------------

_CAPACITY = Size(
  features=128, frames=2, tiles=1, blends=4, memory=300, queries=40, decoder=48
)
_ROWS = 2


@pytest.mark.parametrize(
  "trained, remat",
  [
    pytest.param({"memaug"}, "none", marks=pytest.mark.slow),
    pytest.param({"memaug"}, "full", marks=pytest.mark.slow),
    pytest.param({"projector", "memaug", "decoder"}, "full"),
    pytest.param(set(COMPONENTS), "none", marks=pytest.mark.slow),
    pytest.param(set(COMPONENTS), "full", marks=pytest.mark.slow),
    pytest.param({"decoder"}, "full", marks=pytest.mark.slow),
  ],
  ids=lambda value: (
    value if isinstance(value, str) else "+".join(sorted(value))
  ),
)
def test_the_model_multiplies_what_is_counted(trained, remat):
  """Every product with weights in the traced step, scans and all."""
  _check_products(dataclasses.replace(TINY, remat=remat), trained)


@pytest.mark.slow
def test_qwen3_multiplies_what_is_counted():
  """Heads whose size is not width / heads, in decoder and MemAug."""
  decoder = dataclasses.replace(
    TINY.decoder, head_dim=24, qk_norm=True, attention_bias=False
  )
  config = dataclasses.replace(TINY, decoder=decoder, remat="full")
  _check_products(config, {"projector", "memaug", "decoder"})


def _check_products(config, trained):
  found = _traced_products(config, trained)
  capacity = np.array([_CAPACITY.astuple()])
  work = flops.sample_work(config, capacity)
  parts = count_flops(config, work, trained, executed=True)
  counted = sum(
    _ROWS * part.total[0]
    for name, part in parts.items()
    if "attention" not in name and name != "lm_head"
  )
  counted -= _tower_attention(config, trained)
  assert found == counted + _pooling(config, trained)


def _traced_products(config, trained):
  rates = {
    name: float(name in trained)
    for name in ("vision", "projector", "memaug", "decoder")
  }
  params = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in param_shapes(config).items()
  }
  learnt, frozen = split_params(params, OptimizerConfig(**rates))
  vision = config.vision
  spec = RowSpec(
    _CAPACITY,
    config.pool_side**2,
    vision.side**2,
    vision.width,
    vision.image_size,
  )

  def loss(learnt, frozen, batch):
    return loss_sum(with_params(config, {**learnt, **frozen}), batch)

  closed = jax.make_jaxpr(jax.grad(loss))(
    learnt, frozen, empty_rows(spec, _ROWS)
  )
  used = [True] * len(closed.jaxpr.outvars)
  jaxpr = partial_eval.dce_jaxpr(closed.jaxpr, used)[0]
  return _products(jaxpr, 1, config.decoder.vocab)


def _products(jaxpr, times, vocabulary):
  """Operations of products without batch dimensions: those with weights."""
  found = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    shapes = [x.aval.shape for x in (*eqn.invars, *eqn.outvars)]
    if name == "dot_general" and not any(vocabulary in s for s in shapes):
      (contract, _), (batch, _) = eqn.params["dimension_numbers"]
      if not batch:
        depth = math.prod(shapes[0][i] for i in contract)
        found += times * 2 * depth * math.prod(shapes[-1])
    if name == "conv_general_dilated":
      found += times * 2 * math.prod(shapes[1][:-1]) * math.prod(shapes[-1])
    inner = times * eqn.params["length"] if name == "scan" else times
    for value in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr):
      if _is_jaxpr(value):
        inside = getattr(value, "jaxpr", value)
        found += _products(inside, inner, vocabulary)
  return found


def _is_jaxpr(value):
  return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _tower_attention(config, trained):
  """Operations of SigLIP's attention, which has batch dimensions."""
  vision = config.vision
  images = _ROWS * (_CAPACITY.frames + _CAPACITY.tiles)
  once = images * vision.layers * 4 * vision.side**4 * vision.width
  if "vision" not in trained:
    return once
  return once * (4 if config.remat == "full" else 3)


def _pooling(config, trained):
  """The product that pools frames, which is not counted: it is tiny."""
  vision = config.vision
  once = 2 * config.pool_side**2 * vision.side**2 * vision.width
  return _ROWS * _CAPACITY.frames * once * (2 if "vision" in trained else 1)
