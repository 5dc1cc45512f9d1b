"""Small files of a workdir that must survive a kill at any moment."""

import os
import pathlib


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file so that it holds the old text or the new, never half."""
  partial = path.with_name(f".{path.name}.partial")
  try:
    partial.write_text(text)
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
