"""The Qwen2 decoder (arXiv 2407.10671), also Qwen2.5's text model."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hourjax.models.attention import Attention, KeysValues
from hourjax.models.config import (
  PLATFORM_ATTENTION,
  AttentionConfig,
  DecoderConfig,
  Remat,
)
from hourjax.models.layers import (
  SEQUENCE,
  TOKENS,
  Lead,
  Stack,
  from_bits,
  linear,
)
from hourjax.parallel import vocabulary
from hourjax.parallel.rules import constrain


class DecoderLayer(nnx.Module):
  """Pre-norm causal attention and SwiGLU."""

  def __init__(
    self,
    config: DecoderConfig,
    dtype: str,
    rngs: nnx.Rngs,
    attention: AttentionConfig = PLATFORM_ATTENTION,
  ):
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
      config=attention,
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
    read = self.attn(self.norm1(x), position, segment, causal=True)
    return self._after(x, read)

  def prefill(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> tuple[Float[Array, "B L D"], KeysValues]:
    """As calling it, and the keys and values to continue from."""
    h = self.norm1(x)
    known = self.attn.keys_values(h, position)
    read = self.attn.read(
      h, position, segment, known, segment, kind="self", causal=True
    )
    return self._after(x, read), known

  def extend(
    self,
    x: Float[Array, "B n D"],
    cached: KeysValues,
    *,
    position: Int[Array, "B n"],
    length: Int[Array, "B"],
  ) -> tuple[Float[Array, "B n D"], KeysValues]:
    """New tokens after `length` cached ones, and their keys and values."""
    read, new = self.attn.extend(self.norm1(x), position, cached, length)
    return self._after(x, read, TOKENS), new

  def _after(self, x, read, lead: Lead = SEQUENCE):
    x = x + read
    h = self.norm2(x)
    inner = jax.nn.silu(self.gate(h, lead)) * self.up(h, lead)
    return constrain(x + self.down(inner, lead), *lead, None)


class Decoder(nnx.Module):
  """Embeddings in, final hidden states out; `logits` is the LM head."""

  def __init__(
    self,
    config: DecoderConfig,
    *,
    dtype: str,
    remat: Remat,
    rngs: nnx.Rngs,
    attention: AttentionConfig = PLATFORM_ATTENTION,
  ):
    self.config, self.dtype = config, dtype
    self.embedding = nnx.Param(
      nnx.initializers.normal(config.width**-0.5)(
        rngs.params(), (config.vocab, config.width)
      ),
      axes=("words", "table"),
    )
    self.layers = Stack(
      lambda rngs: DecoderLayer(config, dtype, rngs, attention),
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
    table = self.embedding[...]
    if table.dtype == jnp.uint16:  # see `layers.Stack`
      return from_bits(vocabulary.embed(table, token, table.dtype))
    return vocabulary.embed(table, token, self.dtype)

  def embed_few(self, token: Int[Array, "B n"]) -> Float[Array, "B n D"]:
    """As `embed`, of tokens whose number the mesh need not divide."""
    rows = self.embedding[...].at[jnp.maximum(token, 0)].get(mode="clip")
    return constrain(from_bits(rows).astype(self.dtype), *TOKENS, None)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> Float[Array, "B L D"]:
    return self.norm(self.layers(x, position=position, segment=segment))

  def prefill(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> KeysValues:
    """Keys and values [layers, B, L, K, C] of a prompt."""

    def step(layer, x, _):
      return layer.prefill(x, position=position, segment=segment)

    return self.layers.scan(step, x)[1]

  def extend(
    self,
    x: Float[Array, "B n D"],
    cached: KeysValues,
    length: Int[Array, "B"],
  ) -> tuple[Float[Array, "B n D"], KeysValues]:
    """Final hidden states of tokens that follow cached ones.

    Args:
      x: embeddings.
      cached: [layers, B, S, K, C].
      length: of each row's cached tokens, and position of its first new one.

    Returns:
      Hidden states, and keys and values [layers, B, n, K, C] to be cached.
    """
    position = length[:, None] + jnp.arange(x.shape[1])[None]

    def step(layer, x, cached):
      return layer.extend(x, cached, position=position, length=length)

    hidden, new = self.layers.scan(step, x, cached)
    return self.norm(hidden), new

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
