"""Who computes attention is chosen in the configuration."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from configs import hourllava
from hourjax.errors import UserError
from hourjax.kernels.tpu.tiles import Tiles
from hourjax.models.attention import Attention
from hourjax.models.config import TINY, AttentionConfig
from hourjax.parallel.chips import CHIPS
from hourjax.training.config import build_experiment
from hourjax.training.workdir import config_diff


def _choice(config, *, dtype=jnp.bfloat16):
  """What the model asks of the attention call, compiled for v5e."""
  layer = nnx.eval_shape(
    lambda: Attention(
      width=16,
      heads=2,
      kv_heads=1,
      head_dim=8,
      rotary_dim=8,
      rope_base=1e4,
      out_bias=True,
      dtype="float32",
      rngs=nnx.Rngs(0),
      config=config,
    )
  )
  device = AbstractDevice(
    device_kind="TPU v5 lite", num_cores=1, platform="tpu"
  )
  mesh = AbstractMesh((1,), ("data",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    q = jnp.zeros((1, 1, 2, 8), dtype)
    return layer.implementation(q)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_platform_chooses_with_the_tiles_of_the_table(dtype):
  tiles = CHIPS["v5e"].attention_tiles(dtype)
  found = _choice(AttentionConfig(), dtype=dtype)
  assert found == {"implementation": None, "tiles": tiles}


def test_tiles_of_the_configuration():
  config = AttentionConfig(backward_tiles="256,512,256,128")
  tiles = CHIPS["v5e"].attention_tiles(jnp.bfloat16)
  assert _choice(config)["tiles"] == tiles._replace(
    backward=Tiles(256, 512, 256, 128)
  )


def test_another_implementation():
  found = _choice(AttentionConfig(implementation="reference"))
  assert found == {"implementation": "reference", "tiles": None}


def _config(**attention):
  config = hourllava.get_config("size=3b").to_dict()
  config["model"]["attention"] |= attention
  return config


@pytest.mark.parametrize(
  "attention, said",
  [
    (
      {"implementation": "cuda"},
      "choose platform, tpu, cudnn, triton or reference",
    ),
    ({"forward_tiles": "1024"}, "attention.forward_tiles is '1024'; give rows"),
  ],
)
def test_what_cannot_be_meant_is_refused(attention, said):
  with pytest.raises(UserError, match=said):
    build_experiment(_config(**attention))


def test_a_run_may_go_on_with_another_implementation():
  """So may one whose configuration was written before there was a choice."""
  new = dataclasses.asdict(
    build_experiment(_config(implementation="reference"))
  )
  old = _config()
  assert not config_diff(old, new)
  del old["model"]["attention"]
  assert build_experiment(old).model.attention == TINY.attention
  assert not config_diff(old, new)
