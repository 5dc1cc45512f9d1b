"""MemAug: kept tokens and the question read the whole memory (SPEC 1)."""

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
  Remat,
)
from hourjax.models.layers import (
  Stack,
  layer_norm,
  linear,
)
from hourjax.parallel.rules import attention_sharding, constrain
from hourjax.parallel.sharded_gather import gather_rows

_NORM_EPS = 1e-5


class MemAugBlock(nnx.Module):
  """x = LN(x + SelfAttn(x)); x = LN(x + CrossAttn(x, m)); x = LN(x + MLP(x)).

  Both attentions see everything of their segment, and turn the first half of
  each head's channels by position.
  """

  def __init__(
    self,
    decoder: DecoderConfig,
    dtype: str,
    rngs: nnx.Rngs,
    config: AttentionConfig = PLATFORM_ATTENTION,
  ):
    width = decoder.width
    attention = functools.partial(
      Attention,
      width=width,
      heads=decoder.heads,
      kv_heads=decoder.kv_heads,
      rotary_dim=decoder.head_dim // 2,
      rope_base=decoder.rope_base,
      out_bias=True,
      dtype=dtype,
      rngs=rngs,
      config=config,
    )
    norm = functools.partial(
      layer_norm, width, eps=_NORM_EPS, dtype=dtype, rngs=rngs
    )
    self.self_attn, self.cross_attn = attention(), attention()
    make = functools.partial(linear, dtype=dtype, rngs=rngs)
    self.fc1 = make(width, 4 * width, axes=("width", "mlp"))
    self.fc2 = make(4 * width, width, axes=("mlp", "width"))
    self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()

  def __call__(
    self,
    x: Float[Array, "B T D"],
    memory: Float[Array, "B S D"],
    *,
    memory_position: Int[Array, "B S"],
    **where: Int[Array, "..."],
  ) -> Float[Array, "B T D"]:
    """Queries after this block; `where` as for `read_memory`."""
    return self.read_memory(
      x, self.encode_memory(memory, memory_position), **where
    )[0]

  def encode_memory(
    self, memory: Float[Array, "B S D"], position: Int[Array, "B S"]
  ) -> KeysValues:
    """What this block reads of the memory, whatever is asked."""
    return self.cross_attn.keys_values(memory, position)

  def read_memory(
    self,
    x: Float[Array, "B T D"],
    known: KeysValues,
    watched: Int[Array, "B W"] | None = None,
    *,
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    memory_segment: Int[Array, "B S"],
    reads_segment: Int[Array, "B T"],
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B S"] | None]:
    """Queries after this block, reading a memory that is remembered.

    Args:
      x: queries.
      known: of the memory.
      watched: indices of queries whose attention is looked at; -1 is none.
      position, segment: of the queries.
      memory_segment, reads_segment: which queries read what.

    Returns:
      Queries, and how much of the watched ones' attention each memory token
      gets, summed over them and all heads, float32.
    """
    x = self.norm1(x + self.self_attn(x, position, segment))
    shares = None
    if watched is not None:
      at = jnp.maximum(watched, 0)
      reads = jnp.take_along_axis(reads_segment, at, axis=1)
      shares = self._shares(
        gather_rows(x, watched),
        jnp.take_along_axis(position, at, axis=1),
        jnp.where(watched < 0, 0, reads),
        known,
        memory_segment,
      )
    read = self.cross_attn.read(
      x, position, reads_segment, known, memory_segment, kind="cross"
    )
    x = self.norm2(x + read)
    x = self.norm3(x + self.mlp(x))
    return constrain(x, "rows", "queries", None), shares

  def _shares(self, x, position, reads, known, memory_segment):
    q = self.cross_attn.queries(x, position)
    return key_attention(
      q,
      known.k,
      reads,
      memory_segment,
      sharding=attention_sharding("cross"),
      **self.cross_attn.implementation(q),
    )

  def mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


def make_memaug(
  decoder: DecoderConfig,
  *,
  layers: int,
  dtype: str,
  remat: Remat,
  rngs: nnx.Rngs,
  attention: AttentionConfig = PLATFORM_ATTENTION,
) -> Stack:
  """A scanned stack of `layers` MemAug blocks at the decoder's width."""
  return Stack(
    lambda rngs: MemAugBlock(decoder, dtype, rngs, attention),
    depth=layers,
    remat=remat,
    rngs=rngs,
  )
