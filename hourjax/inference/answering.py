"""From questions about one memory to answers: prompts, prefill and text."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from hourjax.data.forgetting import KeptTokens
from hourjax.data.layout import Layout
from hourjax.data.records.record import Turn
from hourjax.data.repository import Repository, repeated_frames
from hourjax.errors import UserError
from hourjax.inference.attention_map import AttentionMap, attention_over_time
from hourjax.inference.engine import EncodedMemory, Engine
from hourjax.inference.prompts import Prompts
from hourjax.inference.steps import DecodeState

# Gets the text of an answer so far.
Stream = Callable[[str], None]

_MAX_PROBES = 512  # visual queries whose attention is averaged


@dataclasses.dataclass(frozen=True)
class Answer:
  """Holds one answer of the model.

  Attributes:
    text: the answer without special tokens and surrounding blanks.
    tokens: number of decoded tokens, the end of the turn included.
    finished: True if the answer ended by itself, False if by the limit.
    attention: MemAug's attention over the seconds of the video; None where the
      question did not read a video's memory.
  """

  text: str
  tokens: int
  finished: bool
  attention: AttentionMap | None = None


@dataclasses.dataclass(frozen=True)
class Answering:
  """Prepares and reads out answers about one encoded memory.

  Attributes:
    engine: the model.
    prompts: turns conversations into layouts.
    memory: the encoded memory.
    repository: where the tokens of the memory come from.
    kept: which memory tokens forgetting keeps, for any question.
    video: duration in seconds and number of frames; None if the memory is not
      that of a video.
  """

  engine: Engine
  prompts: Prompts
  memory: EncodedMemory
  repository: Repository
  kept: KeptTokens
  video: tuple[float, int] | None = None

  @property
  def stop_tokens(self) -> list[int]:
    """Returns the tokens that end an answer."""
    tokenizer = self.prompts.tokenizer
    return [tokenizer.im_end, tokenizer.pad]

  def layout(self, turns: Sequence[Turn], max_tokens: int) -> Layout:
    """Lays out a conversation whose last turn asks; see `Prompts.layout`."""
    return self.prompts.layout(
      turns, self.repository, self.kept, self.video, max_tokens
    )

  def prefill(self, layouts: Sequence[Layout], max_tokens: int) -> DecodeState:
    """Reads prompts of which each gets an answer of up to `max_tokens`."""
    return self.engine.prefill(self.memory, layouts, max_tokens=max_tokens)[0]

  def prefill_with_attention(
    self, layout: Layout, max_tokens: int
  ) -> tuple[DecodeState, AttentionMap | None]:
    """Reads one prompt, and measures MemAug's attention over the video.

    Returns:
      The state to decode, and the attention; None if the memory is not that of
      a video or the model has no MemAug.
    """
    config = self.engine.config
    if self.video is None or not config.memaug_layers:
      return self.prefill([layout], max_tokens), None
    state, attention = self.engine.prefill(
      self.memory,
      [layout],
      max_tokens=max_tokens,
      probe_queries=choose_probe_queries(layout.query_token),
    )
    if attention is None:
      return state, None
    duration, num_frames = self.video
    frame_tokens = config.pool_side**2 + 1  # and the newline
    index = self.memory.token_index
    # A short video's frames are repeated in the memory: the attention to all
    # copies of a frame belongs to that frame.
    frames = repeated_frames(num_frames)
    frame = np.where(index < 0, -1, frames[index // frame_tokens])
    return state, attention_over_time(attention, frame, duration)

  def answer(
    self, state: DecodeState, row: int, attention: AttentionMap | None = None
  ) -> Answer:
    """Returns the answer of one row as far as it is decoded."""
    count = int(state.count[row])
    ids = [int(i) for i in np.asarray(state.answer[row, :count])]
    stop = self.stop_tokens
    finished = count > 0 and ids[-1] in stop
    text = self.prompts.tokenizer.decode(
      [i for i in ids if i not in stop], skip_special=True
    )
    return Answer(text.strip(), count, finished, attention)


def choose_probe_queries(query_token: np.ndarray) -> np.ndarray:
  """Returns the probe queries: those whose attention is measured.

  Args:
    query_token: word id of each query of a prompt, -1 at a memory token.

  Returns:
    Indices of at most 512 of the visual queries, evenly spread, int32.
  """
  visual = np.flatnonzero(query_token < 0)
  step = max(1, -(-len(visual) // _MAX_PROBES))
  return visual[::step].astype(np.int32)


def check_max_tokens(max_tokens: int) -> None:
  """Checks the limit of an answer.

  Raises:
    UserError: it is below 1.
  """
  if max_tokens < 1:
    raise UserError(
      f"max_tokens is {max_tokens}; an answer has at least 1, its end"
    )
