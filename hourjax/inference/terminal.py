"""A conversation on a terminal, with where the model looked."""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from hourjax import progress
from hourjax.errors import UserError
from hourjax.inference.film import Progress
from hourjax.inference.memory import Answer, Conversation
from hourjax.inference.picture import save_look
from hourjax.inference.sampling import GREEDY, Sampling


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """A command ends without a traceback.

  With 130 on interrupt, with 141 when nobody reads the answers any more. What
  a terminal cannot show is printed as "?"; what is typed that is no text is
  left to the question's check.
  """
  if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="surrogateescape")
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")
  try:
    yield
    sys.stdout.flush()
  except KeyboardInterrupt:
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)
  except BrokenPipeError:
    # Python would complain once more when it flushes at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


@contextlib.contextmanager
def shown(desc: str, unit: str) -> Iterator[Progress]:
  """Something to tell of progress; a bar appears with the first word of it."""
  with contextlib.ExitStack() as stack:
    bar = None

    def show(done: int, total: int) -> None:
      nonlocal bar
      if bar is None:
        bar = stack.enter_context(progress.bar(total, unit=unit, desc=desc))
      bar.update(done - bar.n)

    yield show


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
    shown, silent = "", contextlib.ExitStack()

    def stream(text: str) -> None:
      nonlocal shown
      silent.close()
      text = text.rstrip("\ufffd")  # half a letter
      print(text[len(shown) :], end="", flush=True)
      shown = text

    with silent:
      silent.enter_context(
        progress.step("reading the memory; what is new is compiled first")
      )
      answer = self.conversation.ask(
        question,
        max_tokens=self.max_tokens,
        sampling=self.sampling,
        stream=stream,
      )
    end = "" if answer.finished else f" [cut at {self.max_tokens} tokens]"
    if not answer.text:
      end = f"[no words]{end}"
    print(answer.text[len(shown) :] + end)
    if answer.looked:
      print(f"\n{answer.looked.text()}")
      self._draw(question, answer)
    return answer

  def listen(self, source: TextIO) -> int:
    """Asks what is typed, or the lines of a file or pipe, to its end.

    Returns:
      How many lines could not be asked.
    """
    typed, failed = source.isatty(), 0
    while True:
      if typed:
        print("\n> ", end="", flush=True)
      line = source.readline()
      if not line:
        if typed:
          print()  # the shell's next prompt has a line of its own
        return failed
      question = line.strip()
      if not question:
        continue
      if not typed:
        print(f"\n> {question}")
      try:
        self.ask(question)
      except UserError as error:
        failed += 1
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
