"""The projector: tower features to the decoder's width."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from hourjax.models.layers import SEQUENCE, Lead, linear


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
