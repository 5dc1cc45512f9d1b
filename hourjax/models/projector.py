"""The projector: tower features to the decoder's width."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from hourjax.models.layers import linear


class Projector(nnx.Module):
  """Linear V -> D, exact GELU, Linear D -> D."""

  def __init__(self, vision: int, width: int, *, dtype: str, rngs: nnx.Rngs):
    self.fc1 = linear(
      vision, width, axes=("tower", None), dtype=dtype, rngs=rngs
    )
    self.fc2 = linear(
      width, width, axes=("width", None), dtype=dtype, rngs=rngs
    )

  def __call__(self, features: Float[Array, "B X V"]) -> Float[Array, "B X D"]:
    return self.fc2(jax.nn.gelu(self.fc1(features), approximate=False))
