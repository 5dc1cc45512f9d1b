"""The Qwen2 decoder (arXiv 2407.10671), also Qwen2.5's text model."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hourjax.models.config import DecoderConfig, Remat
from hourjax.models.layers import Attention, Stack, linear
from hourjax.parallel import vocabulary
from hourjax.parallel.rules import constrain


class DecoderLayer(nnx.Module):
  """Pre-norm causal attention and SwiGLU."""

  def __init__(self, config: DecoderConfig, dtype: str, rngs: nnx.Rngs):
    width, mlp = config.width, config.mlp
    self.norm1 = rms_norm(config, dtype, rngs)
    self.attn = Attention(
      width=width,
      heads=config.heads,
      kv_heads=config.kv_heads,
      rotary_dim=config.head_dim,
      rope_base=config.rope_base,
      out_bias=False,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm2 = rms_norm(config, dtype, rngs)
    make = functools.partial(
      linear, axes=("width", "mlp"), bias=False, dtype=dtype, rngs=rngs
    )
    self.gate, self.up = make(width, mlp), make(width, mlp)
    self.down = make(mlp, width, axes=("mlp", "width"))

  def __call__(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> Float[Array, "B L D"]:
    x = x + self.attn(self.norm1(x), position, segment, causal=True)
    h = self.norm2(x)
    x = x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))
    return constrain(x, "rows", "positions", None)


class Decoder(nnx.Module):
  """Embeddings in, final hidden states out; `logits` is the LM head."""

  def __init__(
    self, config: DecoderConfig, *, dtype: str, remat: Remat, rngs: nnx.Rngs
  ):
    self.config, self.dtype = config, dtype
    self.embedding = nnx.Param(
      nnx.initializers.normal(config.width**-0.5)(
        rngs.params(), (config.vocab, config.width)
      ),
      axes=("words", "table"),
    )
    self.layers = Stack(
      lambda rngs: DecoderLayer(config, dtype, rngs),
      depth=config.layers,
      remat=remat,
      rngs=rngs,
    )
    self.norm = rms_norm(config, dtype, rngs)
    if not config.tied:
      self.head = linear(
        config.width,
        config.vocab,
        axes=("table", "words"),
        bias=False,
        dtype=dtype,
        rngs=rngs,
      )

  def embed(self, token: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """Word embeddings in the compute dtype. Ids below 0 read row 0."""
    return vocabulary.embed(self.embedding[...], token, self.dtype)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> Float[Array, "B L D"]:
    return self.norm(self.layers(x, position=position, segment=segment))

  def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... N"]:
    """Float32 logits over the vocabulary."""
    return jnp.einsum(
      "...d,nd->...n",
      hidden,
      self.words.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )

  @property
  def words(self) -> Float[Array, "N D"]:
    """Output vectors of the words."""
    if self.config.tied:
      return self.embedding[...]
    return self.head.kernel[...].T


def rms_norm(config: DecoderConfig, dtype: str, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """RMSNorm with statistics in float32."""
  return nnx.RMSNorm(
    config.width,
    epsilon=config.norm_eps,
    dtype=jnp.dtype(dtype),
    use_fast_variance=False,
    rngs=rngs,
  )
