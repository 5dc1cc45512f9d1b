"""Where in a video the model looked, as shares of attention over time."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_BARS = " ▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class Looked:
  """Attention that MemAug pays to a video's moments for one question.

  Attributes:
    edges: seconds at which moments begin and the last one ends, ascending.
    share: of each moment; they sum to 1.
  """

  edges: Float[np.ndarray, "edges"]
  share: Float[np.ndarray, "n"]

  @property
  def duration(self) -> float:
    """Seconds."""
    return float(self.edges[-1])

  def binned(
    self, edges: Sequence[float] | np.ndarray
  ) -> Float[np.ndarray, "m"]:
    """Shares of other spans of time; a moment is divided as time is."""
    total = np.append(0.0, np.cumsum(self.share))
    return np.diff(np.interp(edges, self.edges, total))

  def minutes(self) -> tuple[np.ndarray, np.ndarray]:
    """(edges in seconds, shares) of minutes; of tenths below five minutes.

    Nothing is finer than a second.
    """
    if self.duration < 300:
      edges = np.linspace(
        0, self.duration, max(1, min(10, int(self.duration))) + 1
      )
    else:
      edges = np.append(np.arange(0, self.duration, 60.0), self.duration)
    return edges, self.binned(edges)

  def peaks(self, count: int = 3) -> list[tuple[float, float, float]]:
    """(start, end, share) of the minutes that got most, most first.

    Seconds; of videos below five minutes, tenths instead of minutes.
    """
    edges, share = self.minutes()
    order = np.argsort(-share, kind="stable")[:count]
    return [
      (float(edges[i]), float(edges[i + 1]), float(share[i])) for i in order
    ]

  def text(self, width: int = 60) -> str:
    """A bar over time for a terminal, and the minutes that got most."""
    share = self.binned(np.linspace(0, self.duration, width + 1))
    level = np.ceil(share / max(share.max(), 1e-12) * (len(_BARS) - 1))
    bar = "".join(_BARS[int(n)] for n in level)
    ends = clock(0) + clock(self.duration).rjust(width - len(clock(0)))
    most = ", ".join(
      f"{clock(start)}-{clock(end)} {share:.0%}"
      for start, end, share in self.peaks()
    )
    return f"{bar}\n{ends}\nlooked most at {most}"


def looked_at(
  shares: Float[np.ndarray, "blocks S"],
  frame: np.ndarray,
  duration: float,
) -> Looked:
  """From attention by memory token.

  Args:
    shares: weights by block and place, in any unit.
    frame: number of the frame at each place; -1 is padding.
    duration: of the video in seconds. Frames lie evenly over it: by every
      frame rule the n-th of N is shown in the n-th of N equal parts.
  """
  there = frame >= 0
  weight = shares[:, there] / shares[:, there].sum(1, keepdims=True)
  share = np.bincount(frame[there], weights=weight.mean(0))
  edges = np.linspace(0, duration, len(share) + 1)
  return Looked(edges, share / share.sum())


def clock(seconds: float) -> str:
  """1:02:03, or 02:03 below an hour."""
  whole = round(seconds)
  hours, minutes = whole // 3600, whole // 60 % 60
  tail = f"{minutes:02d}:{whole % 60:02d}"
  return f"{hours}:{tail}" if hours else tail
