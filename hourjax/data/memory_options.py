"""What MemAug attends to in a memory, and at which positions.

Both are ablations of the paper (figure 4 and table 9). They change indices
alone: a memory token that queries do not attend to has segment 0 in its row,
as padding has, and the model does not know of it. Rows have the same sizes, and
therefore hold the same samples, for every choice.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Int32

from hourjax.data.forgetting import Forgetting
from hourjax.data.repository import Grid, Repository
from hourjax.errors import UserError

Positions = Literal["structured", "counted", "none"]


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
  """Describes how MemAug reads the memory; the defaults are those published.

  Attributes:
    scale: share of a video's frames that queries attend to, evenly spaced; 0
      leaves them only the tokens that forgetting keeps. Forgetting always
      chooses among all frames, and images are read whole.
    positions: of MemAug's rotary embedding. "structured" gives a kept token
      the position of its memory token; "counted" counts queries and memory
      tokens in their order, as the official attention does where it gets no
      positions; "none" rotates nothing.
  """

  scale: float = 1.0
  positions: Positions = "structured"

  def check_forgetting(self, rule: Forgetting) -> None:
    """Checks that the memory does not depend on the question.

    Raises:
      UserError: it consists of kept tokens, and these depend on it.
    """
    if not self.scale and rule.needs_question:
      raise UserError(
        "config.memory.scale is 0, which leaves the memory what forgetting"
        f" keeps, and config.forgetting.temporal={rule.temporal} keeps other"
        " tokens for each question; choose a scale above 0 or another strategy"
      )

  def limit_memory(
    self,
    repository: Repository,
    kept: Sequence[Int[np.ndarray, "n"]] | None,
  ) -> Repository:
    """Returns a memory with what queries attend to, and its positions.

    Four frames of 1 token and a newline, of which scale 0.5 leaves the frames
    0 and 3, or scale 0 the kept tokens [2 3]:

        token             0  1  2  3  4  5  6  7
        attended, 0.5     1  1  0  0  0  0  1  1
        attended, 0       0  0  1  1  0  0  0  0

    Args:
      repository: the whole memory.
      kept: memory indices that forgetting keeps, for each slot; None where
        they depend on the question, which scale 0 does not allow.
    """
    position = repository.position
    if self.positions == "counted":
      position = np.arange(len(position), dtype=np.int32)
    elif self.positions == "none":
      position = np.zeros_like(position)
    attended = None
    if self.scale < 1:
      attended = np.ones(len(repository.source), bool)
      for number, grids in enumerate(repository.slots):
        for grid in grids:
          if grid.temporal:
            self._limit_video(attended, grid, kept, number)
    return dataclasses.replace(repository, position=position, attended=attended)

  def place_queries(
    self, position: Int32[np.ndarray, "T"]
  ) -> Int32[np.ndarray, "T"]:
    """Returns the positions of queries, of which the structured are given."""
    if self.positions == "counted":
      return np.arange(len(position), dtype=np.int32)
    if self.positions == "none":
      return np.zeros_like(position)
    return position

  def _limit_video(
    self,
    attended: Bool[np.ndarray, "S"],
    grid: Grid,
    kept: Sequence[Int[np.ndarray, "n"]] | None,
    slot: int,
  ) -> None:
    """Sets which memory tokens of a video queries attend to."""
    frames = len(grid.index)
    tokens = np.concatenate(
      [grid.index.reshape(frames, -1), grid.newline], axis=1
    )
    attended[tokens] = False
    if self.scale:
      count = max(1, round(self.scale * frames))
      chosen = np.linspace(0, frames - 1, count).astype(int)
      attended[tokens[chosen]] = True
      return
    assert kept is not None  # by `check_forgetting`
    attended[kept[slot]] = True


WHOLE_MEMORY = MemoryOptions()
