"""The projector: tower features to the decoder's width."""
# MERGED hourjax.models.memory:
# The memory repository: every visual token of a row, in reading order.

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hourjax.models.layers import SEQUENCE, Lead, linear
from hourjax.parallel import sharded_gather


class Projector(nnx.Module):
  """Linear V -> D, exact GELU, Linear D -> D."""

  def __init__(self, vision: int, width: int, *, dtype: str, rngs: nnx.Rngs):
    self.fc1 = linear(
      vision, width, axes=("tower", None), dtype=dtype, rngs=rngs
    )
    self.fc2 = linear(
      width, width, axes=("width", None), dtype=dtype, rngs=rngs
    )

  def __call__(
    self, features: Float[Array, "a X V"], lead: Lead = SEQUENCE
  ) -> Float[Array, "a X D"]:
    """Rows of features, or images of them as `lead` says."""
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
  """Gathers memory tokens; see `hourjax.batch` for the numbering.

  With two visual tokens a, b of two frames, memory_source [0, -1, 1, -1]
  gives the memory [a, newline, b, newline].

  Args:
    stored: projected features of the store.
    encoded: projected tokens of frames and tiles that were encoded.
    newline: the learned token.
    blend_source, blend_weight, memory_source: see `Batch`.
  """
  if blend_source.shape[1]:
    source = jnp.maximum(blend_source - stored.shape[1], 0)
    parts = jax.vmap(lambda v, i: v[i])(encoded, source)  # [B, R, 4, D]
    weight = blend_weight.astype(encoded.dtype)
    blends = jnp.einsum("brfd,brf->brd", parts, weight)
    encoded = jnp.concatenate([encoded, blends], axis=1)
  return sharded_gather.build_memory(stored, encoded, newline, memory_source)
