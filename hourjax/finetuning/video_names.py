"""The videos of a folder, found by the names that people write in tables."""

import pathlib
import re
from collections.abc import Iterable

from hourjax.evaluation.benchmarks.folder import Videos, youtube_key


class VideoNames:
  """Finds videos by name, path, stem, number or address.

  Attributes:
    names: paths of all videos below the folder, sorted.
  """

  def __init__(self, names: Iterable[str]):
    """Indexes the names.

    Args:
      names: paths relative to the folder, with "/", as `find_videos` gives.
    """
    self.names = sorted(names)
    self._known: dict[str, str | None] = {}
    self._exact = Videos(self.names)
    lower: dict[str, set[str]] = {}
    numbers: dict[int, set[str]] = {}
    for name in self.names:
      lower.setdefault(name.lower(), set()).add(name)
      stem = pathlib.PurePosixPath(name).stem
      if stem.isdecimal():
        numbers.setdefault(int(stem), set()).add(name)
    self._lower = {k: next(iter(v)) for k, v in lower.items() if len(v) == 1}
    self._any_case = Videos(self._lower)
    self._numbers = {
      k: next(iter(v)) for k, v in numbers.items() if len(v) == 1
    }

  def find(self, written: str) -> str | None:
    """Returns the video that a cell means; None if there is none.

    Of "C:/data/clips/A.MP4", or with backslashes, the ends "data/clips/A.MP4",
    "clips/A.MP4" and "A.MP4" are looked for, in this case and then in any. A
    number may lack its leading zeros, which spreadsheets drop.

    Args:
      written: the cell.

    Raises:
      UserError: videos in several folders have the name.
    """
    if written not in self._known:
      self._known[written] = self._find(written)
    return self._known[written]

  def _find(self, written: str) -> str | None:
    """As `find`, which asks once for the many questions about a video."""
    path = written.strip().strip("'\"").replace("\\", "/")
    key = youtube_key(path) if "://" in path else None
    path = re.sub(r"^[a-z]+://|[?#].*$" if "://" in path else r"^[A-Za-z]:", "",
                  path)  # fmt: skip
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    tails = ["/".join(parts[i:]) for i in range(len(parts))]
    tails += [key] if key else []
    if not tails:
      return None
    for tail in tails:
      name = self._exact.name(tail)
      if self._exact.has(name):
        return name
    for tail in tails:
      name = self._any_case.name(tail.lower())
      if self._any_case.has(name):
        return self._lower[name]
    last = re.sub(r"\.0+$", "", parts[-1]) if parts else ""
    return self._numbers.get(int(last)) if last.isdecimal() else None
