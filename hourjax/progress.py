"""Progress bars that are also readable in a log file."""

import sys

from tqdm import tqdm


def bar(total: int, *, unit: str, desc: str) -> tqdm:
  """A tqdm bar; into a file or pipe it writes a line every ten seconds."""
  if sys.stderr.isatty():
    return tqdm(total=total, unit=unit, desc=desc, mininterval=0.3)
  return _Lines(
    total=total, unit=unit, desc=desc, mininterval=10, ncols=110, ascii=True
  )


class _Lines(tqdm):
  """Lines instead of carriage returns."""

  @staticmethod
  def status_printer(file):
    def write(text: str) -> None:
      if text.strip():
        print(text, file=file, flush=True)

    return write
