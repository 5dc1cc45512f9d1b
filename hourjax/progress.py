"""What a command says while it works: bars, and lines where it takes long.

Both are also readable in a log file.
"""

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Iterator

from tqdm import tqdm

_LONG = 3.0  # seconds of silence before the first line
_BARS: weakref.WeakSet[tqdm] = weakref.WeakSet()


def bar(total: int, *, unit: str, desc: str) -> tqdm:
  """A tqdm bar; into a file or pipe it writes a line every ten seconds."""
  if sys.stderr.isatty():
    made = tqdm(total=total, unit=unit, desc=desc, mininterval=0.3)
  else:
    made = _Lines(
      total=total, unit=unit, desc=desc, mininterval=10, ncols=110, ascii=True
    )
  _BARS.add(made)
  return made


class _Lines(tqdm):
  """Lines instead of carriage returns."""

  @staticmethod
  def status_printer(file):
    def write(text: str) -> None:
      if text.strip():
        print(text, file=file, flush=True)

    return write


def _moves(shown: tqdm) -> bool:
  """Whether a bar is on the screen, and not at its end."""
  return not shown.disable and shown.n > 0 and shown.n != shown.total


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
  """Says what is being done where it takes long, and for how long it has.

  "compiling the train step (12 s so far)": a line on stderr after three
  seconds, and again each time that the wait has doubled. Quick work stays
  without a word, and so does work whose bar moves.
  """
  done, began = threading.Event(), time.monotonic()

  def watch() -> None:
    wait = _LONG
    while not done.wait(began + wait - time.monotonic()):
      took = time.monotonic() - began
      if not any(_moves(each) for each in list(_BARS)):
        print(f"{text} ({took:.0f} s so far)", file=sys.stderr, flush=True)
      wait *= 2

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
