"""On a CPU the steps get stacks of bfloat16 as bits, which stay in bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourjax.data.rows import Size
from hourjax.extraction.encoder import Encoder
from hourjax.inference import steps
from hourjax.inference.engine import row_spec
from hourjax.models.config import TINY, DecoderConfig
from hourjax.models.layers import layer_callback
from hourjax.models.params import (
  as_bits,
  narrow_dtype,
  param_shapes,
)
from hourjax.parallel.mesh import MeshConfig, make_mesh
from hourjax.training.batch_sharding import abstract_batch
from tests.drawn_params import draw_params
from tests.inference import models

CONFIG = dataclasses.replace(models.CONFIG, dtype="bfloat16")
WIDE = dataclasses.replace(
  TINY,
  decoder=DecoderConfig(
    vocab=512, width=256, layers=12, heads=4, kv_heads=2, mlp=1024, tied=True
  ),
  dtype="bfloat16",
)


@pytest.fixture(scope="module")
def params():
  return {
    path: jnp.asarray(value, narrow_dtype(path, CONFIG))
    for path, value in draw_params(CONFIG, 0).items()
  }


def test_bits_are_the_same_memory(params):
  bits = as_bits(params, CONFIG)
  kinds = {path: str(x.dtype) for path, x in bits.items()}
  assert kinds["decoder/layers/layers/gate/kernel"] == "uint16"
  assert kinds["memaug/layers/fc1/kernel"] == "uint16"
  assert kinds["vision/encoder/layers/fc1/kernel"] == "uint16"
  assert kinds["decoder/embedding"] == "uint16"  # of an untied model
  assert kinds["projector/fc1/kernel"] == "bfloat16"
  assert kinds["decoder/layers/layers/norm1/scale"] == "float32"
  for path, value in bits.items():
    assert value.unsafe_buffer_pointer() == params[path].unsafe_buffer_pointer()
    assert value.sharding == params[path].sharding


def _prefill(params, batch, start, config, **more):
  return steps.prefill(
    params, None, batch, start, config=config, capacity=128, **more
  )


def test_bits_compute_the_same(params):
  spec = row_spec(CONFIG, Size(decoder=128))
  mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
  batch = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), abstract_batch(spec, 1, mesh)
  )
  token = jax.random.randint(jax.random.key(0), (1, 128), 0, 640)
  batch = batch._replace(
    decoder_token=token,
    decoder_position=jnp.arange(128)[None],
    decoder_segment=jnp.ones((1, 128), jnp.int32),
  )
  start, seen = jnp.zeros(1, jnp.int32), []
  plain = _prefill(params, batch, start, CONFIG)
  on_layer = functools.partial(seen.append, 1)
  bits = _prefill(
    as_bits(params, CONFIG), batch, start, CONFIG, on_layer=on_layer
  )
  jax.block_until_ready(bits)
  jax.effects_barrier()
  assert len(seen) == CONFIG.decoder.layers
  for one, two in zip(plain, bits, strict=True):
    np.testing.assert_array_equal(one, two)
    assert np.isfinite(np.asarray(one, np.float32)).all()


def test_no_stack_is_made_in_float32():
  """What is compiled takes less than the stack has, let alone twice that."""
  mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
  batch = abstract_batch(row_spec(WIDE, Size(decoder=128)), 1, mesh)
  start = jax.ShapeDtypeStruct((1,), jnp.int32)

  def taken(stacked):
    abstract = {
      path: jax.ShapeDtypeStruct(
        shape,
        stacked if "/layers/" in path and dtype == jnp.bfloat16 else dtype,
      )
      for path, shape in param_shapes(WIDE).items()
      for dtype in [narrow_dtype(path, WIDE)]
    }
    compiled = steps.prefill.lower(
      abstract, None, batch, start, config=WIDE, capacity=128
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  stack = 2 * sum(
    int(np.prod(shape))
    for path, shape in param_shapes(WIDE).items()
    if path.startswith("decoder/layers") and path.endswith("kernel")
  )
  assert taken(jnp.uint16) < stack
  # Where this fails the compiler has learnt it, and the bits can go.
  assert taken(jnp.bfloat16) > 2 * stack


def test_the_tower_alone(params):
  pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3))
  pixels = pixels.astype(np.uint8)
  one = Encoder(draw_params(CONFIG, 0), CONFIG, batch_frames=2)
  two = Encoder(params, CONFIG, batch_frames=2)
  np.testing.assert_array_equal(one(pixels), two(pixels))
  assert one.fingerprint != two.fingerprint  # of what was given


def test_no_callback_by_default():
  with layer_callback(None):
    text = jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).as_text()
  assert "callback" not in text
