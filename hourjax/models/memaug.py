"""MemAug: kept tokens and the question read the whole memory.

See hourjax/README.md, MemAug. Another kind of block is a class in this file
with the methods of `MemAugBlock`, as a rule a subclass that overrides
`read_memory`, and a field of `ModelConfig` that `make_memaug` chooses it by.
What has parameters of its own needs official names in `weights.names`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hourjax.kernels.attention import key_attention
from hourjax.models.attention import Attention, KeysValues
from hourjax.models.config import (
  PLATFORM_ATTENTION,
  AttentionConfig,
  DecoderConfig,
  ModelConfig,
)
from hourjax.models.layers import Stack, layer_norm
from hourjax.models.linear import linear
from hourjax.parallel.rules import attention_sharding, constrain
from hourjax.parallel.sharded_gather import gather_rows

_NORM_EPS = 1e-5


class MemAugBlock(nnx.Module):
  """Computes one post-norm block over queries x and memory m.

    x = LN(x + SelfAttn(x))
    x = LN(x + CrossAttn(x, m))
    x = LN(x + MLP(x))

  Both attentions see all positions of their segment, and rotate the first
  half of each head's channels by position. Heads have the decoder's number
  and size, also where that size is not width / heads; all products add a
  bias, and queries and keys are not normed, whatever the decoder does.
  """

  def __init__(
    self,
    decoder: DecoderConfig,
    dtype: str,
    rngs: nnx.Rngs,
    config: AttentionConfig = PLATFORM_ATTENTION,
    init: float = 1.0,
  ):
    """Draws the parameters.

    Args:
      decoder: whose width, heads, head size and rotary base are used.
      dtype: of the computation.
      rngs: streams of random numbers.
      config: which implementation computes attention.
      init: see `ModelConfig.memaug_init`.
    """
    width = decoder.width
    attention = functools.partial(
      Attention,
      width=width,
      heads=decoder.heads,
      kv_heads=decoder.kv_heads,
      head_dim=decoder.head_size,
      rotary_dim=decoder.head_size // 2,
      rope_base=decoder.rope_base,
      out_bias=True,
      query_init=decoder.query_init,
      dtype=dtype,
      rngs=rngs,
      config=config,
    )
    norm = functools.partial(
      layer_norm, width, eps=_NORM_EPS, dtype=dtype, rngs=rngs
    )
    self.self_attn = attention(scope="memaug_self_attention")
    self.cross_attn = attention(scope="memaug_cross_attention")
    make = functools.partial(linear, dtype=dtype, rngs=rngs)
    self.fc1 = make(width, 4 * width, axes=("width", "mlp"))
    # The official code draws all weights with one deviation. By its own input,
    # which is four times as wide, this layer's would be half of the others'.
    self.fc2 = make(4 * width, width, axes=("mlp", "width"), variance=4.0)
    if init != 1.0:
      for last in (self.self_attn.o, self.cross_attn.o, self.fc2):
        last.kernel[...] = init * last.kernel[...]
    self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()

  def __call__(
    self,
    x: Float[Array, "B T D"],
    memory: Float[Array, "B S D"],
    *,
    memory_position: Int[Array, "B S"],
    **where: Int[Array, "..."],
  ) -> Float[Array, "B T D"]:
    """Computes the queries after this block.

    Args:
      x: queries.
      memory: memory tokens.
      memory_position: of the memory tokens.
      **where: positions and segments, as for `read_memory`.
    """
    cache = self.encode_memory(memory, memory_position)
    return self.read_memory(x, cache, **where)[0]

  @jax.named_scope("memaug_projections")
  def encode_memory(
    self, memory: Float[Array, "B S D"], position: Int[Array, "B S"]
  ) -> KeysValues:
    """Computes this block's keys and values of the memory.

    They do not depend on the queries, so that later questions reuse them.

    Args:
      memory: memory tokens.
      position: of the memory tokens.
    """
    return self.cross_attn.keys_values(memory, position)

  @jax.named_scope("memaug_projections")
  def read_memory(
    self,
    x: Float[Array, "B T D"],
    cache: KeysValues,
    probe_queries: Int[Array, "B W"] | None = None,
    *,
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    memory_segment: Int[Array, "B S"],
    reads_segment: Int[Array, "B T"],
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B S"] | None]:
    """Computes the queries after this block from a memory's keys and values.

    Args:
      x: queries.
      cache: keys and values of the memory, of `encode_memory`.
      probe_queries: indices of queries whose attention is returned; -1 is
        none.
      position: of the queries.
      segment: queries attend to the queries of their segment.
      memory_segment: of the memory tokens; 0 is padding.
      reads_segment: the memory segment that each query attends to.

    Returns:
      Queries, and the attention that each memory token gets from the probe
      queries, summed over them and all heads, float32; None without them.
    """
    x = self.norm1(x + self.self_attn(x, position, segment))
    read, weights = self._cross_attend(
      x,
      cache,
      probe_queries,
      position=position,
      memory_segment=memory_segment,
      reads_segment=reads_segment,
    )
    x = self.norm2(x + read)
    x = self.norm3(x + self.mlp(x))
    return constrain(x, "rows", "queries", None), weights

  def _cross_attend(
    self,
    x: Float[Array, "B T D"],
    cache: KeysValues,
    probe_queries: Int[Array, "B W"] | None,
    *,
    position: Int[Array, "B T"],
    memory_segment: Int[Array, "B S"],
    reads_segment: Int[Array, "B T"],
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B S"] | None]:
    """Returns what queries read, and the attention of the probe queries."""
    weights = None
    if probe_queries is not None:
      at = jnp.maximum(probe_queries, 0)
      reads = jnp.take_along_axis(reads_segment, at, axis=1)
      q = self.cross_attn.queries(
        gather_rows(x, probe_queries),
        jnp.take_along_axis(position, at, axis=1),
      )
      weights = key_attention(
        q,
        cache.k,
        # Segment 0 attends to nothing.
        jnp.where(probe_queries < 0, 0, reads),
        memory_segment,
        sharding=attention_sharding("cross"),
        **self.cross_attn.implementation(q),
      )
    read = self.cross_attn.attend(
      x, position, reads_segment, cache, memory_segment, kind="cross"
    )
    return read, weights

  @jax.named_scope("memaug_mlp")
  def mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Computes the feed-forward network, with exact GELU."""
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


def make_memaug(config: ModelConfig, *, rngs: nnx.Rngs) -> Stack:
  """Builds the scanned stack of `config.memaug_layers` blocks."""
  return Stack(
    lambda rngs: MemAugBlock(
      config.decoder, config.dtype, rngs, config.attention, config.memaug_init
    ),
    depth=config.memaug_layers,
    remat=config.remat,
    rngs=rngs,
    offload=config.offload,
  )
