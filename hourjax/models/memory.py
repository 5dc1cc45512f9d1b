"""The memory repository: every visual token of a row, in reading order."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hourjax.parallel import take


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
  return take.build_memory(stored, encoded, newline, memory_source)
