"""Held-out data: which conversations are set aside, and never trained on.

Whole videos are set aside, with every conversation about them. Which ones
follows from their names alone: a name's number is its SHA-256 as a fraction of
2^256, and it is held out if that lies below the share. So a video stays held
out whatever data is added, in every stage and stream that names it the same.

`--holdout=names.txt` names a file instead, which lists videos and images, one a
line: these are held out, and nothing else.

A conversation about images is held out if the number of any of its images is
below the share, so that no such image is trained on elsewhere. One without any
video or image has the number of its id.
"""

import dataclasses
import fractions
import hashlib
import re

import numpy as np
from jaxtyping import Bool, Float64

from hourjax.data.columns import Columns
from hourjax.data.records.record import Record
from hourjax.errors import UserError

_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*(%?)")


@dataclasses.dataclass(frozen=True)
class Holdout:
  """Says how much is held out (`--holdout`).

  Attributes:
    amount: share in percent, or a number of videos.
    percent: whether `amount` is in percent.
    names: of what is held out, in place of a share.
  """

  amount: fractions.Fraction
  percent: bool
  names: frozenset[str] = frozenset()

  def __str__(self) -> str:
    if self.names:
      text = "\n".join(sorted(self.names)).encode("utf-8", "surrogatepass")
      return f"{len(self.names)} names {hashlib.sha256(text).hexdigest()[:16]}"
    number = f"{float(self.amount):g}"
    return f"{number}%" if self.percent else number

  def number(self, record: Record) -> float:
    """Returns `record_number`; where names are given, 0 or 1 by them."""
    if not self.names:
      return record_number(record)
    return float(self.names.isdisjoint(record.media or (record.id,)))

  def select(
    self, numbers: Float64[np.ndarray, "N"], columns: Columns
  ) -> Bool[np.ndarray, "N"]:
    """Returns which conversations are held out.

    A count of n videos holds out those with the n smallest numbers. The
    number of the next video is then the share for all other conversations.

    Args:
      numbers: of `record_number`.
      columns: of the same conversations.

    Raises:
      UserError: all videos or all conversations would be held out, or videos
        are counted and there are none.
    """
    videos = np.ones(len(columns.videos))
    about = columns.video >= 0
    videos[columns.video[about]] = numbers[about]
    if self.percent:
      share = float(self.amount / 100)
    elif int(self.amount) < len(videos):
      share = np.sort(videos)[int(self.amount)]
    else:
      raise self._refusal(len(videos), len(numbers))
    found = numbers < share
    if found.all() or (len(videos) and (videos < share).all()):
      raise self._refusal(len(videos), len(numbers))
    return found

  def _refusal(self, videos: int, conversations: int) -> UserError:
    """Returns the error of a holdout that leaves nothing to train on."""
    if not videos and not self.percent:
      return UserError(
        f"--holdout={self} is a number of videos, and none of"
        f" {conversations} conversations is about one; give a share, such as"
        " --holdout=0.5%"
      )
    what = f"{videos} videos" if videos else f"{conversations} conversations"
    return UserError(
      f"--holdout={self} sets aside all {what}, which leaves none to train on;"
      " give less, such as --holdout=0.5%"
    )


def parse_holdout(text: str) -> Holdout | None:
  """Parses "0.5%", a number of videos or a file of names; "" is None.

  Raises:
    UserError: it is none of them, nothing, or everything.
  """
  if not text:
    return None
  if text.endswith(".txt"):
    return _listed(text)
  match = _TEXT.fullmatch(text.strip())
  amount = fractions.Fraction(match[1]) if match else fractions.Fraction(0)
  percent = bool(match and match[2])
  if percent and amount >= 100:
    raise UserError(
      f"--holdout={text} sets everything aside, which leaves nothing to train"
      " on; give less, such as --holdout=0.5%"
    )
  if amount <= 0 or not (percent or amount.denominator == 1):
    raise UserError(
      f"--holdout={text}; write a share above 0 and below 100 %, such as 0.5%,"
      " or a number of videos, such as 100, or a file of names, names.txt"
    )
  return Holdout(amount, percent)


def _listed(path: str) -> Holdout:
  """Reads the names in a file, one a line."""
  try:
    with open(path, encoding="utf-8") as file:
      names = frozenset(filter(None, (line.strip() for line in file)))
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"--holdout={path} cannot be read ({error}); give a share, such as 0.5%,"
      " or a file with one name a line"
    ) from None
  if not names:
    raise UserError(f"--holdout={path} lists no name; leave it out")
  return Holdout(fractions.Fraction(50), True, names)


def record_number(record: Record) -> float:
  """Returns the number in [0, 1) by which a record may be held out.

  It is that of its video, the smallest of its images, or that of its id.
  """
  return min(map(name_number, record.media or (record.id,)))


def name_number(name: str) -> float:
  """Returns the SHA-256 of a name as a fraction in [0, 1)."""
  digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
  # As many bits as a float holds: with more, the largest would round to 1.
  return (int.from_bytes(digest[:8]) >> 11) / 2**53
