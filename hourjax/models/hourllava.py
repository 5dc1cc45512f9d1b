"""Hour-LLaVA: encoder, memory, MemAug and decoder, composed.

The model does not know modalities: the layout (`hourjax.data.layout`) has
turned every sample into gathers before it gets here.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from hourjax.batch import Batch
from hourjax.models.config import ModelConfig
from hourjax.models.memaug import make_memaug
from hourjax.models.memory import build_memory, gather_rows
from hourjax.models.projector import Projector
from hourjax.models.qwen2 import Decoder
from hourjax.models.siglip import VisionTower, pool_frames


class HourLLaVA(nnx.Module):
  """batch -> memory -> MemAug -> decoder."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    width, dtype, remat = config.decoder.width, config.dtype, config.remat
    self.vision = VisionTower(
      config.vision, dtype=dtype, remat=remat, rngs=rngs
    )
    self.projector = Projector(
      config.vision.width, width, dtype=dtype, rngs=rngs
    )
    self.newline = nnx.Param(
      nnx.initializers.normal(width**-0.5)(rngs.params(), (width,))
    )
    if config.memaug_layers:
      self.memaug = make_memaug(
        config.decoder,
        layers=config.memaug_layers,
        dtype=dtype,
        remat=remat,
        rngs=rngs,
      )
    self.decoder = Decoder(config.decoder, dtype=dtype, remat=remat, rngs=rngs)

  def __call__(self, batch: Batch) -> Float[Array, "B L D"]:
    """Final hidden states of the decoder; `logits` turns them into words."""
    return self.decode(self.embeddings(batch), batch)

  def decode(
    self, embeddings: Float[Array, "B L D"], batch: Batch
  ) -> Float[Array, "B L D"]:
    """Runs the decoder over embeddings laid out as `batch` says."""
    return self.decoder(
      embeddings,
      position=batch.decoder_position,
      segment=batch.decoder_segment,
    )

  def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... N"]:
    """Float32 logits over the vocabulary."""
    return self.decoder.logits(hidden)

  def embeddings(self, batch: Batch) -> Float[Array, "B L D"]:
    """Decoder input: words, with MemAug's outputs in the visual slots."""
    words = self.decoder.embed(batch.decoder_token)
    if not batch.memory_source.shape[1]:
      return words
    augmented = self.augment(batch)
    seen = gather_rows(augmented, batch.decoder_source)
    return jnp.where(batch.decoder_token[..., None] >= 0, words, seen)

  def augment(self, batch: Batch) -> Float[Array, "B T D"]:
    """Queries after they have read the memory (as they are without MemAug)."""
    memory = self.memory(batch)
    kept = gather_rows(memory, batch.query_source)
    words = self.decoder.embed(batch.query_token)
    queries = jnp.where(batch.query_token[..., None] >= 0, words, kept)
    if not self.config.memaug_layers:
      return queries
    return self.memaug(
      queries,
      memory,
      position=batch.query_position,
      segment=batch.query_segment,
      memory_position=batch.memory_position,
      memory_segment=batch.memory_segment,
      reads_segment=batch.query_reads,
    )

  def memory(self, batch: Batch) -> Float[Array, "B S D"]:
    """The projected memory repository of each row."""
    return build_memory(
      self.projector(self.visual_features(batch)),
      self.newline[...],
      batch.blend_source,
      batch.blend_weight,
      batch.memory_source,
    )

  def visual_features(self, batch: Batch) -> Float[Array, "B X V"]:
    """Stored features, then encoded frames, then encoded tiles."""
    parts = [batch.features.astype(self.config.dtype)]
    if batch.frames.shape[1]:
      encoded = self.encode(batch.frames)
      parts.append(_flat(pool_frames(encoded, self.config.pool_side), batch))
    if batch.tiles.shape[1]:
      parts.append(_flat(self.encode(batch.tiles), batch))
    return jnp.concatenate(parts, axis=1)

  def encode(self, pixels: Num[Array, "... h w 3"]) -> Float[Array, "N P V"]:
    """Images [..., h, w, 3] to tower features [N, P, V]."""
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    if pixels.dtype == jnp.uint8:
      pixels = pixels.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    return self.vision(pixels)


def _flat(encoded, batch: Batch):
  """[B * I, P, V] -> [B, I * P, V]."""
  return encoded.reshape(batch.memory_source.shape[0], -1, encoded.shape[-1])
