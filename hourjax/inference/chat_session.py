"""A chat session: several turns about one memory, with one KV cache."""

from hourjax.data.conversations import follow_up
from hourjax.data.records.record import Turn
from hourjax.errors import UserError
from hourjax.inference.answering import (
  Answer,
  Answering,
  Stream,
  check_max_tokens,
)
from hourjax.inference.attention_map import AttentionMap
from hourjax.inference.prompts import check_question
from hourjax.inference.sampling import GREEDY, Sampling, row_sampling
from hourjax.inference.steps import DecodeState

_EXTEND_TOKENS = 1024  # tokens of a later turn that one step appends
_STREAM_STEPS = 4  # tokens that are decoded before a stream gets the text


class ChatSession:
  """Holds the turns of a conversation about one memory, and its KV cache.

  A later turn goes on from the decoder's KV cache. The visual tokens in it
  stay as MemAug made them for the first question, so a later turn costs only
  its own words. With `reread_memory` MemAug reads the memory again for each
  turn, with all questions so far, as it does in training; each turn then costs
  what the first question did.

  Attributes:
    turns: questions and answers so far.
  """

  turns: list[Turn]

  def __init__(self, answering: Answering, *, reread_memory: bool = False):
    self._answering, self._reread_memory = answering, reread_memory
    self.turns = []
    self._state: DecodeState | None = None

  def ask(
    self,
    question: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stream: Stream | None = None,
  ) -> Answer:
    """Asks the next question of the conversation.

    Args:
      question: what to ask.
      max_tokens: longest answer, in tokens.
      sampling: how tokens are chosen.
      stream: gets the text of the answer as it grows.

    Returns:
      The answer. Its `attention` is None where the memory was not read.

    Raises:
      UserError: the question is empty, holds the markup of turns, or does not
        fit into the decoder with the turns before it.
    """
    check_max_tokens(max_tokens)
    turns = [*self.turns, Turn("human", question)]
    attention = None
    if self._state is None or self._reread_memory:
      layout = self._answering.layout(turns, max_tokens)
      state, attention = self._answering.prefill_with_attention(
        layout, max_tokens
      )
    else:
      tokens = self._next_tokens(self._state, question, max_tokens)
      # An interrupted turn leaves no state behind: the next one reads the
      # memory and the turns that were answered anew.
      state, self._state = self._state, None
      state = self._extend(state, tokens, max_tokens)
    state, answer = self._decode(state, max_tokens, sampling, stream, attention)
    self._state = state
    self.turns = [*turns, Turn("gpt", answer.text)]
    return answer

  def _next_tokens(
    self, state: DecodeState, question: str, max_tokens: int
  ) -> list[int]:
    """Returns the tokens of a later turn, behind those in the KV cache."""
    prompts = self._answering.prompts
    tokenizer = prompts.tokenizer
    check_question(question, tokenizer)
    # The last token of the answer before is not in the cache yet. An answer
    # that the limit cut has no end of turn.
    last = int(state.last_token[0])
    said = [] if last in self._answering.stop_tokens else [last]
    tokens = [*said, tokenizer.im_end, *follow_up(question, tokenizer)]
    length = int(state.length[0]) + len(tokens)
    most = prompts.rules.max_length
    if length + max_tokens > most:
      raise UserError(
        f"the conversation and the next answer take {length} + {max_tokens}"
        f" tokens and the model reads {most}; begin a new one"
      )
    return tokens

  def _extend(
    self, state: DecodeState, tokens: list[int], max_tokens: int
  ) -> DecodeState:
    """Appends a turn to the KV cache, a long one in parts."""
    engine = self._answering.engine
    while len(tokens) > _EXTEND_TOKENS:
      # The last token of a part is not in the cache after it, so the next part
      # begins with it.
      part, tokens = tokens[:_EXTEND_TOKENS], tokens[_EXTEND_TOKENS - 1 :]
      state = engine.extend(
        state, part, max_tokens=len(tokens) - 1 + max_tokens
      )
    return engine.extend(state, tokens, max_tokens=max_tokens)

  def _decode(
    self,
    state: DecodeState,
    max_tokens: int,
    sampling: Sampling,
    stream: Stream | None,
    attention: AttentionMap | None,
  ) -> tuple[DecodeState, Answer]:
    """Decodes the answer, a few tokens at a time where it is streamed."""
    answering = self._answering
    engine = answering.engine
    num_steps = max_tokens
    if stream:
      num_steps = 1 if engine.slow else _STREAM_STEPS
    rows = row_sampling(sampling, len(self.turns), 1)
    while True:
      state = engine.decode(
        state,
        rows,
        stop_tokens=answering.stop_tokens,
        max_tokens=max_tokens,
        num_steps=num_steps,
      )
      answer = answering.answer(state, 0, attention)
      if stream:
        stream(answer.text)
      if bool(state.done[0]):
        return state, answer
