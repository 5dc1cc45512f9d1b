"""Forgetting: which memory tokens MemAug's queries start from.

One object, `Forgetting`, is the whole interface to it: the `forgetting` section
of the configuration. It says

    how many tokens it keeps   frame_count, cell_count, newline_count: from
                               counts alone, so that rows are planned before
                               any file is opened
    what it needs              summarise_frames, needs_features, needs_question
    what it keeps              kept_tokens: indices into the memory

A temporal strategy is one entry of TEMPORAL_STRATEGIES. A new one is written
here, and its name is added to `Temporal`; no other file has to know it.
Randomness comes from a generator that the caller seeds with
(seed, epoch, sample). See hourjax/README.md, Forgetting.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32, Num
from scipy import special

from hourjax.data.repository import Grid, Repository, repeated_frames
from hourjax.errors import UserError

Spatial = Literal["random", "uniform"]
Temporal = Literal["uniform", "random", "keyframe", "question"]

# Paths of the parameters that compare frames with words (`models.params`).
EMBEDDER_PARAMS = (
  "projector/fc1/kernel",
  "projector/fc1/bias",
  "projector/fc2/kernel",
  "projector/fc2/bias",
  "decoder/embedding",
)
_BLOCK = 16  # frames projected at a time: 8 MB of a 3B model's hidden units


class Embedder:
  """Maps frames and words to vectors of the decoder's width, on the host.

  Computes in float32 with numpy, so that threads that fill rows can use it
  while the devices are busy. Frames of an hour-long video cost a 3B model's
  host about 10**12 floating-point operations.
  """

  def __init__(self, params: Mapping[str, Num[np.ndarray, "..."]]):
    """Takes the projector and the word embeddings out of a model.

    Args:
      params: by path; those of EMBEDDER_PARAMS are used. Kernels are [V, D]
        and [D, D], the embedding is [N, D].
    """
    names = EMBEDDER_PARAMS[:4]
    layers = (np.asarray(params[name], np.float32) for name in names)
    self._kernel1, self._bias1, self._kernel2, self._bias2 = layers
    self._words = np.asarray(params[EMBEDDER_PARAMS[4]])

  def mean_projected(
    self, features: Num[np.ndarray, "F Q V"]
  ) -> Float32[np.ndarray, "F D"]:
    """Returns the mean of each frame's projected tokens.

    The projector's last layer is linear, so the mean is taken before it:
    mean(gelu(x W1 + b1) W2 + b2) = mean(gelu(x W1 + b1)) W2 + b2.
    """
    hidden = np.empty((len(features), len(self._bias1)), np.float32)
    for start in range(0, len(features), _BLOCK):
      block = np.asarray(features[start : start + _BLOCK], np.float32)
      x = block @ self._kernel1 + self._bias1
      x *= special.ndtr(x)  # the exact GELU
      hidden[start : start + _BLOCK] = x.mean(axis=1)
    return hidden @ self._kernel2 + self._bias2

  def mean_word(self, ids: Int[np.ndarray, "n"]) -> Float32[np.ndarray, "D"]:
    """Returns the mean embedding of words (n > 0)."""
    return self._words[ids].astype(np.float32).mean(axis=0)


class _Seen(NamedTuple):
  """Holds what a temporal strategy may use to choose frames.

  Attributes:
    rng: used by random strategies.
    summary: what the strategy's `summarise` returned.
    question: word ids of the question.
  """

  rng: np.random.Generator
  summary: Any = None
  question: Int[np.ndarray, "q"] | None = None


class TemporalStrategy(NamedTuple):
  """Describes how whole frames are forgotten.

  Attributes:
    choose: (F, n, seen) -> n of the frames 0..F-1, ascending.
    summarise: (features [F', Q, V], embedder) -> what `choose` needs to know
      of the F' frames before their repetition, computed once for a video;
      None if it needs no features.
    needs_question: whether the choice depends on the question, and `summarise`
      needs the embedder.
  """

  choose: Callable[[int, int, _Seen], Int[np.ndarray, "n"]]
  summarise: Callable[[np.ndarray, Embedder | None], Any] | None = None
  needs_question: bool = False


def _evenly_spaced(frames: int, count: int, _: _Seen) -> Int[np.ndarray, "n"]:
  """Cuts linspace to int, as the official code does: 16, 4 -> 0 5 10 15."""
  return np.linspace(0, frames - 1, count).astype(int)


def _drawn(frames: int, count: int, seen: _Seen) -> Int[np.ndarray, "n"]:
  """Draws frames without replacement."""
  return np.sort(seen.rng.choice(frames, count, replace=False))


def _least_similar(
  frames: int, count: int, seen: _Seen
) -> Int[np.ndarray, "n"]:
  """Keeps the frames that differ most from their neighbours.

  Similarity is taken after the repetition of short videos, as the frames
  that are chosen are counted after it.
  """
  means = seen.summary[repeated_frames(len(seen.summary))]
  similarity = neighbour_similarity(means)
  # A stable sort: of equal frames the earlier one is kept, on every machine.
  return np.sort(np.argsort(similarity, kind="stable")[:count])


def _mean_features(
  features: Num[np.ndarray, "F Q V"], _: Embedder | None
) -> Float32[np.ndarray, "F V"]:
  return features.astype(np.float32).mean(axis=1)


def _nearest_to_question(
  frames: int, count: int, seen: _Seen
) -> Int[np.ndarray, "n"]:
  """Keeps the frames whose mean projected token is nearest to the question.

  Nearness is the cosine to the mean word embedding. For a question without any
  word, evenly spaced frames are kept.
  """
  if seen.question is None:
    raise UserError(
      "forgetting.temporal=question needs a question; choose uniform where"
      " there is none"
    )
  if not len(seen.question):
    return _evenly_spaced(frames, count, seen)
  means, embedder = seen.summary
  word = _unit(embedder.mean_word(seen.question)[None])[0]
  # Repeated frames have equal cosines, bit for bit, and stay in order.
  cosine = (_unit(means) @ word)[repeated_frames(len(means))]
  return np.sort(np.argsort(-cosine, kind="stable")[:count])


def _mean_projected(
  features: Num[np.ndarray, "F Q V"], embedder: Embedder | None
) -> tuple[Float32[np.ndarray, "F D"], Embedder]:
  if embedder is None:
    raise UserError(
      "forgetting.temporal=question needs the model's projector and word"
      " embeddings, which are not given here; choose uniform"
    )
  return embedder.mean_projected(features), embedder


TEMPORAL_STRATEGIES: dict[str, TemporalStrategy] = {
  "uniform": TemporalStrategy(_evenly_spaced),
  "random": TemporalStrategy(_drawn),
  "keyframe": TemporalStrategy(_least_similar, _mean_features),
  "question": TemporalStrategy(_nearest_to_question, _mean_projected, True),
}


@dataclasses.dataclass(frozen=True)
class Forgetting:
  """Describes a rule of forgetting: how many tokens are kept, and which.

  Attributes:
    spatial: "random" draws tokens without replacement; "uniform" keeps every
      second row and column.
    temporal: "uniform" keeps evenly spaced frames, "random" draws them,
      "keyframe" keeps those that differ most from their neighbours, and
      "question" those that are nearest to the question.
    ratio: one token of so many in a frame or image is kept, and one frame of
      so many.
    temporal_ratio: one frame of so many is kept instead; 0 takes `ratio`.
    max_frames: at most so many frames are kept.
  """

  spatial: Spatial = "random"
  temporal: Temporal = "uniform"
  ratio: int = 4
  max_frames: int = 512
  temporal_ratio: int = 0

  def __post_init__(self) -> None:
    for name, options in [
      ("spatial", ("random", "uniform")),
      ("temporal", tuple(TEMPORAL_STRATEGIES)),
    ]:
      value = getattr(self, name)
      if value not in options:
        raise UserError(
          f"forgetting.{name} is {value!r}; choose one of {', '.join(options)}"
        )

  @property
  def needs_question(self) -> bool:
    """Returns whether the kept tokens depend on the question."""
    return TEMPORAL_STRATEGIES[self.temporal].needs_question

  @property
  def needs_features(self) -> bool:
    """Returns whether a video's frames are chosen by its stored features."""
    return TEMPORAL_STRATEGIES[self.temporal].summarise is not None

  def frame_count(self, frames: Any) -> Any:
    """Returns how many of so many frames are kept, an int or an array.

    With ratio 4, 16 frames keep 4; at least one is kept.
    """
    one_of = self.temporal_ratio or self.ratio
    return np.maximum(1, np.minimum(self.max_frames, frames // one_of))

  def cell_count(self, high: int, wide: int) -> int:
    """Returns how many tokens of a grid of high x wide are kept.

    This is ceil(high * wide / ratio), or for "uniform"
    ceil(high / 2) * ceil(wide / 2).
    """
    if self.spatial == "uniform":
      return math.ceil(high / 2) * math.ceil(wide / 2)
    return math.ceil(high * wide / self.ratio)

  def newline_count(self, high: int, wide: int) -> int:
    """Returns how many newlines of a tiled image's grid are kept, at most.

    A newline is kept where a token of its row is. For "uniform" this is the
    number itself, ceil(high / 2). For "random" it is an upper bound, since
    which rows have a token depends on the draw: of a grid of 40 x 54 all rows
    have one but for one draw in 160,000, of 124 x 2 more than half have none.
    """
    if self.spatial == "uniform":
      return math.ceil(high / 2)
    return min(high, self.cell_count(high, wide))

  def summarise_frames(
    self,
    features: Num[np.ndarray, "F Q V"] | None,
    embedder: Embedder | None = None,
  ) -> Any:
    """Computes what the temporal strategy needs to know of a video.

    Several conversations about one video can share the result.

    Args:
      features: of the frames before their repetition; None for images, and for
        videos of which pixels are read.
      embedder: of the model; used if `needs_question`.

    Returns:
      The argument `summary` of `kept_tokens`; None where the strategy needs
      nothing or there are no features.
    """
    summarise = TEMPORAL_STRATEGIES[self.temporal].summarise
    if summarise is None or features is None:
      return None
    return summarise(features, embedder)

  def kept_tokens(
    self,
    repository: Repository,
    rng: np.random.Generator,
    *,
    summary: Any = None,
    question: Int[np.ndarray, "q"] | None = None,
  ) -> list[Int32[np.ndarray, "n"]]:
    """Returns the memory indices kept for each slot, ascending in each grid.

    Args:
      repository: the memory of one sample.
      rng: used only by random strategies.
      summary: what `summarise_frames` returned.
      question: word ids; used if `needs_question`.

    Raises:
      UserError: the strategy needs something that is None.
    """
    kept = []
    for slot in repository.slots:
      grids = []
      for grid in slot:
        chosen = np.arange(grid.index.shape[0])
        if grid.temporal:
          chosen = self.kept_frames(len(chosen), rng, summary, question)
        cells = self.kept_cells(grid, len(chosen), rng)
        grids.append(memory_indices(grid, chosen, cells))
      kept.append(np.concatenate(grids))
    return kept

  def kept_frames(
    self,
    frames: int,
    rng: np.random.Generator,
    summary: Any = None,
    question: Int[np.ndarray, "q"] | None = None,
  ) -> Int[np.ndarray, "n"]:
    """Returns the frames that temporal forgetting keeps, in ascending order.

    See `kept_tokens` for the arguments; `frames` is their number after the
    repetition of short videos.
    """
    strategy = TEMPORAL_STRATEGIES[self.temporal]
    if strategy.summarise is not None and summary is None:
      raise UserError(
        f"forgetting.temporal={self.temporal} needs stored features; extract"
        " the videos first or choose uniform"
      )
    count = int(self.frame_count(frames))
    seen = _Seen(rng, summary, question)
    return strategy.choose(frames, count, seen)

  def kept_cells(
    self, grid: Grid, frames: int, rng: np.random.Generator
  ) -> Int[np.ndarray, "frames m"]:
    """Returns the kept cells of each of `frames` kept frames, ascending.

    Cells are numbered row by row; m is `cell_count`. With "uniform" a grid of
    4 x 4 keeps [0 2 8 10].
    """
    _, high, wide = grid.index.shape
    if self.spatial == "uniform":
      cells = np.arange(high * wide).reshape(high, wide)[::2, ::2].reshape(-1)
      return np.broadcast_to(cells, (frames, cells.size))
    # The first m of a random order are a draw without replacement.
    order = np.argsort(rng.random((frames, high * wide)), axis=1)
    return np.sort(order[:, : self.cell_count(high, wide)], axis=1)


class KeptTokens:
  """Computes which tokens of one memory are kept for each question about it.

  Attributes:
    candidates: int32, memory indices that may be kept for some question: all
      of them if the strategy depends on the question, else the kept tokens.
    fixed: the kept tokens of each slot; None if they depend on the question.
  """

  candidates: Int32[np.ndarray, "n"]
  fixed: list[np.ndarray] | None

  def __init__(
    self,
    rule: Forgetting,
    repository: Repository,
    seed: int,
    features: Num[np.ndarray, "F Q V"] | None = None,
    embedder: Embedder | None = None,
  ):
    """Computes what does not depend on the question; see `Forgetting`.

    Args:
      rule: what to keep.
      repository: the memory.
      seed: of random strategies, the same for every question.
      features: as in `Forgetting.summarise_frames`.
      embedder: likewise.
    """
    self._rule, self._repository, self._seed = rule, repository, seed
    self._summary = rule.summarise_frames(features, embedder)
    self.fixed = None
    if rule.needs_question:
      self.candidates = np.arange(len(repository.source), dtype=np.int32)
    else:
      self.fixed = self._kept(None)
      self.candidates = np.concatenate([np.zeros(0, np.int32), *self.fixed])

  def of_question(
    self, question: Int[np.ndarray, "q"] | None = None
  ) -> list[np.ndarray]:
    """Returns the memory indices kept for each slot, as `kept_tokens` does.

    Args:
      question: word ids, see `conversations.question_ids`.
    """
    return self._kept(question) if self.fixed is None else self.fixed

  def _kept(self, question: np.ndarray | None) -> list[np.ndarray]:
    return self._rule.kept_tokens(
      self._repository,
      np.random.default_rng(self._seed),
      summary=self._summary,
      question=question,
    )


def memory_indices(
  grid: Grid, frames: Int[np.ndarray, "n"], cells: Int[np.ndarray, "n m"]
) -> Int32[np.ndarray, "k"]:
  """Returns the memory indices of chosen cells and of their newlines.

  Two frames of 1 x 2 cells and a newline are memory tokens 0 1 2 | 3 4 5.
  Frames [0 1] and cells [[1] [0]] give [1 2 3 5].

  A tiled image has a newline after each row, of which those are kept whose row
  has a kept cell, as in the official code. One of 3 x 2 cells is 0 1 2 | 3 4 5
  | 6 7 8; cells [[1 4]] give [1 2 6 8].

  Args:
    grid: F frames of h x w cells.
    frames: kept frames, ascending.
    cells: kept cells of each kept frame, numbered row by row.
  """
  count, high, wide = grid.index.shape
  flat = grid.index.reshape(count, -1)
  tokens = np.take_along_axis(flat[frames], cells, axis=1)
  newlines = grid.newline[frames]
  if newlines.shape[1] == high:  # one for each row; of a single row, the same
    kept = np.zeros(newlines.shape, bool)
    kept[np.arange(len(cells))[:, None], cells // wide] = True
    newlines = newlines[kept]
  # Frames ascend, and so do their tokens in the memory.
  both = np.concatenate([tokens.reshape(-1), newlines.reshape(-1)])
  return np.sort(both).astype(np.int32)


def neighbour_similarity(
  features: Num[np.ndarray, "F V"], neighbours: int = 8
) -> Float32[np.ndarray, "F"]:
  """Returns each frame's mean cosine similarity to its nearest frames.

  Args:
    features: one vector a frame.
    neighbours: half of them before and half after; fewer at the ends.
  """
  x = _unit(np.asarray(features, np.float32))
  total, count = np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
  for gap in range(1, neighbours // 2 + 1):
    if gap >= len(x):
      break
    # The pair (i, i + gap) counts for both of its frames.
    cosine = np.sum(x[gap:] * x[:-gap], axis=1)
    total[gap:] += cosine
    total[:-gap] += cosine
    count[gap:] += 1
    count[:-gap] += 1
  return total / np.maximum(count, 1)


def _unit(x: Float32[np.ndarray, "F V"]) -> Float32[np.ndarray, "F V"]:
  """Scales vectors to length 1; a vector of zeros stays as it is."""
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
