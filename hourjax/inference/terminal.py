"""Mistakes in what is asked that show before a model is loaded."""
# MERGED hourjax.inference.terminal:
# A conversation on a terminal, with where the model looked.

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from hourjax import progress
from hourjax.errors import UserError
from hourjax.inference.attention_map import check_picture, save_attention_figure
from hourjax.inference.memory import Answer, Conversation
from hourjax.inference.sampling import GREEDY, Sampling
from hourjax.inference.video_features import Progress


def image_paths(values: Sequence[str]) -> list[str]:
  """The files that --images names: one, or several with commas between.

  A comma may be part of a name: it is where a file of the longer name exists.

    a.jpg,b.jpg      a.jpg and b.jpg
    a,b.jpg,c.jpg    a,b.jpg and c.jpg, if there is a file "a,b.jpg"

  Args:
    values: as given, one for each time that the option is.
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
  """Checks the options of `python -m hourjax.ask`.

  Args:
    questions: what stands behind the options: one, or none.
    video, features, images: to ask about; one of them is given.
    duration: of the features.
    sampling: how tokens are chosen.
    picture: file to be written, "" for none.

  Raises:
    UserError: naming the option and what it should be.
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
      "--picture shows where in a video the model looked; leave it out with"
      " --images"
    )
  if picture:
    check_picture(picture)


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
class TerminalChat:
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
    save_attention_figure(
      answer.looked,
      self.picture,
      question=question,
      answer=answer.text,
      film=self.film or None,
    )
    print(f"wrote {self.picture}")
