"""Prompts: conversations about a memory, laid out as in training."""

import dataclasses
from collections.abc import Sequence

from hourjax.data.conversations import encode_conversation, question_ids
from hourjax.data.forgetting import Forgetting, KeptTokens
from hourjax.data.layout import Layout, build_layout
from hourjax.data.memory_options import MemoryOptions
from hourjax.data.records.record import MARKER, Turn
from hourjax.data.repository import Repository
from hourjax.data.tokenizer import Tokenizer
from hourjax.data.visual_input import Single
from hourjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rules:
  """Holds the settings of the training that also decide answers.

  Attributes:
    forgetting: which memory tokens the decoder sees.
    max_length: most tokens of a conversation in the decoder.
    single_image: "tiled" or "plain", for a single image.
    seed: seed of random forgetting; every memory uses the same.
    memory: which memory tokens MemAug attends to, and their positions.
  """

  forgetting: Forgetting = dataclasses.field(default_factory=Forgetting)
  max_length: int = 32_768
  single_image: Single = "tiled"
  seed: int = 0
  memory: MemoryOptions = dataclasses.field(default_factory=MemoryOptions)


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Turns conversations into layouts.

  Attributes:
    tokenizer: tokenizer of the model.
    rules: settings of the training.
  """

  tokenizer: Tokenizer
  rules: Rules

  def layout(
    self,
    turns: Sequence[Turn],
    repository: Repository,
    kept: KeptTokens,
    video: tuple[float, int] | None,
    max_tokens: int,
  ) -> Layout:
    """Lays out a conversation up to a question.

    Args:
      turns: questions and answers in order; the last one asks.
      repository: where the tokens of the memory come from.
      kept: which memory tokens forgetting keeps.
      video: duration in seconds and number of frames; None if the memory is
        not that of a video.
      max_tokens: longest answer.

    Raises:
      UserError: the question is empty or holds markup, or prompt and answer
        are more tokens than the decoder takes.
    """
    asked, images = turns[-1].text, 0
    if video is not None:
      # Records begin with the marker, so a question may too.
      asked = asked.removeprefix(MARKER)
    elif len(turns) == 1:
      images = len(repository.slots)
    check_question(asked, self.tokenizer, images)
    # A marker in the model's own words stands for no image.
    turns = [
      Turn(t.role, t.text.replace(MARKER, "")) if t.role == "gpt" else t
      for t in turns
    ]
    seen = kept.of_question(question_ids(turns, self.tokenizer))
    first = turns[0].text
    missing = len(repository.slots) - sum(t.text.count(MARKER) for t in turns)
    if missing > 0:
      # Images and videos that the text does not place come first, on lines of
      # their own, as in the records.
      first = f"{MARKER}\n" * missing + first
    prompt = encode_conversation(
      [Turn("human", first), *turns[1:]],
      self.tokenizer,
      video=video,
      prompt_only=True,
    )
    layout = build_layout(
      prompt, repository, seen, memory=self.rules.memory, name="the question"
    )
    length = len(layout.decoder_token)
    if length + max_tokens > self.rules.max_length:
      raise UserError(
        f"prompt and answer take {length} + {max_tokens} tokens and the model"
        f" reads {self.rules.max_length}; ask with less text or fewer tokens"
      )
    return layout


def check_question(text: str, tokenizer: Tokenizer, images: int = 0) -> None:
  """Checks that a text is a question and nothing else.

  Args:
    text: the question.
    tokenizer: tokenizer of the model.
    images: number of image markers that the text may hold. A video comes
      before the text, without a marker.

  Raises:
    UserError: the question is empty, is not UTF-8, or holds the markup of
      turns or of images that are not there.
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
