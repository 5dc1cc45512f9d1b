"""Conversations about a memory, laid out as training lays them out."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from hourjax.data.conversations import encode_conversation
from hourjax.data.forgetting import Forgetting
from hourjax.data.layout import Layout, build_layout
from hourjax.data.records.record import MARKER, Turn
from hourjax.data.repository import Repository
from hourjax.data.tokenizer import Tokenizer
from hourjax.data.visual_input import Single
from hourjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rules:
  """What of the training's configuration decides answers too.

  Attributes:
    forgetting: which memory tokens the decoder sees.
    max_length: of a conversation in the decoder.
    single_image: "tiled" or "plain".
    seed: of what forgetting draws; the same for every question.
  """

  forgetting: Forgetting = dataclasses.field(default_factory=Forgetting)
  max_length: int = 32_768
  single_image: Single = "tiled"
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Turns questions into layouts.

  Attributes:
    tokenizer: of the model.
    rules: see there.
  """

  tokenizer: Tokenizer
  rules: Rules

  def layout(
    self,
    turns: Sequence[Turn],
    repository: Repository,
    kept: list[np.ndarray],
    video: tuple[float, int] | None,
    room: int,
  ) -> Layout:
    """A conversation up to a question, as queries and decoder positions.

    Args:
      turns: of which the last one asks.
      repository: the memory.
      kept: of its tokens, by visual slot.
      video: duration in seconds and frames, if it is a video.
      room: tokens that the answer may have.

    Raises:
      UserError: an empty question, or more tokens than the decoder takes.
    """
    asked, images = turns[-1].text, 0
    if video is not None:
      # As records begin; elsewhere it would get lost.
      asked = asked.removeprefix(MARKER)
    elif len(turns) == 1:
      images = len(repository.slots)
    check_question(asked, self.tokenizer, images)
    # What the model said stands for no image.
    turns = [
      Turn(t.role, t.text.replace(MARKER, "")) if t.role == "gpt" else t
      for t in turns
    ]
    first = turns[0].text
    missing = len(repository.slots) - sum(t.text.count(MARKER) for t in turns)
    if missing > 0:
      # As records have it; of a video only the line break remains.
      first = f"{MARKER}\n" * missing + first
    prompt = encode_conversation(
      [Turn("human", first), *turns[1:]],
      self.tokenizer,
      video=video,
      prompt_only=True,
    )
    layout = build_layout(prompt, repository, kept, name="the question")
    length = len(layout.decoder_token)
    if length + room > self.rules.max_length:
      raise UserError(
        f"prompt and answer take {length} + {room} tokens and the model reads"
        f" {self.rules.max_length}; ask with less text or fewer tokens"
      )
    return layout


def check_question(text: str, tokenizer: Tokenizer, images: int = 0) -> None:
  """Refuses what would read as something else than a question.

  Args:
    text: of the question.
    tokenizer: of the model.
    images: how many it may say the place of. A video's is before the text.

  Raises:
    UserError: nothing is asked, it is no text, or it holds the markup of turns
      or of images that are not there.
  """
  if not text.replace(MARKER, "").strip():
    raise UserError("the question is empty; ask something")
  try:
    text.encode()
  except UnicodeEncodeError:
    raise UserError(
      f"the question {text!r:.80} is not UTF-8 text; correct its letters"
    ) from None
  if (count := text.count(MARKER)) > images:
    raise UserError(
      f"the question has {count} {MARKER} in its text and {images} are to be"
      " shown there; leave out what is too many"
    )
  markup = {tokenizer.im_start, tokenizer.im_end, tokenizer.pad}
  if found := markup.intersection(tokenizer.encode(text)):
    raise UserError(
      f"the question holds {tokenizer.decode([min(found)])}, which the model"
      " takes for the end or beginning of a turn; leave it out"
    )
