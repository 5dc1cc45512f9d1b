"""Floating-point operations of the model, counted by hand.

A product of [n, a] and [a, b] is 2 n a b operations; norms, softmaxes,
rotations, gathers and pooling are left out. The compiler's own count knows
neither what kernels do nor how often a scan runs.

Two counts are made of one formula. *Useful* operations (`sample_flops`) are
those of the samples at their real lengths, causal attention halved, nothing
computed twice: the numerator of MFU. What the hardware *executes* comes from
capacities instead, with the forward pass that is computed again and the scores
that the attention kernels recompute (`executed=True`).
"""

from collections.abc import Set
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from hourjax.batch import TOWER_FRAMES
from hourjax.models.config import ModelConfig

# Numbers, or arrays of one shape.
Count = float | np.ndarray


class Work(NamedTuple):
  """What passes through each part of the model.

  Attributes:
    images: frames and tiles through the tower.
    stored: visual tokens that come as stored features.
    encoded: visual tokens that come from the tower.
    memory, queries, decoder: S, T and L.
    labels: positions whose logits are computed.
    self_pairs, cross_pairs, causal_pairs: of a query and a key that meet in
      MemAug's two attentions and in the decoder's.
    untrained: those of `images` that the tower does not learn from.
  """

  images: Count
  stored: Count
  encoded: Count
  memory: Count
  queries: Count
  decoder: Count
  labels: Count
  self_pairs: Count
  cross_pairs: Count
  causal_pairs: Count
  untrained: Count = 0.0


class Flops(NamedTuple):
  """Operations of one component.

  Attributes:
    forward: of the forward pass.
    backward: of the gradients.
    again: of the forward pass that the backward pass computes again.
  """

  forward: Count
  backward: Count
  again: Count

  @property
  def total(self) -> Count:
    return self.forward + self.backward + self.again


# Of text alone, whose prompt's length a size does not tell.
_LABELLED_TEXT = 0.5


def sample_work(config: ModelConfig, sizes: Int[np.ndarray, "N 7"]) -> Work:
  """The work of each sample by itself.

  Args:
    config: of the model.
    sizes: features, frames, tiles, blends, memory, queries and decoder
      positions of each sample, the order of `data.rows.Size`. A sample that
      reads the memory of another has no memory here and counts no reading.

  Returns:
    Arrays float64 [N]. Labels are decoder positions less queries: what MemAug
    does not see are the answers, so that is exact unless the sequence was cut.
    Of text alone half the positions are taken to be labelled.
  """
  columns = np.asarray(sizes, np.float64).T
  features, frames, tiles, _, memory, queries, decoder = columns
  return Work(
    images=frames + tiles,
    stored=features,
    encoded=frames * config.pool_side**2 + tiles * config.vision.side**2,
    memory=memory,
    queries=queries,
    decoder=decoder,
    labels=np.where(
      queries > 0, np.maximum(decoder - queries, 0), decoder * _LABELLED_TEXT
    ),
    self_pairs=queries**2,
    cross_pairs=queries * memory,
    causal_pairs=decoder**2 / 2,
    untrained=np.where(frames > TOWER_FRAMES, frames, 0.0),
  )


def sample_flops(
  config: ModelConfig, sizes: Int[np.ndarray, "N 7"], trained: Set[str]
) -> Float64[np.ndarray, "N"]:
  """Useful operations of a training step for each sample.

  Args:
    config: of the model.
    sizes: see `sample_work`, which also says how labels are taken.
    trained: components with a learning rate: "vision", "projector", "memaug",
      "decoder" (the newline token trains with it).
  """
  parts = count_flops(config, sample_work(config, sizes), trained)
  return np.asarray(sum(part.total for part in parts.values()), np.float64)


def count_flops(
  config: ModelConfig,
  work: Work,
  trained: Set[str],
  *,
  executed: bool = False,
) -> dict[str, Flops]:
  """Operations by component: a gradient is counted where one is needed.

  That is for parameters of what is trained, and for what lies between it and
  the loss.

  Args:
    config: of the model; `remat` says what is computed again.
    work: how much passes.
    trained: components, see `sample_flops`.
    executed: count what the hardware does, not what is useful: also what is
      computed again.
  """
  decoder = config.decoder
  width, layers = decoder.width, decoder.layers
  kv_width = decoder.head_dim * decoder.kv_heads
  qo, kv = 2 * width**2, 2 * width * kv_width  # weights of q and o, k and v
  blocks = config.memaug_layers
  # Does a gradient arrive at the memory, and at the queries?
  vision = "vision" in trained
  memory = vision or bool({"projector", "decoder"} & trained)
  queries = memory or (blocks > 0 and "memaug" in trained)
  # The attention kernels' backward computes the scores anew: five products
  # for the forward pass' two, of which four are useful.
  kernel = 2.5 if executed else 2.0
  rerun = executed and config.remat == "full"

  def linear(component, tokens, weights, below, again=1.0):
    forward = 2.0 * np.asarray(tokens, np.float64) * weights
    trains = component in trained
    passes = int(trains) + int(below)
    return Flops(
      forward, passes * forward, again * forward * (rerun and passes > 0)
    )

  def attention(pairs, heads, dim, depth, below):
    forward = 4.0 * np.asarray(pairs, np.float64) * heads * dim * depth
    return Flops(forward, kernel * forward * below, 0.0 * forward)

  heads, dim = decoder.heads, decoder.head_dim
  # The block's last product is no input of any gradient: x + down(h) is the
  # next block's input, which is kept. MemAug's norm comes last and needs it.
  kept = width * decoder.mlp
  dense = qo + kv + 3 * width * decoder.mlp
  found = {
    "tower": _tower(config, work, vision, rerun),
    "projector": add(
      _first(linear("projector", work.stored, config.vision.width * width,
                    False)),
      _first(linear("projector", work.encoded, config.vision.width * width,
                    vision)),
      _first(linear("projector", work.stored + work.encoded, width**2,
                    vision or "projector" in trained)),
    ),
    "memaug_projections": add(
      linear("memaug", work.queries, blocks * (qo + kv + qo), queries),
      linear("memaug", work.memory, blocks * kv, memory),
    ),
    "memaug_self_attention": attention(
      work.self_pairs, heads, dim, blocks, queries
    ),
    "memaug_cross_attention": attention(
      work.cross_pairs, heads, dim, blocks, queries
    ),
    "memaug_mlp": linear(
      "memaug", work.queries, blocks * 8 * width**2, queries
    ),
    "decoder_linears": linear(
      "decoder", work.decoder, layers * dense, queries, (dense - kept) / dense
    ),
    "decoder_attention": attention(
      work.causal_pairs, heads, dim, layers, queries
    ),
    # Loss and gradients are computed in one pass (`parallel.vocabulary`).
    "lm_head": _first(
      linear("decoder", work.labels, width * decoder.vocab, queries)
    ),
  }  # fmt: skip
  return found


def add(*parts: Flops) -> Flops:
  """The sum of several components."""
  return Flops(*(sum(column) for column in zip(*parts, strict=True)))


def _first(part: Flops) -> Flops:
  """Of what stands outside of the scanned stacks: nothing runs again."""
  return part._replace(again=0.0 * part.forward)


def _tower(config: ModelConfig, work: Work, trained: bool, rerun: bool):
  """SigLIP on all patches; its attention is XLA's and runs again, too."""
  vision = config.vision
  patches, width = vision.side**2, vision.width
  images = np.asarray(work.images, np.float64)
  patch = 2.0 * patches * 3 * vision.patch_size**2 * width
  dense = 2.0 * patches * (4 * width**2 + 2 * width * vision.mlp)
  meet = 4.0 * patches**2 * width
  layers = vision.layers * (dense + meet)
  again = layers - vision.layers * 2.0 * patches * width * vision.mlp
  return Flops(
    images * (patch + layers),
    # Pixels need no gradient.
    (images - work.untrained) * (patch + 2 * layers) * trained,
    images * again * (trained and rerun),
  )
