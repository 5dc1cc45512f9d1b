"""The layout of one sample: every MemAug query and decoder position.

Index arithmetic in numpy; no feature is touched. Beside `repository` this is
the only place that knows modalities.
"""

import dataclasses

import numpy as np

from hourjax.batch import IGNORE
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.repository import Repository
from hourjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sources and positions of one sample, int32; -1 means "not this one".

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
    """[L] the label of the next position: what the logits are scored on."""
    return np.append(self.labels[1:], np.int32(IGNORE)).astype(np.int32)


def build_layout(
  conversation: Conversation,
  repository: Repository,
  kept: list[np.ndarray],
  *,
  max_length: int | None = None,
  name: str = "sample",
) -> Layout:
  """Joins a conversation and its kept memory tokens.

  Prompt tokens (label -100) and kept tokens are queries, answers are not.
  Query positions count up from 0; at a visual slot the kept tokens' memory
  positions are shifted by that count, and text goes on after their maximum.
  With ids [7, IMAGE, 8, 9], labels [-100, -100, -100, 9] and kept memory
  positions [0, 4]:

      queries        7  m0 m4  8         decoder  7  m0 m4  8  9
      query_position 0   1  5  6         source   -   1  2  -  -

  Args:
    conversation: token ids with IMAGE at each slot, and labels.
    repository: the memory.
    kept: kept memory indices for each slot, as `forgetting.kept_tokens`.
    max_length: the decoder's sequence is cut here; queries are not.
    name: of the sample, for errors.

  Raises:
    UserError: if slots and IMAGE marks differ in number.
  """
  ids, labels = conversation.ids, conversation.labels
  slots = np.flatnonzero(ids == IMAGE)
  if len(slots) != len(kept):
    raise UserError(
      f"{name}: the text has {len(slots)} visual slots and the record brings"
      f" {len(kept)}; write one <image> for each"
    )
  queries, decoder, count = _Columns(), _Columns(), 0
  start = 0
  for slot, index in [*zip(slots, kept), (len(ids), None)]:
    words = ids[start:slot]
    label = labels[start:slot]
    prompt = words[label == IGNORE] if len(slots) else words[:0]
    queries.add(prompt, -1, count + np.arange(len(prompt)))
    decoder.add(words, -1, label)
    count += len(prompt)
    if index is not None:
      position = repository.position[index] + count
      first = queries.length
      queries.add(np.full(len(index), -1), index, position)
      decoder.add(-1, first + np.arange(len(index)), IGNORE)
      count = int(position.max()) + 1
    start = slot + 1
  cut = slice(max_length)
  return Layout(
    repository,
    *queries.arrays(),
    *(column[cut] for column in decoder.arrays()),
  )


class _Columns:
  """Three int32 columns (token, source, and position or label)."""

  def __init__(self):
    self.parts, self.length = [], 0

  def add(self, token, source, third):
    columns = np.broadcast_arrays(token, source, third)
    self.parts.append(np.stack(columns))
    self.length += columns[0].shape[0]

  def arrays(self):
    return np.concatenate(self.parts, axis=1).astype(np.int32)
