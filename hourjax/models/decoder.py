"""The language model: a causal decoder of the Qwen family.

`DecoderConfig` says which one. Qwen2 and Qwen2.5 (arXiv 2407.10671) have
biases on queries, keys and values. Qwen3 (arXiv 2505.09388) has none, norms
queries and keys in each head, and takes a head size of its own.
"""

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
  Offload,
  Remat,
)
from hourjax.models.layers import Stack, from_bits, rms_norm
from hourjax.models.linear import SEQUENCE, TOKENS, LeadingAxes, linear
from hourjax.parallel import vocabulary
from hourjax.parallel.rules import constrain


class DecoderLayer(nnx.Module):
  """Computes one pre-norm layer: causal attention, then a SwiGLU MLP."""

  def __init__(
    self,
    config: DecoderConfig,
    dtype: str,
    rngs: nnx.Rngs,
    attention: AttentionConfig = PLATFORM_ATTENTION,
  ):
    """Draws the parameters.

    Args:
      config: of the decoder.
      dtype: of the computation.
      rngs: streams of random numbers.
      attention: which implementation computes attention.
    """
    width, mlp = config.width, config.mlp
    norm = functools.partial(
      rms_norm, width, eps=config.norm_eps, dtype=dtype, rngs=rngs
    )
    self.norm1 = norm()
    self.attn = Attention(
      width=width,
      heads=config.heads,
      kv_heads=config.kv_heads,
      head_dim=config.head_size,
      rotary_dim=config.head_size,
      rope_base=config.rope_base,
      bias=config.attention_bias,
      out_bias=False,
      qk_norm_eps=config.norm_eps if config.qk_norm else None,
      query_init=config.query_init,
      dtype=dtype,
      rngs=rngs,
      config=attention,
      scope="decoder_attention",
    )
    self.norm2 = norm()
    make = functools.partial(
      linear, axes=("width", "mlp"), bias=False, dtype=dtype, rngs=rngs
    )
    self.gate, self.up = make(width, mlp), make(width, mlp)
    self.down = make(mlp, width, axes=("mlp", "width"))

  @jax.named_scope("decoder_linears")
  def __call__(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> Float[Array, "B L D"]:
    """Computes the layer over whole rows.

    Args:
      x: input of the layer.
      position: in each sample.
      segment: of the sample that a position belongs to; 0 is padding.
    """
    attended = self.attn(self.norm1(x), position, segment, causal=True)
    return self._add_mlp(x + attended)

  def prefill(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> tuple[Float[Array, "B L D"], KeysValues]:
    """Computes the layer as `__call__` does, and returns its KV cache too.

    Args:
      x: input of the layer.
      position: in each sample.
      segment: of the sample that a position belongs to.

    Returns:
      Output of the layer, and keys and values [B, L, K, C].
    """
    h = self.norm1(x)
    cache = self.attn.keys_values(h, position)
    attended = self.attn.attend(
      h, position, segment, cache, segment, kind="self", causal=True
    )
    return self._add_mlp(x + attended), cache

  def extend(
    self,
    x: Float[Array, "B n D"],
    cached: KeysValues,
    *,
    position: Int[Array, "B n"],
    length: Int[Array, "B"],
  ) -> tuple[Float[Array, "B n D"], KeysValues]:
    """Computes the layer for new tokens that follow cached ones.

    Args:
      x: input of the layer.
      cached: keys and values [B, S, K, C].
      position: of the new tokens.
      length: number of cached tokens in each row.

    Returns:
      Output of the layer, and keys and values [B, n, K, C] of the new tokens.
    """
    attended, new = self.attn.extend(self.norm1(x), position, cached, length)
    return self._add_mlp(x + attended, TOKENS), new

  def _add_mlp(
    self, x: Float[Array, "B L D"], lead: LeadingAxes = SEQUENCE
  ) -> Float[Array, "B L D"]:
    h = self.norm2(x)
    inner = jax.nn.silu(self.gate(h, lead)) * self.up(h, lead)
    return constrain(x + self.down(inner, lead), *lead, None)


class Decoder(nnx.Module):
  """Computes final hidden states from embeddings, and logits from those."""

  def __init__(
    self,
    config: DecoderConfig,
    *,
    dtype: str,
    remat: Remat,
    rngs: nnx.Rngs,
    offload: Offload = "device",
    attention: AttentionConfig = PLATFORM_ATTENTION,
  ):
    """Draws the parameters.

    Args:
      config: of the decoder.
      dtype: of the computation.
      remat: see `ModelConfig`.
      rngs: streams of random numbers.
      offload: see `ModelConfig`.
      attention: which implementation computes attention.
    """
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
      offload=offload,
    )
    self.norm = rms_norm(
      config.width, eps=config.norm_eps, dtype=dtype, rngs=rngs
    )
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
    """Looks up token embeddings in the compute dtype.

    Args:
      token: ids; those below 0 read row 0, for the caller to replace.
    """
    table = self.embedding[...]
    if table.dtype == jnp.uint16:  # bits of bfloat16, see `layers.Stack`
      return from_bits(vocabulary.embed(table, token, table.dtype))
    return vocabulary.embed(table, token, self.dtype)

  def embed_few(self, token: Int[Array, "B n"]) -> Float[Array, "B n D"]:
    """Looks up embeddings of so few tokens that the mesh need not divide them.

    Args:
      token: ids, as for `embed`.
    """
    rows = self.embedding[...].at[jnp.maximum(token, 0)].get(mode="clip")
    return constrain(from_bits(rows).astype(self.dtype), *TOKENS, None)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> Float[Array, "B L D"]:
    """Computes the final hidden states of whole rows.

    Args:
      x: embeddings.
      position: in each sample.
      segment: of the sample that a position belongs to; 0 is padding.
    """
    return self.norm(self.layers(x, position=position, segment=segment))

  def prefill(
    self,
    x: Float[Array, "B L D"],
    *,
    position: Int[Array, "B L"],
    segment: Int[Array, "B L"],
  ) -> KeysValues:
    """Computes the KV cache [layers, B, L, K, C] of prompts.

    Args:
      x: embeddings.
      position: in each prompt.
      segment: of the prompt that a position belongs to.
    """

    def step(
      layer: DecoderLayer, x: Float[Array, "B L D"], _: None
    ) -> tuple[Float[Array, "B L D"], KeysValues]:
      return layer.prefill(x, position=position, segment=segment)

    return self.layers.scan(step, x)[1]

  def extend(
    self,
    x: Float[Array, "B n D"],
    cached: KeysValues,
    length: Int[Array, "B"],
  ) -> tuple[Float[Array, "B n D"], KeysValues]:
    """Computes final hidden states of tokens that follow cached ones.

    Args:
      x: embeddings of the new tokens.
      cached: keys and values [layers, B, S, K, C].
      length: number of cached tokens in each row, which is also the position
        of the row's first new token.

    Returns:
      Hidden states, and keys and values [layers, B, n, K, C] to be cached.
    """
    position = length[:, None] + jnp.arange(x.shape[1])[None]

    def step(
      layer: DecoderLayer, x: Float[Array, "B n D"], cached: KeysValues
    ) -> tuple[Float[Array, "B n D"], KeysValues]:
      return layer.extend(x, cached, position=position, length=length)

    hidden, new = self.layers.scan(step, x, cached)
    return self.norm(hidden), new

  def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... N"]:
    """Computes float32 logits over the vocabulary."""
    return jnp.einsum(
      "...d,nd->...n",
      hidden,
      self.output_embedding.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )

  @property
  def output_embedding(self) -> Float[Array, "N D"]:
    """Returns the vectors whose products with hidden states are logits."""
    if self.config.tied:
      return self.embedding[...]
    return self.head.kernel[...].T
