"""Progress of a command: bars, and a line where one thing takes long.

Both can also be read in a log file.
"""

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

_LONG = 3.0  # seconds until the first line
_BARS: weakref.WeakSet[tqdm] = weakref.WeakSet()


def bar(total: int, *, unit: str, desc: str) -> tqdm:
  """Returns a tqdm bar; into a file or pipe it writes a line every 10 seconds.

  Args:
    total: number of units of work.
    unit: its name.
    desc: what is shown before the bar.
  """
  if sys.stderr.isatty():
    made = tqdm(total=total, unit=unit, desc=desc, mininterval=0.3)
  else:
    made = _Lines(
      total=total, unit=unit, desc=desc, mininterval=10, ncols=110, ascii=True
    )
  _BARS.add(made)
  return made


class _Lines(tqdm):
  """Writes lines instead of returning to the start of one."""

  @staticmethod
  def status_printer(file: Any) -> Callable[[str], None]:  # pyrefly: ignore[bad-override]  tqdm's has no types
    """Returns what writes the bar; tqdm calls it."""

    def write(text: str) -> None:
      if text.strip():
        print(text, file=file, flush=True)

    return write


def _moves(each: tqdm) -> bool:
  """Returns whether a bar is on the screen, and not at its end."""
  return not each.disable and each.n > 0 and each.n != each.total


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
  """Prints what is being done, and for how long, if the block takes long.

  For instance "compiling the train step (12 s so far)", on stderr, after three
  seconds and each time that the time has doubled. Nothing is printed for quick
  work, or while a bar moves.

  Args:
    text: what is being done.
  """
  done, began = threading.Event(), time.monotonic()

  def print_time() -> None:
    wait = _LONG
    while not done.wait(began + wait - time.monotonic()):
      took = time.monotonic() - began
      if not any(_moves(each) for each in list(_BARS)):
        print(f"{text} ({took:.0f} s so far)", file=sys.stderr, flush=True)
      wait *= 2

  thread = threading.Thread(target=print_time, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
