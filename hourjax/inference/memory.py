"""A memory to ask about, and conversations about it."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from hourjax.data.conversations import follow_up
from hourjax.data.records.record import Turn
from hourjax.data.repository import Repository, repeated_frames
from hourjax.errors import UserError
from hourjax.inference.attention_map import AttentionMap, attention_over_time
from hourjax.inference.engine import EncodedMemory, Engine, padded_rows, rounded
from hourjax.inference.prompts import Prompts, check_question
from hourjax.inference.sampling import GREEDY, Sampling, draws

# Told the text of an answer so far.
Stream = Callable[[str], None]

_QUERIES = 32_768  # or positions, of prompts that are read together
_CACHED = 65_536  # positions of their caches, padded; 2.4 GB of a 3B model
_WATCHED = 512  # visual queries whose attention is looked at, at most
_TURN = 1024  # tokens of a later turn that are read together
_STEPS = 4  # tokens between two looks at what is written


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the model says.

  Attributes:
    text: without special tokens and surrounding blanks.
    tokens: written, the end of turn included.
    finished: it ended by itself, not by the limit.
    looked: where in the video MemAug looked, if that was asked for.
  """

  text: str
  tokens: int
  finished: bool
  looked: AttentionMap | None = None


class Memory:
  """A video, images or nothing, remembered by a model.

  Attributes:
    duration: of the video in seconds; None if it is none.
    frames: that the model is told of; 0 if it is no video.
    note: what is to be said of the frames that are shown; "" as a rule.
  """

  duration: float | None
  frames: int
  note: str

  def __init__(
    self,
    engine: Engine,
    prompts: Prompts,
    known: EncodedMemory,
    repository: Repository,
    kept: list[np.ndarray],
    video: tuple[float, int] | None = None,
    note: str = "",
  ):
    """Made by the model.

    Args:
      engine: the model.
      prompts: lays questions out.
      known: what of it is on the devices.
      repository: of the memory's tokens.
      kept: what the decoder sees of them, by visual slot.
      video: duration and frames.
      note: see the attribute.
    """
    self.note = note
    self._engine, self._prompts, self._known = engine, prompts, known
    self._repository, self._kept, self._video = repository, kept, video
    self.duration, self.frames = video or (None, 0)

  def ask(
    self,
    question: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stream: Stream | None = None,
  ) -> Answer:
    """Answers one question, and says where the model looked.

    Args:
      question: what to ask.
      max_tokens: of the answer.
      sampling: how tokens are chosen.
      stream: told of the text as it grows.

    Raises:
      UserError: an empty question, one that is too long, or one that holds
        the markup of turns.
    """
    return self.chat().ask(
      question, max_tokens=max_tokens, sampling=sampling, stream=stream
    )

  def chat(self, *, reread: bool = False) -> "Conversation":
    """A conversation: its turns know of the turns before.

    Args:
      reread: see `Conversation`.
    """
    return Conversation(self, reread=reread)

  def answer(
    self,
    questions: Sequence[str],
    *,
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
  ) -> list[Answer]:
    """Answers to questions that do not know of one another.

    They are read and written together, as many as fit.
    """
    _check_limit(max_tokens)
    layouts = [
      self._layout([Turn("human", question)], max_tokens)
      for question in questions
    ]
    answers: list[Answer] = []
    # Prompts of text alone have no queries.
    lengths = [max(len(x.query_token), len(x.decoder_token)) for x in layouts]
    for group in _groups(lengths, max_tokens):
      first = len(answers)
      writing, _ = self._engine.begin(
        self._known, [layouts[first + n] for n in range(group)], room=max_tokens
      )
      writing = self._engine.write(
        writing,
        draws(sampling, first, len(writing.done)),
        stop=self._stop,
        limit=max_tokens,
        tokens=max_tokens,
      )
      answers += [self._answer(writing, row) for row in range(group)]
    return answers

  @property
  def _stop(self) -> list[int]:
    return [self._prompts.tokenizer.im_end, self._prompts.tokenizer.pad]

  def _layout(self, turns, room):
    return self._prompts.layout(
      turns, self._repository, self._kept, self._video, room
    )

  def _answer(
    self, writing, row: int, looked: AttentionMap | None = None
  ) -> Answer:
    count = int(writing.count[row])
    ids = np.asarray(writing.written[row, :count])
    finished = count > 0 and int(ids[-1]) in self._stop
    text = self._text(ids)
    return Answer(text, count, finished, looked)

  def _text(self, ids) -> str:
    said = [int(i) for i in ids if int(i) not in self._stop]
    return self._prompts.tokenizer.decode(said, skip_special=True).strip()


class Conversation:
  """Turns about one memory.

  A later turn goes on from the decoder's cache: what the decoder sees of the
  video stays as the first question made MemAug read it, and only the new words
  cost. With `reread` MemAug reads the memory again with all questions so far,
  as it does in training, which costs what the first question did.

  Attributes:
    turns: so far, questions and answers.
  """

  turns: list[Turn]

  def __init__(self, memory: Memory, *, reread: bool = False):
    self._memory, self._reread = memory, reread
    self.turns = []
    self._writing = None

  def ask(
    self,
    question: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stream: Stream | None = None,
  ) -> Answer:
    """The next turn; see `Memory.ask`.

    `looked` is None where the memory was not read.
    """
    _check_limit(max_tokens)
    turns = [*self.turns, Turn("human", question)]
    looked = None
    if self._writing is None or self._reread:
      writing, looked = self._begin(turns, max_tokens)
    else:
      tokens = self._follow_up(turns, max_tokens)
      # If this turn is interrupted its half is not gone on from: the next one
      # reads the memory and the turns before anew.
      writing, self._writing = self._writing, None
      writing = self._extend(writing, tokens, max_tokens)
    writing, answer = self._write(writing, max_tokens, sampling, stream, looked)
    self._writing = writing
    self.turns = [*turns, Turn("gpt", answer.text)]
    return answer

  def _begin(self, turns, room):
    memory = self._memory
    layout = memory._layout(turns, room)
    watched = None
    if memory.duration is not None and memory._engine.config.memaug_layers:
      watched = probe_queries(layout.query_token)
    writing, shares = memory._engine.begin(
      memory._known, [layout], room=room, watched=watched
    )
    if shares is None:
      return writing, None
    tokens = memory._engine.config.pool_side**2 + 1
    places = memory._known.places
    shown = repeated_frames(memory.frames)
    frame = np.where(places < 0, -1, shown[places // tokens])
    return writing, attention_over_time(shares, frame, memory.duration)

  def _follow_up(self, turns, room) -> list[int]:
    """Tokens of the last turn, after what is cached."""
    memory = self._memory
    tokenizer = memory._prompts.tokenizer
    check_question(turns[-1].text, tokenizer)
    # What was said last is not in the cache yet.
    last = int(self._writing.token[0])
    said = [] if last in memory._stop else [last]
    tokens = [*said, tokenizer.im_end]  # however it ended
    tokens += follow_up(turns[-1].text, tokenizer)
    length = int(self._writing.length[0]) + len(tokens)
    most = memory._prompts.rules.max_length
    if length + room > most:
      raise UserError(
        f"the conversation and the next answer take {length} + {room} tokens"
        f" and the model reads {most}; begin a new one"
      )
    return tokens

  def _extend(self, writing, tokens, room):
    engine = self._memory._engine
    while len(tokens) > _TURN:
      # The last one is not cached yet, so the next part begins with it.
      part, tokens = tokens[:_TURN], tokens[_TURN - 1 :]
      writing = engine.extend(writing, part, room=len(tokens) - 1 + room)
    return engine.extend(writing, tokens, room=room)

  def _write(self, writing, limit, sampling, stream, looked):
    memory, how = self._memory, draws(sampling, len(self.turns), 1)
    while True:
      writing = memory._engine.write(
        writing,
        how,
        stop=memory._stop,
        limit=limit,
        tokens=(1 if memory._engine.slow else _STEPS) if stream else limit,
      )
      answer = memory._answer(writing, 0, looked)
      if stream:
        stream(answer.text)
      if bool(writing.done[0]):
        return writing, answer


def probe_queries(token: np.ndarray) -> np.ndarray:
  """The queries whose attention tells where the model looked.

  Args:
    token: word of each query, -1 where it is a memory token.
  """
  visual = np.flatnonzero(token < 0)
  step = max(1, -(-len(visual) // _WATCHED))
  return visual[::step].astype(np.int32)


def _check_limit(max_tokens: int) -> None:
  if max_tokens < 1:
    raise UserError(
      f"max_tokens is {max_tokens}; an answer has at least 1, its end"
    )


def _groups(lengths: Sequence[int], room: int):
  """How many prompts are read at a time, in order.

  A short prompt beside a long one has a cache as long as that.
  """
  count, total, longest = 0, 0, 0
  for length in lengths:
    cached = padded_rows(count + 1) * rounded(max(longest, length) + room)
    if count and (total + length > _QUERIES or cached > _CACHED):
      yield count
      count, total, longest = 0, 0, 0
    count, total = count + 1, total + length
    longest = max(longest, length)
  if count:
    yield count
