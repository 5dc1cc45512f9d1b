"""Conversations: turns to token ids and labels, in Qwen's chat markup."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from hourjax.data.media.frame_rules import time_instruction
from hourjax.data.records.turns import MARKER, SYSTEM, Turn
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError

IMAGE = -200  # the id of a visual slot
IGNORE = -100  # the label of a token that is not trained

_OPENING = "<|im_start|>assistant\n"
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Holds one conversation of N tokens.

  Attributes:
    ids: token ids; IMAGE marks a visual slot.
    labels: the id where a token is trained, else IGNORE. Not shifted.
    answer: index of the first token that the assistant says, after the markup
      that opens its turn; N if it says nothing.
  """

  ids: Int32[np.ndarray, "N"]
  labels: Int32[np.ndarray, "N"]
  answer: int = 0


def encode_conversation(
  turns: Sequence[Turn],
  tokenizer: Tokenizer,
  *,
  system: str = SYSTEM,
  video: tuple[float | int, int] | None = None,
  prompt_only: bool = False,
  slots: bool = True,
) -> Conversation:
  r"""Writes turns in chat markup and labels them.

  See hourjax/README.md, Conversations.

  Assistant turns are labelled whole, markup included; elsewhere only
  `<|im_start|>`, `<|im_end|>` and the newline token are:

    ids     <|im_start|> user \n  IMAGE \n  Why ?  <|im_end|> \n
    labels  <|im_start|> -100 \n  -100  \n -100 -100 <|im_end|> \n

  Args:
    turns: human and gpt in turn, human first; for training, one side may have
      several turns in a row.
    tokenizer: has the markup's tokens.
    system: the system prompt.
    video: (duration in seconds, frames stated in the prompt). The first human
      turn then opens with the visual slot and the time instruction; markers
      in the turns are dropped. What is left of the question is not stripped:
      "<image>\nWhy?" gives "...this video.\n\nWhy?", as in training.
    prompt_only: for inference: drops a final gpt turn and opens the answer's
      turn. Nothing is labelled but earlier answers, which MemAug does not see
      in training either; the rest is prompt, markup included.
    slots: whether a marker is a visual slot; in a text record it is a word.

  Raises:
    UserError: there is nothing to ask or nothing to train on, roles do not
      alternate, or the video has no frames.
  """
  turns = list(turns)
  if prompt_only and turns and turns[-1].role == "gpt":
    turns = turns[:-1]
  _check(turns, prompt_only)
  if video is not None:
    turns = _with_instruction(turns, *video)

  tokens = _encode_turn("system", system, tokenizer, slots)
  spoken = [False] * len(tokens)  # by the assistant
  for turn in turns:
    new = _encode_turn(_ROLES[turn.role], turn.text, tokenizer, slots)
    tokens += new
    spoken += [turn.role == "gpt"] * len(new)
  opening = tokenizer.encode(_OPENING)
  if prompt_only:
    tokens += opening

  ids = np.array(tokens, np.int32)
  if prompt_only:
    answered = np.append(spoken, [False] * len(opening))
    labels = np.where(answered, ids, np.int32(IGNORE))
    return Conversation(ids, labels.astype(np.int32), len(ids))
  markup = [tokenizer.im_start, tokenizer.im_end, tokenizer.newline]
  trained = (np.array(spoken) | np.isin(ids, markup)) & (ids != IMAGE)
  labels = np.where(trained, ids, np.int32(IGNORE))
  # There is an answer with text, or _check would have raised.
  return Conversation(ids, labels, spoken.index(True) + len(opening))


def follow_up(question: str, tokenizer: Tokenizer) -> list[int]:
  r"""Returns the tokens after the end of an answer: a question, and an opening.

  \n <|im_start|> user \n Why ? <|im_end|> \n <|im_start|> assistant \n
  """
  return [
    tokenizer.newline,
    *_encode_turn("user", question, tokenizer),
    *tokenizer.encode(_OPENING),
  ]


def answer_ids(text: str, tokenizer: Tokenizer) -> list[int]:
  r"""Returns the tokens of an answer as they stand behind its turn's opening.

  red <|im_end|> \n

  Args:
    text: of the answer.
    tokenizer: of the model.
  """
  opening = tokenizer.encode(_OPENING)
  return _encode_turn("assistant", text, tokenizer, slots=False)[len(opening) :]


def question_ids(
  turns: Sequence[Turn], tokenizer: Tokenizer
) -> Int32[np.ndarray, "n"]:
  """Returns the word ids of everything that the human turns say.

  This is the question of question-guided forgetting: no markup of turns, no
  system prompt, no time instruction and no visual slots. Turns are encoded one
  by one, so that a turn has the same ids whatever surrounds it.
  """
  said = [
    t.text.replace(MARKER, "").strip() for t in turns if t.role == "human"
  ]
  ids = [i for text in said for i in tokenizer.encode(text)]
  return np.array(ids, np.int32)


def answer_spans(
  labels: Int32[np.ndarray, "N"], tokenizer: Tokenizer
) -> list[tuple[int, int]]:
  r"""Returns (start, end) of what the assistant says in each of its turns.

  What is left of the labels is markup: `<|im_start|>`, `<|im_end|>`, the names
  of roles, and the newlines around turns; a newline within an answer is its
  own. As only the assistant's turns are labelled whole, they are found by
  their opening. With I and E for `<|im_start|>` and `<|im_end|>`:

    index   0  1     2   3     4  5   6  7          8   9  10   11  12
    labels  I  -100  \n  -100  E  \n  I  assistant  \n  A  cat  E   \n

  gives [(9, 11)]. An answer that was cut ends with the labels.

  Args:
    labels: of one sample in order, IGNORE where there is none; or its targets,
      for which the spans count targets.
    tokenizer: that the sample was encoded with.
  """
  opening = np.array(tokenizer.encode(_OPENING))
  if len(labels) < len(opening):
    return []
  windows = np.lib.stride_tricks.sliding_window_view(labels, len(opening))
  ends = np.flatnonzero((labels == tokenizer.im_end) | (labels == IGNORE))
  ends = np.append(ends, len(labels))
  starts = np.flatnonzero((windows == opening).all(axis=1)) + len(opening)
  found = ends[np.searchsorted(ends, starts)]
  return list(zip(starts.tolist(), found.tolist()))


def _check(turns: list[Turn], prompt_only: bool) -> None:
  """Checks roles and texts; raises UserError."""
  for i, turn in enumerate(turns):
    expected = ("human", "gpt")[i % 2]
    if turn.role != expected and (prompt_only or i == 0):
      raise UserError(
        f"turn {i} is from {turn.role!r}, expected {expected!r}; human and "
        "gpt must alternate, human first"
      )
  if not turns:
    raise UserError("a conversation without a human turn; ask something")
  if not prompt_only and not any(
    turn.text.strip() for turn in turns if turn.role == "gpt"
  ):
    raise UserError(
      f"none of {len(turns)} turn(s) is a gpt answer with text, so there is "
      "nothing to train on; add an answer or drop the record"
    )


def _with_instruction(
  turns: list[Turn], duration: float | int, frames: int
) -> list[Turn]:
  """Puts the visual slot and the time instruction before the first turn."""
  if frames < 1:
    raise UserError(
      f"a video of {duration:.2f} seconds gives {frames} frames, at least 1 "
      "needed; drop the record or check the stored duration"
    )
  plain = [Turn(t.role, t.text.replace(MARKER, "")) for t in turns]
  instruction = time_instruction(duration, frames)
  first = f"{MARKER}\n{instruction}\n{plain[0].text}"
  return [Turn("human", first), *plain[1:]]


def _encode_turn(
  role: str, text: str, tokenizer: Tokenizer, slots: bool = True
) -> list[int]:
  """Returns the tokens of a turn, with IMAGE at each visual slot."""
  whole = f"<|im_start|>{role}\n{text}<|im_end|>\n"
  # Cut at the markers before tokenizing, so that no token spans one.
  marked = whole.split(MARKER) if slots else [whole]
  ids = tokenizer.encode(marked[0])
  for piece in marked[1:]:
    ids += [IMAGE, *tokenizer.encode(piece)]
  return ids
