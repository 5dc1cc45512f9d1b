"""Hour-LLaVA: vision tower, memory, MemAug and decoder, composed.

The model does not know modalities: `hourjax.data.layout` has turned every
sample into gathers before its batch arrives here.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Num

from hourjax.batch import Batch
from hourjax.models.attention import KeysValues
from hourjax.models.config import ModelConfig
from hourjax.models.decoder import Decoder
from hourjax.models.linear import IMAGES
from hourjax.models.memaug import MemAugBlock, make_memaug
from hourjax.models.memory import (
  Projector,
  blend_tokens,
  build_memory,
  memory_in_chunks,
  project_tokens,
)
from hourjax.models.siglip import VisionTower, pool_frames
from hourjax.parallel.rules import constrain, parts
from hourjax.parallel.sharded_gather import gather_rows


class HourLLaVA(nnx.Module):
  """Computes hidden states from a batch: memory, MemAug, then decoder."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    """Draws the parameters.

    Args:
      config: of the model.
      rngs: streams of random numbers.
    """
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
      self.memaug = make_memaug(config, rngs=rngs)
    self.decoder = Decoder(
      config.decoder,
      dtype=dtype,
      remat=remat,
      rngs=rngs,
      offload=config.offload,
      attention=config.attention,
    )

  def __call__(self, batch: Batch) -> Float[Array, "B L D"]:
    """Computes the decoder's final hidden states, the input of `logits`."""
    return self.decode(self.embeddings(batch), batch)

  def decode(
    self, embeddings: Float[Array, "B L D"], batch: Batch
  ) -> Float[Array, "B L D"]:
    """Computes the decoder's final hidden states from its input embeddings.

    Args:
      embeddings: of `embeddings`.
      batch: for position and segment id of each embedding.
    """
    return self.decoder(
      embeddings,
      position=batch.decoder_position,
      segment=batch.decoder_segment,
    )

  def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... N"]:
    """Computes float32 logits over the vocabulary."""
    return self.decoder.logits(hidden)

  @property
  def output_embedding(self) -> Float[Array, "N D"]:
    """Returns the vectors whose products with hidden states are logits."""
    return self.decoder.output_embedding

  def embeddings(self, batch: Batch) -> Float[Array, "B L D"]:
    """Computes the decoder's input.

    It is the embedding of each token, and MemAug's output in visual slots.
    """
    tokens = self.decoder.embed(batch.decoder_token)
    if not batch.memory_source.shape[1]:
      return tokens
    return self._fill_slots(tokens, self.augment(batch), batch)

  def _fill_slots(
    self,
    tokens: Float[Array, "B L D"],
    augmented: Float[Array, "B T D"],
    batch: Batch,
  ) -> Float[Array, "B L D"]:
    """Puts MemAug's outputs into the visual slots between token embeddings."""
    visual = gather_rows(augmented, batch.decoder_source)
    return jnp.where(batch.decoder_token[..., None] >= 0, tokens, visual)

  def augment(self, batch: Batch) -> Float[Array, "B T D"]:
    """Computes the queries after MemAug; without MemAug, as they start."""
    if self.config.memory_chunk:
      tokens = self._memory_tokens(batch)
      memory = memory_in_chunks(
        tokens, batch.memory_source, self.config.memory_chunk
      )
      # Computed once more: a gather from the memory would have a gradient of
      # its size.
      kept = tokens(
        jnp.take_along_axis(
          batch.memory_source, jnp.maximum(batch.query_source, 0), axis=1
        )
      )
    else:
      memory = self.memory(batch)
      kept = gather_rows(memory, batch.query_source)
    queries = self._queries(kept, batch)
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

  def _queries(
    self, kept: Float[Array, "B T D"], batch: Batch
  ) -> Float[Array, "B T D"]:
    """Returns what MemAug starts from: prompt tokens and kept memory tokens.

    Args:
      kept: the memory token of each query, where it starts from one.
      batch: rows of queries.
    """
    tokens = self.decoder.embed(batch.query_token)
    return jnp.where(batch.query_token[..., None] >= 0, tokens, kept)

  def encode_memory(
    self, batch: Batch, kept: Int[Array, "B X"]
  ) -> tuple[KeysValues | None, Float[Array, "B X D"]]:
    """Computes what all questions about a memory share.

    Args:
      batch: rows of memories; queries and decoder positions are not used.
      kept: indices of the memory tokens that queries will start from.

    Returns:
      Keys and values [blocks, B, S, K, C] that MemAug reads (None without
      MemAug), and the kept tokens.
    """
    memory = self.memory(batch)
    kept = gather_rows(memory, kept)
    if not self.config.memaug_layers:
      return None, kept

    def step(block: MemAugBlock, x: None, _: None) -> tuple[None, KeysValues]:
      return x, block.encode_memory(memory, batch.memory_position)

    return self.memaug.scan(step, None)[1], kept

  def read_memory(
    self,
    cache: KeysValues | None,
    kept: Float[Array, "B X D"],
    batch: Batch,
    probe_queries: Int[Array, "B W"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "blocks B S"] | None]:
    """Computes the same as `augment` from a memory that was encoded before.

    Args:
      cache: keys and values of the memory, of `encode_memory`.
      kept: kept memory tokens, of `encode_memory`.
      batch: rows of queries; `query_source` indexes the kept tokens.
      probe_queries: indices of queries whose attention is returned; -1 is
        none.

    Returns:
      Queries after MemAug, and the attention that each memory token gets from
      the probe queries in each block, summed over queries and heads; None
      without probe queries or without MemAug.
    """
    queries = self._queries(gather_rows(kept, batch.query_source), batch)
    if not self.config.memaug_layers:
      return queries, None
    where = {
      "position": batch.query_position,
      "segment": batch.query_segment,
      "memory_segment": batch.memory_segment,
      "reads_segment": batch.query_reads,
    }

    def step(
      block: MemAugBlock, x: Float[Array, "B T D"], cache: KeysValues
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B S"] | None]:
      return block.read_memory(x, cache, probe_queries, **where)

    return self.memaug.scan(step, queries, cache)

  def prefill(
    self, augmented: Float[Array, "B T D"] | None, batch: Batch
  ) -> KeysValues:
    """Computes the decoder's KV cache [layers, B, L, K, C] of prompts.

    Args:
      augmented: of `read_memory`; None where the prompts are text alone.
      batch: rows of prompts.
    """
    embeddings = self.decoder.embed(batch.decoder_token)
    if augmented is not None:
      embeddings = self._fill_slots(embeddings, augmented, batch)
    return self.decoder.prefill(
      embeddings,
      position=batch.decoder_position,
      segment=batch.decoder_segment,
    )

  def memory(self, batch: Batch) -> Float[Array, "B S D"]:
    """Computes the memory repository of each row, projected."""
    return build_memory(
      self.stored(batch),
      self.encoded(batch),
      self.newline[...],
      batch.blend_source,
      batch.blend_weight,
      batch.memory_source,
    )

  def _memory_tokens(
    self, batch: Batch
  ) -> Callable[[Int[Array, "B N"]], Float[Array, "B N D"]]:
    """Returns the function from sources to memory tokens of these rows."""
    features = batch.features.astype(self.config.dtype)
    encoded = self.encoded(batch)
    if batch.blend_source.shape[1]:
      encoded = blend_tokens(
        encoded, batch.blend_source - features.shape[1], batch.blend_weight
      )
    return functools.partial(
      project_tokens, self.projector, features, encoded, self.newline[...]
    )

  def stored(self, batch: Batch) -> Float[Array, "B X D"]:
    """Projects the visual tokens that come as stored features."""
    rows, tokens = batch.features.shape[:2]
    if not tokens:
      return jnp.zeros((rows, 0, self.config.decoder.width), self.config.dtype)
    return self.projector(batch.features.astype(self.config.dtype))

  def encoded(self, batch: Batch) -> Float[Array, "B E D"]:
    """Encodes and projects pixels: pooled frames first, then tiles."""
    side = self.config.pool_side
    frames = self._encoded_rows(batch.frames, side, batch.frame_trains)
    tiles = self._encoded_rows(batch.tiles)
    return jnp.concatenate([frames, tiles], axis=1)

  def _encoded_rows(
    self,
    pixels: Num[Array, "B I h w 3"],
    pool_side: int | None = None,
    trains: Int[Array, "B I"] | None = None,
  ) -> Float[Array, "B E D"]:
    """Encodes and projects images, spread over all devices.

    Args:
      pixels: of frames or tiles.
      pool_side: side of the grid that each image is pooled to; None for no
        pooling.
      trains: 1 where the tower learns from an image; None for all of them.
    """
    rows, images = pixels.shape[:2]
    if not images:
      return jnp.zeros((rows, 0, self.config.decoder.width), self.config.dtype)
    extra = -images % (parts("images") // parts("rows"))
    pixels = jnp.pad(pixels, ((0, 0), (0, extra), *[(0, 0)] * 3))
    tokens = self.encode(pixels)
    if trains is not None:
      trains = jnp.pad(trains, ((0, 0), (0, extra))).reshape(-1, 1, 1)
      trains = constrain(trains, "images", None, None)
      tokens = jnp.where(trains > 0, tokens, lax.stop_gradient(tokens))
    if pool_side is not None:
      tokens = pool_frames(tokens, pool_side)
    tokens = constrain(self.projector(tokens, IMAGES), "images", None, None)
    tokens = tokens.reshape(rows, -1, *tokens.shape[1:])[:, :images]
    return constrain(tokens.reshape(rows, -1, tokens.shape[-1]), "rows")

  def encode(self, pixels: Num[Array, "... h w 3"]) -> Float[Array, "N P V"]:
    """Computes tower features of images.

    Args:
      pixels: uint8, or float in [-1, 1].

    Returns:
      Features of all images along one axis.
    """
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    pixels = constrain(pixels, "images")
    if pixels.dtype == jnp.uint8:
      pixels = pixels.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    return self.vision(pixels)
