"""Floating-point operations of the model, counted from its sizes.

A product of [n, a] and [a, b] is 2 n a b operations. Norms, softmaxes,
rotations, gathers and pooling are left out. The compiler's own count is of no
use, because it sees neither the operations inside of kernels nor how often a
scan runs.

There are two counts. *Useful* operations (`sample_flops`) are those of samples
at their real lengths, with causal attention halved and nothing computed twice;
they are the numerator of model FLOPs utilisation (MFU). *Executed* operations
(`executed=True`) are those of rows at their capacities, with the forward pass
that is computed again and the scores that the attention kernels recompute.
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
  """Holds how many tokens and pairs pass through each part of the model.

  Attributes:
    images: frames and tiles through the tower.
    stored: visual tokens that come as stored features.
    encoded: visual tokens that come from the tower.
    memory: memory tokens, S.
    queries: queries of MemAug, T.
    decoder: positions of the decoder, L.
    labels: positions whose logits are computed.
    self_pairs: pairs of a query and a key in MemAug's self-attention.
    cross_pairs: pairs of a query and a memory token.
    causal_pairs: pairs of a query and a key in the decoder's attention.
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
  """Holds the operations of one component.

  Attributes:
    forward: of the forward pass.
    backward: of the gradients.
    again: of the part of the forward pass that the backward pass repeats.
  """

  forward: Count
  backward: Count
  again: Count

  @property
  def total(self) -> Count:
    """Returns the sum of the three."""
    return self.forward + self.backward + self.again


# Share of a text-only sample's positions that are taken to be labelled: its
# size does not say how long the prompt is.
_LABELLED_TEXT = 0.5


def sample_work(config: ModelConfig, sizes: Int[np.ndarray, "N 7"]) -> Work:
  """Counts the tokens and pairs of each sample by itself.

  Args:
    config: of the model.
    sizes: features, frames, tiles, blends, memory, queries and decoder
      positions of each sample, in the order of `data.rows.Size`. A sample that
      reads the memory of another has no memory here, and its reading is not
      counted.

  Returns:
    Arrays float64 [N]. The number of labels is that of decoder positions less
    that of queries, because answer tokens are the only ones that are no
    queries; that is exact unless the sequence was cut. Of text alone half the
    positions are taken to be labelled.
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
  """Counts the useful operations of a training step for each sample.

  Args:
    config: of the model.
    sizes: see `sample_work`, which also says how labels are counted.
    trained: components with a learning rate: "vision", "projector", "memaug",
      "decoder" (the newline token trains with it).
  """
  parts = count_flops(config, sample_work(config, sizes), trained)
  return np.asarray(sum(part.total for part in parts.values()), np.float64)


def uneven_flops(
  config: ModelConfig, sizes: Int[np.ndarray, "N 7"]
) -> Float64[np.ndarray, "N"]:
  """Counts the operations of each sample that make rows of one shape differ.

  These are attention and the vocabulary, with everything trained. All other
  operations are those of a row's capacity, whatever it holds.

  Args:
    config: of the model.
    sizes: see `sample_work`.
  """
  everything = frozenset(("vision", "projector", "memaug", "decoder"))
  work = sample_work(config, sizes)
  parts = count_flops(config, work, everything, executed=True)
  uneven = [
    part.total
    for name, part in parts.items()
    if name.endswith("attention") or name == "lm_head"
  ]
  return np.asarray(sum(uneven), np.float64)


def count_flops(
  config: ModelConfig,
  work: Work,
  trained: Set[str],
  *,
  executed: bool = False,
) -> dict[str, Flops]:
  """Counts operations by component.

  Gradients are counted where they are computed: for the parameters of trained
  components, and for all activations between these and the loss.

  Args:
    config: of the model; `remat` says what is computed again.
    work: numbers of tokens and pairs.
    trained: components, see `sample_flops`. With "adapters" among them their
      kernels have no gradients; the adapters' own products, about a hundredth
      at rank 16, are left out.
    executed: whether to count what the hardware executes, with all that is
      computed again, instead of what is useful.

  Returns:
    Operations by the name of the component.
  """
  decoder = config.decoder
  width, layers = decoder.width, decoder.layers
  qo = 2 * width * decoder.q_width  # weights of q and o
  kv = 2 * width * decoder.kv_width  # weights of k and v
  blocks = config.memaug_layers
  # Whether a gradient reaches the tower, the memory and the queries.
  vision = "vision" in trained
  memory = vision or bool({"projector", "decoder"} & trained)
  queries = memory or (blocks > 0 and "memaug" in trained)
  kernels = frozenset() if "adapters" in trained else trained
  # The backward pass of the attention kernels has five products where the
  # forward pass has two; one of the five computes the scores again.
  kernel = 2.5 if executed else 2.0
  rerun = executed and config.remat == "full"

  def linear(
    component: str,
    tokens: Count,
    weights: int,
    to_input: bool,
    again: float = 1.0,
  ) -> Flops:
    """Counts a product of tokens and weights.

    Args:
      component: that the weights belong to.
      tokens: number of tokens.
      weights: number of weights.
      to_input: whether the input needs a gradient.
      again: share that the backward pass repeats under full remat.
    """
    forward = 2.0 * np.asarray(tokens, np.float64) * weights
    passes = int(component in kernels) + int(to_input)
    return Flops(
      forward, passes * forward, again * forward * (rerun and passes > 0)
    )

  def attention(pairs: Count, depth: int, to_input: bool) -> Flops:
    """Counts the scores and weighted sums of `depth` layers."""
    forward = 4.0 * np.asarray(pairs, np.float64) * decoder.q_width * depth
    return Flops(forward, kernel * forward * to_input, 0.0 * forward)

  # A decoder layer's last product is not repeated: no gradient needs its
  # output, since x + down(h) is the next layer's input, which is kept. In
  # MemAug a norm follows the last product, and its gradient needs the output.
  kept = width * decoder.mlp
  dense = qo + kv + 3 * width * decoder.mlp
  tower_to_width = config.vision.width * width
  return {
    "tower": _tower(config, work, vision, rerun),
    "projector": _outside_stacks(
      add(
        linear("projector", work.stored, tower_to_width, False),
        linear("projector", work.encoded, tower_to_width, vision),
        linear(
          "projector",
          work.stored + work.encoded,
          width**2,
          vision or "projector" in trained,
        ),
      )
    ),
    "memaug_projections": add(
      linear("memaug", work.queries, blocks * (qo + kv + qo), queries),
      linear("memaug", work.memory, blocks * kv, memory),
    ),
    "memaug_self_attention": attention(work.self_pairs, blocks, queries),
    "memaug_cross_attention": attention(work.cross_pairs, blocks, queries),
    "memaug_mlp": linear(
      "memaug", work.queries, blocks * 8 * width**2, queries
    ),
    "decoder_linears": linear(
      "decoder", work.decoder, layers * dense, queries, (dense - kept) / dense
    ),
    "decoder_attention": attention(work.causal_pairs, layers, queries),
    # Loss and gradients are computed in one pass (`parallel.vocabulary`).
    "lm_head": _outside_stacks(
      linear("decoder", work.labels, width * decoder.vocab, queries)
    ),
  }


def add(*parts: Flops) -> Flops:
  """Returns the sum of several components."""
  return Flops(*(sum(column) for column in zip(*parts, strict=True)))


def _outside_stacks(part: Flops) -> Flops:
  """Removes what runs again: only layers of the scanned stacks do."""
  return part._replace(again=0.0 * part.forward)


def _tower(
  config: ModelConfig, work: Work, trained: bool, rerun: bool
) -> Flops:
  """Counts SigLIP, whose attention is XLA's and runs again, too."""
  vision = config.vision
  patches, width = vision.side**2, vision.width
  images = np.asarray(work.images, np.float64)
  patch = 2.0 * patches * 3 * vision.patch_size**2 * width
  dense = 2.0 * patches * (4 * width**2 + 2 * width * vision.mlp)
  attention = 4.0 * patches**2 * width
  layers = vision.layers * (dense + attention)
  again = layers - vision.layers * 2.0 * patches * width * vision.mlp
  return Flops(
    images * (patch + layers),
    # The patch product's input, pixels, needs no gradient.
    (images - work.untrained) * (patch + 2 * layers) * trained,
    images * again * (trained and rerun),
  )
