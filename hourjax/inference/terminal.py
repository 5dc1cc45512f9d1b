"""A conversation on a terminal, with where the model looked."""

import dataclasses
import sys
from typing import TextIO

from hourjax.errors import UserError
from hourjax.inference.memory import Answer, Conversation
from hourjax.inference.picture import save_look
from hourjax.inference.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True)
class Talk:
  """How questions are asked and answers shown.

  Attributes:
    conversation: that goes on.
    max_tokens: of an answer.
    sampling: how tokens are chosen.
    picture: file for where the model looked, "" for none; a later turn's
      replaces it.
    film: video file, of which the picture shows moments; "" for none.
  """

  conversation: Conversation
  max_tokens: int = 256
  sampling: Sampling = GREEDY
  picture: str = ""
  film: str = ""

  def ask(self, question: str) -> Answer:
    """Prints the answer while it is written."""
    shown = ""

    def stream(text: str) -> None:
      nonlocal shown
      text = text.rstrip("\ufffd")  # half a letter
      print(text[len(shown) :], end="", flush=True)
      shown = text

    answer = self.conversation.ask(
      question,
      max_tokens=self.max_tokens,
      sampling=self.sampling,
      stream=stream,
    )
    cut = "" if answer.finished else f" [cut at {self.max_tokens} tokens]"
    print(answer.text[len(shown) :] + cut)
    if answer.looked:
      print(f"\n{answer.looked.text()}")
      self._draw(question, answer)
    return answer

  def listen(self, source: TextIO) -> None:
    """Asks what is typed, or the lines of a file or pipe, to its end."""
    typed = source.isatty()
    while True:
      if typed:
        print("\n> ", end="", flush=True)
      line = source.readline()
      if not line:
        return
      question = line.strip()
      if not question:
        continue
      if not typed:
        print(f"\n> {question}")
      try:
        self.ask(question)
      except UserError as error:
        print(f"error: {error}", file=sys.stderr)

  def _draw(self, question: str, answer: Answer) -> None:
    if not self.picture:
      return
    save_look(
      answer.looked,
      self.picture,
      question=question,
      answer=answer.text,
      film=self.film or None,
    )
    print(f"wrote {self.picture}")
