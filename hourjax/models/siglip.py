"""The SigLIP vision tower without its last layer and final norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from hourjax.models.config import Remat, VisionConfig
from hourjax.models.layers import Stack, layer_norm
from hourjax.models.linear import IMAGES, linear


class EncoderLayer(nnx.Module):
  """Computes one pre-norm layer with full attention and tanh-GELU."""

  def __init__(self, config: VisionConfig, dtype: str, rngs: nnx.Rngs):
    """Draws the parameters.

    Args:
      config: of the tower.
      dtype: of the computation.
      rngs: streams of random numbers.
    """
    self.heads = config.heads
    width = config.width
    make = functools.partial(
      linear, axes=("tower", None), dtype=dtype, rngs=rngs
    )
    norm = functools.partial(
      layer_norm, width, eps=config.norm_eps, dtype=dtype, rngs=rngs
    )
    self.norm1, self.norm2 = norm(), norm()
    self.q, self.k, self.v, self.o = (make(width, width) for _ in range(4))
    self.fc1 = make(width, config.mlp)
    self.fc2 = make(config.mlp, width, axes=(None, "tower"))

  def __call__(self, x: Float[Array, "I P V"]) -> Float[Array, "I P V"]:
    """Computes the layer over the patches of each image."""
    h = self.norm1(x)
    q, k, v = (
      f(h, IMAGES).reshape(*h.shape[:2], self.heads, -1)
      for f in (self.q, self.k, self.v)
    )
    with jax.named_scope("tower_attention"):
      out = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    x = x + self.o(out, IMAGES)
    h = jax.nn.gelu(self.fc1(self.norm2(x), IMAGES), approximate=True)
    return x + self.fc2(h, IMAGES)


class VisionTower(nnx.Module):
  """Computes patch features of images (SigLIP, arXiv 2303.15343)."""

  def __init__(
    self, config: VisionConfig, *, dtype: str, remat: Remat, rngs: nnx.Rngs
  ):
    """Draws the parameters.

    Args:
      config: of the tower.
      dtype: of the computation.
      remat: see `ModelConfig`.
      rngs: streams of random numbers.
    """
    self.config, self.dtype = config, dtype
    self.patch = nnx.Conv(
      3,
      config.width,
      (config.patch_size, config.patch_size),
      strides=config.patch_size,
      padding="VALID",  # 384 = 27 x 14 + 6: the last 6 pixels are not used
      dtype=jnp.dtype(dtype),
      rngs=rngs,
    )
    self.position = nnx.Param(
      nnx.initializers.normal(config.width**-0.5)(
        rngs.params(), (config.side**2, config.width)
      )
    )
    self.encoder = Stack(
      lambda rngs: EncoderLayer(config, dtype, rngs),
      depth=config.layers,
      remat=remat,
      rngs=rngs,
    )
    # Published checkpoints carry this norm and never apply it; it is kept so
    # that weights go in and out without loss.
    self.post_norm = layer_norm(
      config.width, eps=config.norm_eps, dtype=dtype, rngs=rngs
    )

  @jax.named_scope("tower")
  def __call__(self, pixels: Float[Array, "I h w 3"]) -> Float[Array, "I P V"]:
    """Computes the features of side x side patches, row by row.

    Args:
      pixels: in [-1, 1].
    """
    x = self.patch(pixels.astype(self.dtype))
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = x + self.position[...].astype(self.dtype)[None]
    return self.encoder(x)


@functools.cache
def pool_matrix(side: int, pooled: int) -> np.ndarray:
  """Returns the matrix that resizes a square grid bilinearly.

  It has half-pixel centres and no antialiasing, as torch's
  `interpolate(mode="bilinear", align_corners=False)`. Rows and columns are
  resized independently, so that the matrix is kron(A, A). For side 4 and
  pooled 2, A = [[.5, .5, 0, 0], [0, 0, .5, .5]].

  Args:
    side: of the grid.
    pooled: side of the resized grid.

  Returns:
    float32 [pooled^2, side^2].
  """
  centre = (np.arange(pooled) + 0.5) * side / pooled - 0.5
  centre = np.clip(centre, 0, side - 1)
  low = np.minimum(centre.astype(int), side - 2) if side > 1 else [0] * pooled
  axis = np.zeros((pooled, side))
  for row, (at, first) in enumerate(zip(centre, low)):
    axis[row, first] = 1 - (at - first)
    if side > 1:
      axis[row, first + 1] = at - first
  return np.kron(axis, axis).astype(np.float32)


def pool_frames(
  features: Float[Array, "I P V"], pooled: int
) -> Float[Array, "I Q V"]:
  """Resizes patch features of frames to pooled x pooled tokens each.

  Args:
    features: of a square grid of patches.
    pooled: side of the resized grid.

  Returns:
    Tokens in the dtype of `features`, Q = pooled^2.
  """
  side = round(features.shape[1] ** 0.5)
  matrix = jnp.asarray(pool_matrix(side, pooled), features.dtype)
  return jnp.einsum("qp,ipv->iqv", matrix, features)
