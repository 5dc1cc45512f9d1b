"""The memory repository: every visual token of a row, in reading order."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def build_memory(
  visual: Float[Array, "B X D"],
  newline: Float[Array, "D"],
  blend_source: Int[Array, "B R 4"],
  blend_weight: Float[Array, "B R 4"],
  memory_source: Int[Array, "B S"],
) -> Float[Array, "B S D"]:
  """Gathers memory tokens; see `hourjax.batch` for the numbering.

  With two visual tokens a, b of two frames, memory_source [0, -1, 1, -1]
  gives the memory [a, newline, b, newline].
  """
  if blend_source.shape[1]:
    parts = jax.vmap(lambda v, i: v[i])(visual, blend_source)  # [B, R, 4, D]
    weight = blend_weight.astype(visual.dtype)
    blends = jnp.einsum("brfd,brf->brd", parts, weight)
    visual = jnp.concatenate([visual, blends], axis=1)
  last = jnp.broadcast_to(
    newline.astype(visual.dtype), (visual.shape[0], 1, visual.shape[2])
  )
  table = jnp.concatenate([visual, last], axis=1)
  return gather_rows(
    table, jnp.where(memory_source < 0, visual.shape[1], memory_source)
  )


def gather_rows(
  table: Float[Array, "B X D"], index: Int[Array, "B N"]
) -> Float[Array, "B N D"]:
  """table[b, index[b, n]]; an index below 0 reads row 0."""
  index = jnp.maximum(index, 0)
  return jax.vmap(lambda t, i: t.at[i].get(mode="clip"))(table, index)
