"""Asking on a terminal: options are checked, answers printed and drawn."""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from hourjax import progress
from hourjax.errors import UserError
from hourjax.inference.answering import Answer
from hourjax.inference.attention_map import (
  check_figure_path,
  save_attention_figure,
)
from hourjax.inference.chat_session import ChatSession
from hourjax.inference.sampling import GREEDY, Sampling
from hourjax.inference.video_features import Progress


def image_paths(values: Sequence[str]) -> list[str]:
  """Returns the files that --images names: one, or several with commas between.

  A comma may be part of a name, where a file of the longer name exists:

    a.jpg,b.jpg      a.jpg and b.jpg
    a,b.jpg,c.jpg    a,b.jpg and c.jpg, if there is a file "a,b.jpg"

  Args:
    values: the values of all --images options.
  """
  paths = []
  for value in values:
    parts = value.split(",")
    while parts:
      sizes = range(len(parts), 0, -1)
      names = {size: ",".join(parts[:size]).strip() for size in sizes}
      size = next((n for n in sizes if os.path.isfile(names[n])), 1)
      paths.append(names[size])
      parts = parts[size:]
  return paths


def check_options(
  questions: Sequence[str],
  *,
  video: str | None,
  features: str | None,
  images: Sequence[str],
  duration: float | None,
  sampling: Sampling,
  picture: str,
) -> None:
  """Checks the options of `python -m hourjax.ask` before a model is loaded.

  Args:
    questions: arguments behind the options: one question, or none.
    video: video file, if given.
    features: file of features, if given.
    images: image files.
    duration: length of the video of `features` in seconds, if given.
    sampling: how tokens are chosen.
    picture: file for the attention figure; "" for none.

  Raises:
    UserError: an option is wrong. The message names it and the remedy.
  """
  if len(questions) > 1:
    raise UserError(
      f"{len(questions)} arguments, {questions[0]!r} and more; put the question"
      " in quotes, options start with --"
    )
  if questions and not questions[0].strip():
    raise UserError("the question is empty; ask something")
  if sum(map(bool, (video, features, images))) != 1:
    raise UserError("give one of --video, --features and --images")
  if video and video.endswith(".npy"):
    raise UserError(f"--video={video} is no video; features are --features")
  if features and not features.endswith(".npy"):
    raise UserError(
      f"--features={features} is no .npy file; a video is --video"
    )
  if not all(images):
    raise UserError(
      f"--images={','.join(images)} has an image without a name; write"
      " --images=a.jpg,b.jpg"
    )
  if duration is not None and not features:
    raise UserError("--duration is of --features; a video knows its own")
  if sampling.top_p != 1 and not sampling.temperature:
    raise UserError(
      f"--top_p={sampling.top_p} is of draws, and --temperature=0 draws"
      " nothing; give a --temperature or leave --top_p out"
    )
  if picture and images:
    raise UserError(
      "--picture draws attention over the time of a video; leave it out with"
      " --images"
    )
  if picture:
    check_figure_path(picture)


@contextlib.contextmanager
def clean_exit() -> Iterator[None]:
  """Ends a command without a traceback where the user ends it.

  The exit status is 130 on interrupt, and 141 when nobody reads the answers
  any more. A character that the terminal cannot show is printed as "?". Typed
  bytes that are not UTF-8 are passed on; the check of the question names them.
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
    # Python flushes stdout once more at its end, and would print the error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


@contextlib.contextmanager
def progress_bar(desc: str, unit: str) -> Iterator[Progress]:
  """Gives a function that reports progress; its first call shows a bar.

  Args:
    desc: text before the bar.
    unit: name of what is counted.
  """
  with contextlib.ExitStack() as stack:
    bar = None

    def report(done: int, total: int) -> None:
      """Shows how many of all are done."""
      nonlocal bar
      if bar is None:
        bar = stack.enter_context(progress.bar(total, unit=unit, desc=desc))
      bar.update(done - bar.n)

    yield report


@dataclasses.dataclass(frozen=True)
class TerminalChat:
  """Prints a chat session on a terminal.

  Attributes:
    session: the conversation.
    max_tokens: longest answer, in tokens.
    sampling: how tokens are chosen.
    picture: file for the attention figure, "" for none. A later turn's figure
      replaces it.
    video: video file whose frames are drawn in the figure; "" for none.
  """

  session: ChatSession
  max_tokens: int = 256
  sampling: Sampling = GREEDY
  picture: str = ""
  video: str = ""

  def ask(self, question: str) -> Answer:
    """Asks a question, and prints the answer while it is decoded."""
    printed = ""
    before_text = contextlib.ExitStack()

    def stream(text: str) -> None:
      """Prints what is new in the text."""
      nonlocal printed
      before_text.close()
      # A character whose bytes are not complete yet.
      text = text.rstrip("\ufffd")
      print(text[len(printed) :], end="", flush=True)
      printed = text

    with before_text:
      before_text.enter_context(
        progress.step("reading the memory; what is new is compiled first")
      )
      answer = self.session.ask(
        question,
        max_tokens=self.max_tokens,
        sampling=self.sampling,
        stream=stream,
      )
    end = "" if answer.finished else f" [cut at {self.max_tokens} tokens]"
    if not answer.text:
      end = f"[no words]{end}"
    print(answer.text[len(printed) :] + end)
    if answer.attention:
      print(f"\n{answer.attention.text()}")
      if self.picture:
        save_attention_figure(
          answer.attention,
          self.picture,
          question=question,
          answer=answer.text,
          video=self.video or None,
        )
        print(f"wrote {self.picture}")
    return answer

  def ask_lines(self, source: TextIO) -> int:
    """Asks each line that is typed, or that a file or pipe holds.

    Args:
      source: the terminal, file or pipe.

    Returns:
      Number of lines that could not be asked.
    """
    is_typed, failed = source.isatty(), 0
    while True:
      if is_typed:
        print("\n> ", end="", flush=True)
      line = source.readline()
      if not line:
        if is_typed:
          print()  # so that the shell's next prompt has a line of its own
        return failed
      question = line.strip()
      if not question:
        continue
      if not is_typed:
        print(f"\n> {question}")
      try:
        self.ask(question)
      except UserError as error:
        failed += 1
        print(f"error: {error}", file=sys.stderr)
