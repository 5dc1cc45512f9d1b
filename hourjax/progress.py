"""Progress bars that are also readable in a log file."""

import contextlib
import sys
import threading
from collections.abc import Iterator

from tqdm import tqdm

_PATIENCE = 3  # seconds


def bar(total: int, *, unit: str, desc: str) -> tqdm:
  """A tqdm bar; into a file or pipe it writes a line every ten seconds."""
  if sys.stderr.isatty():
    return tqdm(total=total, unit=unit, desc=desc, mininterval=0.3)
  return _Lines(
    total=total, unit=unit, desc=desc, mininterval=10, ncols=110, ascii=True
  )


@contextlib.contextmanager
def said_if_slow(what: str, after: float = _PATIENCE) -> Iterator[None]:
  """Prints what is being done on stderr, if it takes longer than `after`."""

  def say() -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
      print(f"{what} ...", file=sys.stderr, flush=True)

  timer = threading.Timer(after, say)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


class _Lines(tqdm):
  """Lines instead of carriage returns."""

  @staticmethod
  def status_printer(file):
    def write(text: str) -> None:
      if text.strip():
        print(text, file=file, flush=True)

    return write
