"""The vision tower and the pooling of frames against the official ones."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from hourjax.data.media import images
from hourjax.models.config import TINY, DecoderConfig, ModelConfig, VisionConfig
from hourjax.models.params import with_params
from hourjax.models.siglip import VisionTower, pool_frames, pool_matrix
from tests import golden_files, official
from tests.drawn_params import draw_nonzero_params

ATOL = 1e-5

NAMES = [
  name.removesuffix(".npz")
  for name, entry in golden_files.present().items()
  if "layers_after_deletion" in entry and name.endswith(".npz")
]
POOL = golden_files.npz("pool2d.npz")


class Alone:
  """One golden run of the tower alone."""

  def __init__(self, name):
    self.arrays = golden_files.npz(f"{name}.npz")
    entry = golden_files.meta_of(f"{name}.npz")
    raw = entry["config"]
    self.vision = VisionConfig(
      image_size=raw["image_size"],
      patch_size=raw["patch_size"],
      width=raw["hidden_size"],
      layers=raw["num_hidden_layers"] - 1,
      heads=raw["num_attention_heads"],
      mlp=raw["intermediate_size"],
    )
    assert self.vision.layers == entry["layers_after_deletion"]
    self.config = ModelConfig(self.vision, TINY.decoder)
    self.params = self._load(f"{name}.weights.safetensors")
    self.gradients = self._load(f"{name}.grads.safetensors")
    self.pixels = jnp.moveaxis(self.arrays["pixel_values"], 1, -1)

  def _load(self, name):
    tensors = load_file(golden_files.golden_path(name))
    return official.to_ours(tensors, self.config, "vision")

  def tower(self, params=None, dtype="float32"):
    return official.build(
      lambda: VisionTower(
        self.vision, dtype=dtype, remat="none", rngs=nnx.Rngs(0)
      ),
      params or self.params,
    )


@pytest.fixture(
  scope="module",
  params=[
    pytest.param(name, marks=[pytest.mark.slow] if n else [])
    for n, name in enumerate(sorted(NAMES, reverse=True))
  ],
)
def alone(request):
  return Alone(request.param)


def test_features(alone):
  got = jax.jit(alone.tower())(alone.pixels)
  np.testing.assert_allclose(got, alone.arrays["features"], rtol=0, atol=ATOL)


@pytest.mark.slow
def test_hidden_states(alone):
  tower = alone.tower()
  x = tower.patch(alone.pixels)
  x = x.reshape(len(x), -1, x.shape[-1]) + tower.position[...][None]
  states = [x]
  for i in range(alone.vision.layers):
    states.append(tower.encoder.layer(i)(states[-1]))
  for i, state in enumerate(states):
    key = f"hidden_states.{i}"
    expected = alone.arrays.get(key, state)
    np.testing.assert_allclose(state, expected, rtol=0, atol=ATOL, err_msg=key)
  # The norm that is never applied, yet imported.
  np.testing.assert_allclose(
    tower.post_norm(states[-1]),
    alone.arrays["post_layernorm_last_hidden_state"],
    rtol=0,
    atol=ATOL,
  )


@pytest.mark.slow
def test_gradients(alone):
  @jax.jit
  def gradients(params, pixels):
    def loss(params, pixels):
      return jnp.sum(alone.tower(params)(pixels) * alone.arrays["cotangent"])

    return jax.grad(loss, argnums=(0, 1))(params, pixels)

  of_params, of_pixels = gradients(alone.params, alone.pixels)
  official.assert_gradients(of_params, alone.gradients)
  official.assert_gradients(
    {"pixels": np.moveaxis(of_pixels, -1, 1)},
    {"pixels": alone.arrays["grad_pixel_values"]},
  )


@pytest.mark.slow
def test_bfloat16_features_stay_close(alone):
  """Eight bits of mantissa, through two layers: 1 % on average."""
  got = jax.jit(alone.tower(dtype="bfloat16"))(alone.pixels)
  assert got.dtype == jnp.bfloat16
  expected = alone.arrays["features"]
  error = np.abs(np.asarray(got, np.float32) - expected)
  assert error.mean() < 2**-6 * np.abs(expected).mean()


def test_pixels_beyond_the_last_patch_are_not_seen():
  """384 = 27 x 14 + 6; here 17 = 3 x 5 + 2."""
  vision = VisionConfig(17, 5, width=8, layers=1, heads=2, mlp=8)
  config = ModelConfig(
    vision, TINY.decoder, memaug_layers=0, dtype="float32", remat="none"
  )
  tower = jax.jit(
    with_params(
      config, draw_nonzero_params(config, "vision/"), prefix="vision/"
    ).vision
  )
  pixels = np.random.default_rng(0).normal(size=(1, 17, 17, 3))
  pixels = pixels.astype(np.float32)
  got = tower(jnp.asarray(pixels))
  assert got.shape == (1, 9, 8)
  pixels[:, 15:] = pixels[:, :, 15:] = 9.0
  np.testing.assert_array_equal(tower(jnp.asarray(pixels)), got)


# --- pooling ----------------------------------------------------------------


@pytest.mark.parametrize("key", [k for k in POOL if k.startswith("weights_")])
def test_pool_matrix(key):
  side, pooled = map(int, re.fullmatch(r"weights_(\d+)_to_(\d+)", key).groups())
  got = pool_matrix(side, pooled)
  np.testing.assert_allclose(got, POOL[key], rtol=0, atol=1e-6)
  np.testing.assert_allclose(got.sum(1), 1.0, atol=1e-6)


@pytest.mark.parametrize("key", [k for k in POOL if k.startswith("out_")])
def test_pool_frames(key):
  side, width = re.match(r"out_(\d+)_(\d+)", key).groups()
  features, expected = POOL[f"in_{side}_{width}"], POOL[key]
  pooled = round(expected.shape[1] ** 0.5)
  got = pool_frames(jnp.asarray(features), pooled)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_pooling_keeps_the_dtype():
  features = jax.random.normal(jax.random.key(0), (2, 27 * 27, 3))
  got = pool_frames(features.astype(jnp.bfloat16), 8)
  assert got.dtype == ml_dtypes.bfloat16
  expected = pool_frames(features, 8)
  np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.03)


def test_pooling_a_plane_reads_it_at_the_cell_centres():
  """Bilinear interpolation is exact on a plane (no centre is clipped here)."""
  y, x = np.mgrid[0:27, 0:27] + 0.5
  plane = (3 * y - 2 * x).reshape(1, -1, 1).astype(np.float32)
  y, x = (np.mgrid[0:8, 0:8] + 0.5) * 27 / 8
  got = pool_frames(jnp.asarray(plane), 8)
  np.testing.assert_allclose(got.ravel(), (3 * y - 2 * x).ravel(), atol=1e-4)


# --- pixels -----------------------------------------------------------------


def test_bytes_are_encoded_as_the_images_module_says():
  """uint8 pixels in a batch, and the floats that SigLIP's processor makes."""
  config = ModelConfig(
    VisionConfig(6, 2, width=8, layers=1, heads=2, mlp=8),
    DecoderConfig(8, width=8, layers=1, heads=2, kv_heads=1, mlp=8, tied=True),
    memaug_layers=0,
    dtype="float32",
    remat="none",
  )
  pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 6, 3), np.uint8)
  encode = jax.jit(with_params(config, draw_nonzero_params(config)).encode)
  got = encode(jnp.asarray(pixels))
  assert got.shape == (6, 9, 8)
  expected = encode(jnp.asarray(images.to_pixels(pixels)))
  np.testing.assert_allclose(got, expected, atol=1e-5)
