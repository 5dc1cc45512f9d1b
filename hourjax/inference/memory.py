"""The memory of a video or of images, which questions are asked about."""

from collections.abc import Iterator, Sequence

from hourjax.data.records.record import Turn
from hourjax.inference.answering import (
  Answer,
  Answering,
  Stream,
  check_max_tokens,
)
from hourjax.inference.chat_session import ChatSession
from hourjax.inference.engine import padded_rows, rounded
from hourjax.inference.sampling import GREEDY, Sampling, row_sampling

# Most queries, or decoder positions, of prompts that are read together.
_BATCH_QUERIES = 32_768
# Most positions in the KV caches of a batch, padded; 2.4 GB of a 3B model.
_BATCH_CACHE = 65_536


class Memory:
  """Holds an encoded video, encoded images or nothing, to ask about.

  Attributes:
    duration: length of the video in seconds; None if it is not a video.
    num_frames: number of frames that the prompt names; 0 if it is not a video.
    note: what a user should know of the frames, e.g. that some are damaged;
      usually "".
  """

  duration: float | None
  num_frames: int
  note: str

  def __init__(self, answering: Answering, note: str = ""):
    """Wraps an encoded memory; `Model.encode_memory` makes it."""
    self._answering, self.note = answering, note
    self.duration, self.num_frames = answering.video or (None, 0)

  def ask(
    self,
    question: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stream: Stream | None = None,
  ) -> Answer:
    """Answers one question.

    Args:
      question: what to ask.
      max_tokens: longest answer, in tokens.
      sampling: how tokens are chosen.
      stream: gets the text of the answer as it grows.

    Returns:
      The answer, with MemAug's attention over the video.

    Raises:
      UserError: the question is empty, too long, or holds the markup of turns.
    """
    return self.chat().ask(
      question, max_tokens=max_tokens, sampling=sampling, stream=stream
    )

  def chat(self, *, reread_memory: bool = False) -> ChatSession:
    """Starts a conversation, whose turns know of the turns before.

    Args:
      reread_memory: MemAug reads the memory for each turn, not only for the
        first; see `ChatSession`.
    """
    return ChatSession(self._answering, reread_memory=reread_memory)

  def answer(
    self,
    questions: Sequence[str],
    *,
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
  ) -> list[Answer]:
    """Answers questions that do not know of one another, in batches.

    Args:
      questions: what to ask.
      max_tokens: longest answer, in tokens.
      sampling: how tokens are chosen.

    Returns:
      One answer for each question, without attention.

    Raises:
      UserError: a question is empty, too long, or holds the markup of turns.
    """
    check_max_tokens(max_tokens)
    answering = self._answering
    layouts = [
      answering.layout([Turn("human", question)], max_tokens)
      for question in questions
    ]
    answers: list[Answer] = []
    # Prompts of text alone have no queries.
    lengths = [max(len(x.query_token), len(x.decoder_token)) for x in layouts]
    for size in _batch_sizes(lengths, max_tokens):
      first = len(answers)
      state = answering.prefill(layouts[first : first + size], max_tokens)
      state = answering.engine.decode(
        state,
        row_sampling(sampling, first, len(state.done)),
        stop_tokens=answering.stop_tokens,
        max_tokens=max_tokens,
        num_steps=max_tokens,
      )
      answers += [answering.answer(state, row) for row in range(size)]
    return answers


def _batch_sizes(lengths: Sequence[int], max_tokens: int) -> Iterator[int]:
  """Yields how many prompts are read together, in order.

  All KV caches of a batch are as long as the longest prompt needs.

  Args:
    lengths: queries or decoder positions of each prompt.
    max_tokens: longest answer.
  """
  count, total, longest = 0, 0, 0
  for length in lengths:
    cached = padded_rows(count + 1) * rounded(max(longest, length) + max_tokens)
    if count and (total + length > _BATCH_QUERIES or cached > _BATCH_CACHE):
      yield count
      count, total, longest = 0, 0, 0
    count, total = count + 1, total + length
    longest = max(longest, length)
  if count:
    yield count
