"""The Qwen2 decoder (arXiv 2407.10671), also Qwen2.5's text model."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hourjax.models.config import DecoderConfig, Remat
from hourjax.models.layers import Attention, Stack, linear


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
    self.gate = linear(width, mlp, bias=False, dtype=dtype, rngs=rngs)
    self.up = linear(width, mlp, bias=False, dtype=dtype, rngs=rngs)
    self.down = linear(mlp, width, bias=False, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> Float[Array, "B L D"]:
    x = x + self.attn(self.norm1(x), position, segment, causal=True)
    h = self.norm2(x)
    return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Decoder(nnx.Module):
  """Embeddings in, final hidden states out; `logits` is the LM head."""

  def __init__(
    self, config: DecoderConfig, *, dtype: str, remat: Remat, rngs: nnx.Rngs
  ):
    self.config, self.dtype = config, dtype
    self.embedding = nnx.Param(
      nnx.initializers.normal(config.width**-0.5)(
        rngs.params(), (config.vocab, config.width)
      )
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
        config.width, config.vocab, bias=False, dtype=dtype, rngs=rngs
      )

  def embed(self, token: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """Word embeddings in the compute dtype. Ids below 0 read row 0."""
    rows = jnp.take(self.embedding[...], jnp.maximum(token, 0), axis=0)
    return rows.astype(self.dtype)

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
    if self.config.tied:
      kernel = self.embedding[...].T
    else:
      kernel = self.head.kernel[...]
    return jnp.einsum(
      "...d,dn->...n",
      hidden,
      kernel.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )


def rms_norm(config: DecoderConfig, dtype: str, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """RMSNorm with statistics in float32."""
  return nnx.RMSNorm(
    config.width,
    epsilon=config.norm_eps,
    dtype=jnp.dtype(dtype),
    use_fast_variance=False,
    rngs=rngs,
  )
