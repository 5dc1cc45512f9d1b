"""MemAug alone against the official module."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from hourjax.models.config import DecoderConfig, ModelConfig, VisionConfig
from hourjax.models.memaug import make_memaug
from tests import golden_files, interpreted, official

# The official float32 run is off its float64 one by up to 1.4e-6.
ATOL = 5e-6

NAMES = [
  name.removesuffix(".npz")
  for name, entry in golden_files.present().items()
  if "memaug_depth" in entry.get("config", {}) and name.endswith(".npz")
]
pytestmark = pytest.mark.skipif(not NAMES, reason=golden_files.NO_GOLDEN)


class Alone:
  """One golden run of the module alone."""

  def __init__(self, name):
    self.arrays = golden_files.npz(f"{name}.npz")
    raw = golden_files.meta_of(f"{name}.npz")["config"]
    decoder = DecoderConfig(
      vocab=1,
      width=raw["hidden_size"],
      layers=1,
      heads=raw["num_attention_heads"],
      kv_heads=raw["num_key_value_heads"],
      mlp=1,
      tied=True,
      rope_base=raw["rope_theta"],
    )
    assert decoder.head_size == raw["head_dim"]
    assert decoder.head_size // 2 == raw["rotary_dim"]
    self.config = ModelConfig(
      VisionConfig(),
      decoder,
      memaug_layers=raw["memaug_depth"],
      dtype="float32",
      remat="none",
    )
    weights = golden_files.golden_path(f"{name}.weights.safetensors")
    self.params = official.to_ours(load_file(weights), self.config, "memaug")
    path = golden_files.golden_path(f"{name}.grads.safetensors")
    self.gradients = load_file(path) if path else None

  def module(self, params=None, remat="none"):
    config = dataclasses.replace(self.config, remat=remat)
    return official.build(
      lambda: make_memaug(config, rngs=nnx.Rngs(0)), params or self.params
    )

  @functools.cached_property
  def inputs(self):
    a = {key: jnp.asarray(value)[None] for key, value in self.arrays.items()}
    ones = {key: jnp.ones_like(a[f"{key}_position_ids"]) for key in "qk"}
    return (
      a["x_q"],
      a["x_kv"],
      {
        "position": a["q_position_ids"],
        "segment": ones["q"],
        "memory_position": a["k_position_ids"],
        "memory_segment": ones["k"],
        "reads_segment": ones["q"],
      },
    )


@pytest.fixture(scope="module", params=NAMES)
def alone(request):
  return Alone(request.param)


@pytest.fixture(
  params=["reference", pytest.param("tpu", marks=pytest.mark.slow)]
)
def kernel(request, monkeypatch):
  """Who computes attention; the TPU kernels are interpreted."""
  if request.param == "tpu":
    interpreted.use_tpu_kernels(monkeypatch)


def test_output(alone, kernel):
  queries, memory, places = alone.inputs
  got = jax.jit(alone.module())(queries, memory, **places)[0]
  for key in ("out", "out_fp64"):
    np.testing.assert_allclose(got, alone.arrays[key], rtol=0, atol=ATOL)


@pytest.mark.slow
def test_every_step_of_every_block(alone):
  x, memory, places = alone.inputs
  stack = alone.module()
  for i in range(alone.config.memaug_layers):
    block = stack.layer(i)
    steps = {}
    steps["self_attn"] = block.self_attn(
      x, places["position"], places["segment"]
    )
    x = steps["norm1"] = block.norm1(x + steps["self_attn"])
    steps["cross_attn"] = block.cross_attn(
      x,
      places["position"],
      places["reads_segment"],
      context=memory,
      context_position=places["memory_position"],
      context_segment=places["memory_segment"],
    )
    x = steps["norm2"] = block.norm2(x + steps["cross_attn"])
    x = steps["norm3"] = block.norm3(x + block.mlp(x))
    for step, got in steps.items():
      key = f"inter.layer{i}.{step}"
      np.testing.assert_allclose(
        got[0], alone.arrays[key], rtol=0, atol=ATOL, err_msg=key
      )
  assert f"inter.layer{i + 1}.norm3" not in alone.arrays


@pytest.mark.parametrize(
  "kernel, remat",
  [
    pytest.param("reference", "none", marks=pytest.mark.slow),
    pytest.param("reference", "full", marks=pytest.mark.slow),
    pytest.param("reference", "dots", marks=pytest.mark.slow),
    # The interpreter's callbacks cannot be rematerialised.
    pytest.param("tpu", "none", marks=pytest.mark.slow),
  ],
  indirect=["kernel"],
)
def test_gradients(alone, kernel, remat):
  queries, memory, places = alone.inputs

  @jax.jit
  def gradients(params, queries, memory):
    def loss(params, queries, memory):
      out = alone.module(params, remat)(queries, memory, **places)
      return jnp.sum(out[0] * alone.arrays["cotangent"])

    return jax.grad(loss, argnums=(0, 1, 2))(params, queries, memory)

  of_params, of_queries, of_memory = gradients(alone.params, queries, memory)
  official.assert_gradients(
    {"x_q": of_queries[0], "x_kv": of_memory[0]},
    {key: alone.arrays[f"grad_{key}"] for key in ("x_q", "x_kv")},
  )
  if alone.gradients is not None:
    official.assert_gradients(
      of_params,
      official.to_ours(alone.gradients, alone.config, "memaug"),
    )


@pytest.mark.slow
def test_samples_share_a_row_and_one_memory(alone):
  """Both read memory 1, neither sees the other or the row's second memory."""
  queries, memory, places = alone.inputs
  half = queries.shape[1] // 2
  run = jax.jit(lambda x, m, p: alone.module()(x, m, **p))
  expected = [
    run(
      queries[:, part],
      memory,
      {
        key: value if key.startswith("memory") else value[:, part]
        for key, value in places.items()
      },
    )
    for part in (slice(half), slice(half, None))
  ]
  twice = {
    key: jnp.concatenate([value, 2 * value], axis=1)
    if key.startswith("memory")
    else value
    for key, value in places.items()
  }
  twice["segment"] = places["segment"].at[:, half:].set(2)
  both = jnp.concatenate([memory, -memory], axis=1)
  got = run(queries, both, twice)
  np.testing.assert_allclose(
    got, jnp.concatenate(expected, axis=1), rtol=0, atol=ATOL
  )
