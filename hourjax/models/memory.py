"""The memory repository: projected visual tokens of a row in reading order."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hourjax.models.linear import SEQUENCE, LeadingAxes, linear
from hourjax.parallel import sharded_gather
from hourjax.parallel.rules import constrain


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
    encoded = blend_tokens(
      encoded, blend_source - stored.shape[1], blend_weight
    )
  return sharded_gather.build_memory(stored, encoded, newline, memory_source)


def blend_tokens(
  encoded: Float[Array, "B E D"],
  source: Int[Array, "B R 4"],
  weight: Float[Array, "B R 4"],
) -> Float[Array, "B ER D"]:
  """Appends the tokens that are mixed of others.

  Args:
    encoded: projected tokens of frames and tiles.
    source: of each mixed token, indices into `encoded`; below 0 for none.
    weight: of these tokens.
  """
  parts = jax.vmap(lambda v, i: v[i])(encoded, jnp.maximum(source, 0))
  blends = jnp.einsum("brfd,brf->brd", parts, weight.astype(encoded.dtype))
  return jnp.concatenate([encoded, blends], axis=1)


def project_tokens(
  project: Callable[[Float[Array, "B N V"]], Float[Array, "B N D"]],
  features: Float[Array, "B X V"],
  encoded: Float[Array, "B E D"],
  newline: Float[Array, "D"],
  source: Int[Array, "B N"],
) -> Float[Array, "B N D"]:
  """Computes memory tokens from their features, each where it stands.

  The features are gathered before they are projected, and not their
  projections. They are data, so that the gather has no gradient: the one of
  `build_memory` needs two arrays as large as the memory, in float32.

  Args:
    project: the projector.
    features: of the feature store.
    encoded: projected tokens of frames and tiles that came as pixels.
    newline: the learned token.
    source: the visual token of each memory token, as for `build_memory`, where
      one device holds a whole memory.
  """
  tokens = project(sharded_gather.gather_rows(features, source))
  stored = features.shape[1]
  if encoded.shape[1]:
    others = sharded_gather.gather_rows(encoded, source - stored)
    tokens = jnp.where((source < stored)[..., None], tokens, others)
  newline = newline.astype(tokens.dtype)[None, None]
  return jnp.where(source[..., None] < 0, newline, tokens)


def memory_in_chunks(
  tokens: Callable[[Int[Array, "B N"]], Float[Array, "B N D"]],
  source: Int[Array, "B S"],
  chunk: int,
) -> Float[Array, "B S D"]:
  """Computes a memory so many tokens at a time, in the backward pass again.

  So what lies between features and memory is never there for all tokens.

  Args:
    tokens: computes the memory tokens of some sources, as `project_tokens`.
    source: of all memory tokens.
    chunk: number of tokens at a time.
  """
  rows, length = source.shape
  pieces = -(-length // chunk)
  source = jnp.pad(
    source, ((0, 0), (0, pieces * chunk - length)), constant_values=-1
  )
  source = source.reshape(rows, pieces, chunk).swapaxes(0, 1)
  found = jax.lax.map(jax.checkpoint(tokens), source)
  found = found.swapaxes(0, 1).reshape(rows, pieces * chunk, -1)
  return constrain(found[:, :length], "rows")
