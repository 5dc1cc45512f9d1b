"""The layout of one sample: where every query and decoder position comes from.

Index arithmetic in numpy; no feature is touched. This module and `repository`
are the only ones that know modalities: the model only gathers. See
hourjax/README.md, MemAug.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
from jaxtyping import Int32

from hourjax.batch import IGNORE
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.memory_options import WHOLE_MEMORY, MemoryOptions
from hourjax.data.repository import Repository
from hourjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
  """Holds sources and positions of one sample, int32.

  Each query and each decoder position comes either from a word or from an
  index into other tokens. Its token holds the word id and its source the index;
  the one of the two that does not apply is -1.

  Attributes:
    repository: the memory, S tokens.
    query_token: [T] word id, or -1 for a memory token.
    query_source: [T] index into the memory, or -1.
    query_position: [T].
    decoder_token: [L] word id, or -1 for a MemAug output.
    decoder_source: [L] index into the queries, or -1.
    labels: [L] the word at this position if it is trained on, else -100.
  """

  repository: Repository
  query_token: np.ndarray
  query_source: np.ndarray
  query_position: np.ndarray
  decoder_token: np.ndarray
  decoder_source: np.ndarray
  labels: np.ndarray

  @property
  def targets(self) -> np.ndarray:
    """Returns the label of the next position, [L]: the target of its logits.

    Labels [-100 8 9] give targets [8 9 -100].
    """
    return np.append(self.labels[1:], np.int32(IGNORE)).astype(np.int32)


def build_layout(
  conversation: Conversation,
  repository: Repository,
  kept: list[np.ndarray],
  *,
  memory: MemoryOptions = WHOLE_MEMORY,
  max_length: int | None = None,
  name: str = "sample",
) -> Layout:
  """Joins a conversation and its kept memory tokens.

  Prompt tokens (label -100) and kept tokens are queries, answers are not.
  Query positions count up from 0; at a visual slot the kept tokens' memory
  positions are shifted by that count, and text goes on after their maximum.
  With ids [7, IMAGE, 8, 9], labels [-100, -100, -100, 9] and kept memory
  tokens [0, 4], whose positions are [0, 4] too:

      query_token      7  -1  -1   8    7 and 8 are prompt, 9 is the answer
      query_source    -1   0   4  -1    index into the memory
      query_position   0   1   5   6    1 + 0, 1 + 4, then 5 + 1
      decoder_token    7  -1  -1   8   9
      decoder_source  -1   1   2  -1  -1    index into the queries
      labels        -100 -100 -100 -100   9

  A conversation without a visual slot has no queries: its text is read by the
  decoder alone.

  Args:
    conversation: token ids with IMAGE at each slot, and labels.
    repository: the memory.
    kept: kept memory indices for each slot, as `Forgetting.kept_tokens`
      returns them.
    memory: what of the memory is attended to, and which positions count.
    max_length: the decoder's sequence is cut here; queries are not.
    name: of the sample, for errors.

  Raises:
    UserError: the number of slots differs from the number of IMAGE marks.
  """
  ids, labels = conversation.ids, conversation.labels
  slots = np.flatnonzero(ids == IMAGE)
  if len(slots) != len(kept):
    raise UserError(
      f"{name}: the text has {len(slots)} visual slots and the record brings"
      f" {len(kept)}; write one <image> for each"
    )
  queries, decoder = _Columns(), _Columns()
  count = 0  # the next query position
  start = 0  # index of the first word that is not laid out yet
  # Each round lays out the text before a slot and then the slot; the last
  # round has only text.
  for slot, index in [*zip(slots, kept), (len(ids), None)]:
    words = ids[start:slot]
    label = labels[start:slot]
    prompt = words[label == IGNORE] if len(slots) else words[:0]
    queries.add(prompt, -1, count + np.arange(len(prompt)))
    decoder.add(words, -1, label)
    count += len(prompt)
    if index is not None:
      # Query positions are shifted, those of the memory itself are not.
      position = repository.position[index] + count
      first = queries.length
      queries.add(np.full(len(index), -1), index, position)
      decoder.add(-1, first + np.arange(len(index)), IGNORE)
      count = int(position.max()) + 1
    start = slot + 1
  cut = slice(max_length)
  query_token, query_source, query_position = queries.arrays()
  return Layout(
    memory.limit_memory(repository, kept),
    query_token,
    query_source,
    memory.place_queries(query_position),
    *(column[cut] for column in decoder.arrays()),
  )


class _Columns:
  """Collects three int32 columns: token, source, and position or label."""

  def __init__(self) -> None:
    self.parts: list[np.ndarray] = []
    self.length = 0

  def add(
    self,
    token: npt.ArrayLike,
    source: npt.ArrayLike,
    third: npt.ArrayLike,
  ) -> None:
    """Adds rows; a single number stands for all of them."""
    columns = np.broadcast_arrays(token, source, third)
    self.parts.append(np.stack(columns))
    self.length += columns[0].shape[0]

  def arrays(self) -> Int32[np.ndarray, "3 n"]:
    """Returns the three columns, one below the other."""
    return np.concatenate(self.parts, axis=1).astype(np.int32)
