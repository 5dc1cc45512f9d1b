"""The memory repository: projected visual tokens of a row in reading order."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hourjax.models.layers import SEQUENCE, LeadingAxes, linear
from hourjax.parallel import sharded_gather


class Projector(nnx.Module):
  """Projects tower features to the decoder: linear, exact GELU, linear."""

  def __init__(self, vision: int, width: int, *, dtype: str, rngs: nnx.Rngs):
    """Draws the parameters.

    Args:
      vision: channels of the tower's features, V.
      width: channels of the decoder, D.
      dtype: of the computation.
      rngs: streams of random numbers.
    """
    self.fc1 = linear(
      vision, width, axes=("tower", None), dtype=dtype, rngs=rngs
    )
    self.fc2 = linear(
      width, width, axes=("width", None), dtype=dtype, rngs=rngs
    )

  @jax.named_scope("projector")
  def __call__(
    self, features: Float[Array, "a X V"], lead: LeadingAxes = SEQUENCE
  ) -> Float[Array, "a X D"]:
    """Projects features.

    Args:
      features: rows of stored tokens, or images of encoded ones.
      lead: logical axes of the first two dimensions, which differ for these.
    """
    hidden = jax.nn.gelu(self.fc1(features, lead), approximate=False)
    return self.fc2(hidden, lead)


def build_memory(
  stored: Float[Array, "B X D"],
  encoded: Float[Array, "B E D"],
  newline: Float[Array, "D"],
  blend_source: Int[Array, "B R 4"],
  blend_weight: Float[Array, "B R 4"],
  memory_source: Int[Array, "B S"],
) -> Float[Array, "B S D"]:
  """Gathers the memory tokens of each row.

  With two visual tokens a, b of two frames, memory_source [0, -1, 1, -1]
  gives the memory [a, newline, b, newline]. Visual tokens are numbered as in
  `hourjax.batch`.

  Args:
    stored: projected features of the feature store.
    encoded: projected tokens of frames and tiles that came as pixels.
    newline: the learned token.
    blend_source: visual tokens that are mixed into one, see `Batch`.
    blend_weight: of these tokens.
    memory_source: the visual token of each memory token; -1 is newline.
  """
  if blend_source.shape[1]:
    source = jnp.maximum(blend_source - stored.shape[1], 0)
    parts = jax.vmap(lambda v, i: v[i])(encoded, source)  # [B, R, 4, D]
    weight = blend_weight.astype(encoded.dtype)
    blends = jnp.einsum("brfd,brf->brd", parts, weight)
    encoded = jnp.concatenate([encoded, blends], axis=1)
  return sharded_gather.build_memory(stored, encoded, newline, memory_source)
