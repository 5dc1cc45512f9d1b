"""Adapters against full training, and against their formulas in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hourjax.models import lora, quantization
from hourjax.models.config import TINY
from hourjax.models.linear import TOKENS, adapter_dropout, linear
from hourjax.models.lora import LoraConfig
from hourjax.models.params import param_axes, param_shapes, with_params

SHAPES = param_shapes(TINY)
IN, OUT, RANK = 128, 24, 3


def _adapter(config, kernel, seed=0):
  """Parameters of an adapter that changes something."""
  rng = np.random.default_rng(seed)
  own = lora.adapter_shapes(config, ["layer"], {"layer/kernel": kernel.shape})
  drawn = {
    path.rpartition("/")[2]: lora.draw(path, x, config, 1)
    for path, x in own.items()
  }
  drawn[lora.B] = jnp.asarray(
    rng.normal(size=drawn[lora.B].shape) * 0.1, jnp.float32
  )
  if config.dora:
    norms = lora.column_norms(kernel)
    drawn[lora.MAGNITUDE] = norms * jnp.asarray(
      rng.uniform(0.5, 1.5, norms.shape), jnp.float32
    )
  return drawn


def _layer(values):
  """A linear layer that has these parameters."""
  layer = linear(
    IN,
    OUT,
    axes=("width", "mlp"),
    dtype="float32",
    rngs=nnx.Rngs(0),
  )
  layer.bias[...] = jnp.linspace(-1, 1, OUT)
  for name, value in values.items():
    setattr(layer, name, nnx.Param(value))
  return layer


def _numbers(*shape):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _formula(x, kernel, bias, adapter, scale):
  """LoRA and DoRA in float64, as the papers have them."""
  x, kernel, bias = (np.asarray(v, np.float64) for v in (x, kernel, bias))
  a, b = (np.asarray(adapter[n], np.float64) for n in (lora.A, lora.B))
  whole = kernel + scale * a @ b
  if lora.MAGNITUDE in adapter:
    length = np.sqrt((whole**2).sum(0))
    whole = whole * np.asarray(adapter[lora.MAGNITUDE], np.float64) / length
  return x @ whole + bias


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["float32", "int8", "int4", "nf4"])
def test_a_layer_and_its_adapter_by_the_formula(dora, base):
  config = LoraConfig(rank=RANK, alpha=5.0, dora=dora)
  kernel, x = _numbers(IN, OUT) / 8, _numbers(2, 5, IN)
  adapter = _adapter(config, kernel)
  stored = {"kernel": kernel}
  if base != "float32":
    codes, scale = quantization.quantize(kernel, base)
    stored = {"kernel": codes, "kernel_scale": scale}
    kernel = quantization.dequantize(codes, scale, jnp.float32)
  layer = _layer(stored | adapter)
  expected = _formula(x, kernel, layer.bias[...], adapter, 5 / RANK)
  for lead in (("rows", "positions"), TOKENS):
    np.testing.assert_allclose(layer(x, lead), expected, rtol=2e-5, atol=2e-5)
  merged = lora.merge(kernel, adapter)
  np.testing.assert_allclose(
    x @ merged + layer.bias[...][None, None], expected, rtol=2e-5, atol=2e-5
  )
  # Another name would leave the layer as it was.
  plain = _layer(stored)(x)
  assert np.abs(np.asarray(plain) - expected).max() > 0.1


@pytest.mark.parametrize("base", ["float32", "int8", "nf4"])
def test_gradients_are_those_of_full_training_projected(base):
  """With dW of the whole kernel: dA = s dW B^T and dB = s A^T dW."""
  config = LoraConfig(rank=RANK, alpha=5.0)
  kernel, x, d_y = _numbers(IN, OUT), _numbers(2, 5, IN), _numbers(2, 5, OUT)
  adapter = _adapter(config, kernel)
  stored = {"kernel": kernel}
  if base != "float32":
    codes, scale = quantization.quantize(kernel, base)
    stored = {"kernel": codes, "kernel_scale": scale}
    kernel = quantization.dequantize(codes, scale, jnp.float32)

  def loss(adapter, x):
    return (_layer(stored | adapter)(x) * d_y).sum()

  def full(kernel, x):
    return (_layer({"kernel": kernel})(x) * d_y).sum()

  got, d_x = jax.grad(loss, (0, 1), allow_int=True)(adapter, x)
  whole, d_x_full = jax.grad(full, (0, 1))(lora.merge(kernel, adapter), x)
  s = 5 / RANK
  np.testing.assert_allclose(
    got[lora.A], s * whole @ adapter[lora.B].T, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    got[lora.B], s * adapter[lora.A].T @ whole, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(d_x, d_x_full, rtol=1e-4, atol=1e-5)


def test_gradients_of_dora_hold_the_lengths_fixed():
  config = LoraConfig(rank=RANK, alpha=5.0, dora=True)
  kernel, x, d_y = _numbers(IN, OUT), _numbers(2, 5, IN), _numbers(2, 5, OUT)
  adapter = _adapter(config, kernel)

  def loss(own):
    return (_layer({"kernel": kernel, **adapter, **own})(x) * d_y).sum()

  with jax.enable_x64(True):
    wide = {k: np.asarray(v, np.float64) for k, v in adapter.items()}
    s = 5 / RANK
    w = np.asarray(kernel, np.float64) + s * wide[lora.A] @ wide[lora.B]
    length = np.sqrt((w**2).sum(0))
    d_w = np.einsum(
      "abi,abo->io", np.asarray(x, np.float64), np.asarray(d_y, np.float64)
    )
    ratio = wide[lora.MAGNITUDE] / length
    expected = {
      lora.A: s * (d_w * ratio) @ wide[lora.B].T,
      lora.B: s * wide[lora.A].T @ (d_w * ratio),
      lora.MAGNITUDE: (d_w * w / length).sum(0),
    }
  got = jax.grad(loss)({name: adapter[name] for name in expected})
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4)


def test_dropout_drops_the_adapter_s_inputs_alone():
  config = LoraConfig(rank=RANK, dropout=0.25)
  kernel = _numbers(IN, OUT)
  adapter = _adapter(config, kernel)
  layer, x = _layer({"kernel": kernel, **adapter}), jnp.ones((4, 500, IN))
  plain = layer(x)
  with adapter_dropout(0.25, jax.random.key(3)):
    one, again = layer(x), layer(x)
  with adapter_dropout(0.25, jax.random.key(4)):
    other = layer(x)
  np.testing.assert_array_equal(one, again)
  assert np.abs(np.asarray(one - other)).max() > 1e-2
  # The mean over many positions is what it is without dropout.
  np.testing.assert_allclose(
    one.mean((0, 1)), plain.mean((0, 1)), rtol=0, atol=0.05
  )
  without = _layer({"kernel": kernel})
  with adapter_dropout(0.25, jax.random.key(3)):
    np.testing.assert_array_equal(without(x), _layer({"kernel": kernel})(x))


def test_layers_of_a_stack_drop_differently():
  own = lora.adapter_shapes(
    LoraConfig(rank=2, dropout=0.5),
    ["decoder/layers/layers/gate", "decoder/layers/layers/up"],
    SHAPES,
  )
  seeds = np.concatenate(
    [
      np.asarray(lora.draw(path, x, LoraConfig(rank=2, dropout=0.5), 0))
      for path, x in own.items()
      if path.endswith(lora.SEED)
    ]
  )
  assert len(seeds) == 4 == len(set(seeds.tolist()))


def test_targets_by_pattern_and_by_peft_s_words():
  def names(targets):
    found = lora.target_layers(LoraConfig(rank=1, targets=targets), SHAPES)
    return {lora.layer_name(path) for path in found}

  assert names("q_proj, v_proj") == {"decoder/attn/q", "decoder/attn/v"}
  assert names("decoder/*") == {
    *(f"decoder/attn/{x}" for x in "qkvo"),
    "decoder/gate",
    "decoder/up",
    "decoder/down",
  }
  assert names("projector/fc1,memaug/cross_attn/[qk]") == {
    "projector/fc1",
    "memaug/cross_attn/q",
    "memaug/cross_attn/k",
  }
  every = names("all-linear")
  assert every == names("decoder/*,memaug/*,projector/*")
  assert len(every) == 19
  assert not any("head" in name or "vision" in name for name in every)


@pytest.mark.parametrize("word", ["q", "decoder/attn", "vision/*", "*head", ""])
def test_an_unknown_target_is_named_with_those_there_are(word):
  with pytest.raises(
    ValueError, match=r"targets has .* none of .* decoder/attn/q"
  ):
    lora.target_layers(LoraConfig(rank=1, targets=f"q_proj,{word}"), SHAPES)


def test_a_rank_above_that_of_a_kernel_is_refused():
  layers = lora.target_layers(LoraConfig(rank=40), SHAPES)
  with pytest.raises(
    ValueError, match=r"rank is 40, and decoder/attn/k .* 64 x"
  ):
    lora.adapter_shapes(LoraConfig(rank=40), layers, SHAPES)


def test_every_added_parameter_has_as_many_axes_as_dimensions():
  config = LoraConfig(rank=2, dora=True, dropout=0.1, base="int8")
  layers = lora.target_layers(config, SHAPES)
  axes = param_axes(TINY)
  own = lora.adapter_shapes(config, layers, SHAPES)
  stored = lora.stored_shapes(config, SHAPES)
  added = {p: x for p, x in stored.items() if p not in SHAPES}
  assert len(added) == len(layers)
  for path, x in (own | added).items():
    assert len(lora.added_axes(path, axes)) == len(x.shape), path


def test_a_model_refuses_parameters_that_no_layer_has():
  params = {p: jnp.zeros(s) for p, s in SHAPES.items()}
  with pytest.raises(KeyError, match="decoder/norm/lora_a"):
    with_params(TINY, params | {"decoder/norm/lora_a": jnp.zeros(3)})


def test_a_model_without_a_tower():
  params = {p: jnp.zeros(s) for p, s in SHAPES.items()}
  rest = {p: x for p, x in params.items() if not p.startswith("vision/")}
  assert with_params(TINY, rest).newline[...].shape == (TINY.decoder.width,)
  del rest["newline"]
  with pytest.raises(KeyError, match="newline"):
    with_params(TINY, rest)


@pytest.mark.parametrize(
  "kind, error", [("int8", 0.01), ("int4", 0.15), ("nf4", 0.12)]
)
def test_rounding_errors_of_the_formats(kind, error):
  kernel = _numbers(3, 256, 40)
  codes, scale = quantization.quantize(kernel, kind)
  expected = quantization.quantized_shapes(kernel.shape, kind)
  assert [(x.shape, x.dtype) for x in (codes, scale)] == [
    (x.shape, x.dtype) for x in expected
  ]
  back = quantization.dequantize(codes, scale, jnp.float32)
  assert jnp.linalg.norm(back - kernel) < error * jnp.linalg.norm(kernel)
  # A layer of a stack has the codes that it has alone.
  one, _ = quantization.quantize(kernel[1], kind)
  np.testing.assert_array_equal(np.asarray(codes[1]), np.asarray(one))


def test_what_a_base_stores():
  stored = lora.stored_shapes(LoraConfig(rank=1, base="nf4"), SHAPES)
  kinds = {path: str(x.dtype) for path, x in stored.items()}
  assert kinds["decoder/layers/layers/gate/kernel"] == "uint4"
  assert kinds["decoder/embedding"] == "bfloat16"
  assert kinds["decoder/head/kernel"] == "bfloat16"
  assert kinds["decoder/norm/scale"] == "float32"
  # 48 inputs are no blocks of 64.
  assert kinds["projector/fc1/kernel"] == "bfloat16"
  wide = lora.stored_shapes(LoraConfig(rank=1, base="float32"), SHAPES)
  assert {str(x.dtype) for x in wide.values()} == {"float32"}
  assert dataclasses.asdict(LoraConfig())["rank"] == 0
