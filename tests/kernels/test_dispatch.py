"""Who computes attention, by what is compiled for."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from hourjax.kernels import attention as module
from hourjax.kernels import cudnn, reference, triton
from hourjax.kernels.sharded import Sharding
from hourjax.kernels.tpu import call as tpu
from hourjax.kernels.tpu.tiles import AttentionTiles, Tiles
from hourjax.planning.compiler.compile_pool import ENVIRONMENT

TILES = AttentionTiles(*[Tiles(128, 128, 128, 128)] * 2, vmem=1 << 24)


def test_platform_of_the_default_device():
  assert module.platform() == "cpu"


@pytest.mark.parametrize("name", ["tpu", "gpu", "cpu"])
def test_platform_of_the_mesh_that_is_set(name):
  """Also a mesh of devices that are not there."""
  device = AbstractDevice(device_kind="any", num_cores=1, platform=name)
  mesh = AbstractMesh((1,), ("data",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert module.platform() == name


@pytest.mark.parametrize("name", ["tpu", "gpu", "cpu"])
def test_platform_of_a_default_device_by_name(name):
  with jax.default_device(name):
    assert module.platform() == name


def test_platform_of_the_mesh_that_is_given():
  mesh = Mesh(np.array(jax.devices()), ("data",))
  assert module.platform(Sharding(mesh)) == "cpu"


@pytest.mark.parametrize(
  "name, causal, expected",
  [
    ("tpu", False, tpu),
    ("tpu", True, tpu),
    ("cudnn", False, cudnn),
    ("cudnn", True, cudnn),
    ("triton", False, triton),
    ("triton", True, triton),
    ("reference", True, reference),
  ],
)
def test_backend(name, causal, expected):
  got = module.backend(name, causal, TILES)
  for function in ("forward", "backward"):
    wrapped = getattr(got, function)
    assert wrapped.func is getattr(expected, function)
    handed = {"tiles": TILES} if expected is tpu else {}
    assert wrapped.keywords == {"causal": causal} | handed
  assert got.takes_out == (expected is cudnn)


def test_the_tpu_kernels_need_tiles():
  with pytest.raises(ValueError, match=r"parallel\.chips\.attention_tiles"):
    module.backend("tpu", causal=False)


@pytest.mark.parametrize(
  "here, name", [("tpu", "tpu"), ("gpu", "cudnn"), ("cpu", "reference")]
)
def test_the_platform_chooses_unless_it_is_told(here, name):
  with jax.default_device(here):
    assert module.choose_implementation(None) == name
    assert module.choose_implementation(name) == name
    assert module.choose_implementation("reference") == "reference"


class _Gpu(NamedTuple):
  compute_capability: str


@pytest.mark.parametrize(
  "capability, dtype, dim, reason",
  [
    ("9.0", "bfloat16", 128, ""),
    ("12.0", "float16", 64, ""),
    ("8.0", "bfloat16", 128, r"needs compute capability 9\.0 .* has 8\.0"),
    ("gfx942", "bfloat16", 128, "this GPU has gfx942"),
    ("9.0", "float32", 128, "takes bfloat16 and float16, not float32"),
    ("9.0", "bfloat16", 256, "multiples of 8 up to 128, not 256"),
    ("9.0", "bfloat16", 12, "multiples of 8 up to 128, not 12"),
  ],
)
def test_what_cudnn_cannot_do_is_left_to_triton(
  monkeypatch, capability, dtype, dim, reason
):
  q = jnp.zeros((1, 2, 2, dim), dtype)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [_Gpu(capability)])
  expected = "triton" if reason else "cudnn"
  assert module.choose_implementation(None, q=q) == expected
  if reason:
    with pytest.raises(ValueError, match=f"{reason}.*; choose 'triton'"):
      module.choose_implementation("cudnn", q=q)
  else:
    assert module.choose_implementation("cudnn", q=q) == "cudnn"


@pytest.mark.parametrize(
  "name, message",
  [
    (
      "pallas",
      "called 'pallas'; choose tpu, cudnn, triton, reference, or none",
    ),
    ("tpu", "'tpu' runs on tpu, and this program is compiled for cpu"),
    ("triton", "'triton' runs on gpu, and this program is compiled for cpu"),
  ],
)
def test_other_implementations_are_refused(name, message):
  q = jnp.ones((1, 2, 2, 8))
  one = jnp.ones((1, 2), jnp.int32)
  with pytest.raises(ValueError, match=message):
    module.attention(q, q, q, one, one, implementation=name)


@pytest.mark.slow
def test_training_on_tpu_uses_the_kernels():
  """The demo's step by the real compiler: no option, no sweep repeated.

  MemAug's two attentions forward (with the repetition that large scores need)
  and backward, and the decoder's one, each in a scan over layers that are
  rematerialised.
  """
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "tests.training.compile_for_tpu",
      "configs/demo.py:stage=3",
      "v5e:1x1",
    ],
    env=os.environ | ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert not done.returncode, done.stderr[-3000:]
  assert json.loads(done.stdout.splitlines()[-1])["calls"] == {
    "attention_forward": 2,
    "attention_forward_running": 2,
    "attention_backward": 2,
    "attention_forward_causal": 1,
    "attention_forward_causal_running": 1,
    "attention_backward_causal": 1,
  }
