"""Hour-LLaVA: encoder, memory, MemAug and decoder, composed.

The model does not know modalities: the layout (`hourjax.data.layout`) has
turned every sample into gathers before it gets here.
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Num

from hourjax.batch import Batch
from hourjax.models.attention import KeysValues
from hourjax.models.config import ModelConfig
from hourjax.models.decoder import Decoder
from hourjax.models.layers import IMAGES
from hourjax.models.memaug import make_memaug
from hourjax.models.memory import Projector, build_memory
from hourjax.models.siglip import VisionTower, pool_frames
from hourjax.parallel.rules import constrain, parts
from hourjax.parallel.sharded_gather import gather_rows


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
        attention=config.attention,
      )
    self.decoder = Decoder(
      config.decoder,
      dtype=dtype,
      remat=remat,
      rngs=rngs,
      attention=config.attention,
    )

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

  @property
  def words(self) -> Float[Array, "N D"]:
    """Output vectors of the vocabulary."""
    return self.decoder.words

  def embeddings(self, batch: Batch) -> Float[Array, "B L D"]:
    """Decoder input: words, with MemAug's outputs in the visual slots."""
    words = self.decoder.embed(batch.decoder_token)
    if not batch.memory_source.shape[1]:
      return words
    augmented = self.augment(batch)
    return self._with_seen(words, augmented, batch)

  def _with_seen(self, words, augmented, batch):
    seen = gather_rows(augmented, batch.decoder_source)
    return jnp.where(batch.decoder_token[..., None] >= 0, words, seen)

  def augment(self, batch: Batch) -> Float[Array, "B T D"]:
    """Queries after they have read the memory (as they are without MemAug)."""
    memory = self.memory(batch)
    queries = self._queries(memory, batch)
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

  def _queries(self, memory, batch):
    """Words, and rows of the memory (or of what is kept of it)."""
    kept = gather_rows(memory, batch.query_source)
    words = self.decoder.embed(batch.query_token)
    return jnp.where(batch.query_token[..., None] >= 0, words, kept)

  def encode_memory(
    self, batch: Batch, kept: Int[Array, "B X"]
  ) -> tuple[KeysValues | None, Float[Array, "B X D"]]:
    """What all questions about a memory share.

    Args:
      batch: rows of memories; queries and decoder positions are not used.
      kept: memory tokens that queries will start from.

    Returns:
      Keys and values [blocks, B, S, K, C] that MemAug reads (None without
      MemAug), and the kept tokens.
    """
    memory = self.memory(batch)
    kept = gather_rows(memory, kept)
    if not self.config.memaug_layers:
      return None, kept

    def step(block, x, _):
      return x, block.encode_memory(memory, batch.memory_position)

    return self.memaug.scan(step, None)[1], kept

  def read_memory(
    self,
    known: KeysValues | None,
    kept: Float[Array, "B X D"],
    batch: Batch,
    watched: Int[Array, "B W"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "blocks B S"] | None]:
    """As `augment`, of a memory that is remembered.

    Args:
      known, kept: of `encode_memory`.
      batch: rows of queries; `query_source` counts what is kept.
      watched: queries whose attention is looked at; -1 is none.

    Returns:
      The queries after MemAug, and how much of the watched queries' attention
      each memory token gets in each block, summed over queries and heads.
    """
    queries = self._queries(kept, batch)
    if not self.config.memaug_layers:
      return queries, None
    where = {
      "position": batch.query_position,
      "segment": batch.query_segment,
      "memory_segment": batch.memory_segment,
      "reads_segment": batch.query_reads,
    }

    def step(block, x, known):
      return block.read_memory(x, known, watched, **where)

    return self.memaug.scan(step, queries, known)

  def prefill(
    self, augmented: Float[Array, "B T D"] | None, batch: Batch
  ) -> KeysValues:
    """The decoder's keys and values [layers, B, L, K, C] of prompts.

    Args:
      augmented: of `read_memory`; None where the prompts are text alone.
      batch: rows of prompts.
    """
    embeddings = self.decoder.embed(batch.decoder_token)
    if augmented is not None:
      embeddings = self._with_seen(embeddings, augmented, batch)
    return self.decoder.prefill(
      embeddings,
      position=batch.decoder_position,
      segment=batch.decoder_segment,
    )

  def memory(self, batch: Batch) -> Float[Array, "B S D"]:
    """The projected memory repository of each row."""
    return build_memory(
      self.stored(batch),
      self.encoded(batch),
      self.newline[...],
      batch.blend_source,
      batch.blend_weight,
      batch.memory_source,
    )

  def stored(self, batch: Batch) -> Float[Array, "B X D"]:
    """Projected tokens that come as features."""
    rows, tokens = batch.features.shape[:2]
    if not tokens:
      return jnp.zeros((rows, 0, self.config.decoder.width), self.config.dtype)
    return self.projector(batch.features.astype(self.config.dtype))

  def encoded(self, batch: Batch) -> Float[Array, "B E D"]:
    """Projected tokens of the rows' frames, pooled, and then of their tiles."""
    side = self.config.pool_side
    frames = self._encoded_rows(batch.frames, side, batch.frame_trains)
    tiles = self._encoded_rows(batch.tiles)
    return jnp.concatenate([frames, tiles], axis=1)

  def _encoded_rows(self, pixels, pool_side=None, trains=None):
    """[B, I, h, w, 3] -> [B, I * tokens, D], every image on some device.

    Args:
      pixels: of frames or tiles.
      pool_side: side of the grid that they are pooled to, if they are.
      trains: [B, I] whose gradients reach the tower; None is all of them.
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
    """Images [..., h, w, 3] to tower features [N, P, V]."""
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    pixels = constrain(pixels, "images")
    if pixels.dtype == jnp.uint8:
      pixels = pixels.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    return self.vision(pixels)
