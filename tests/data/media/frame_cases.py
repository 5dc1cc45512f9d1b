"""Videos of many lengths and rates, with the frames used of each."""

import dataclasses
from fractions import Fraction

import numpy as np

UNIFORM = 0  # no step: frames spread over the whole video


@dataclasses.dataclass(frozen=True)
class Case:
  """Describes one video.

  Attributes:
    frames: number of frames of its file.
    rate: frames a second, as a fraction.
    seconds: its duration in the time instruction.
    from_file: frames used of the file, in training and answering without
      stored features.
    step: between those frames, or UNIFORM.
    stored: frames whose features extraction stores.
    from_features: how many of those are used, in training and answering with
      stored features.
    sparse: whether its features may also have been stored at one frame a
      second.
  """

  frames: int
  rate: str
  seconds: str
  from_file: int
  step: int
  stored: int
  from_features: int
  sparse: bool = False

  @property
  def fps(self) -> Fraction:
    return Fraction(self.rate)

  @property
  def duration(self) -> float:
    """Returns the seconds that `video.probe` computes."""
    return float(self.frames / self.fps)

  @property
  def indices(self) -> list[int]:
    """Returns the frames that are used of the file."""
    if self.step == UNIFORM:
      return uniform(self.frames, self.from_file)
    return [n * self.step for n in range(self.from_file)]

  @property
  def name(self) -> str:
    return f"{self.frames} at {self.rate}"


def uniform(total: int, count: int) -> list[int]:
  """0 to total - 1 in whole numbers, cut (not rounded)."""
  if count == 1:
    return [0]
  return [
    int(np.float64(n) * ((total - 1) / (count - 1)))
    if n < count - 1
    else total - 1
    for n in range(count)
  ]


CASES = [
  # Fewer than 128 frames: all of them.
  Case(1, "30", "0.03", 1, UNIFORM, 1, 1, sparse=True),
  Case(15, "30", "0.50", 15, UNIFORM, 15, 15),
  Case(24, "24", "1.00", 24, UNIFORM, 24, 24),
  Case(100, "30", "3.33", 100, UNIFORM, 100, 100),
  Case(120, "24", "5.00", 120, UNIFORM, 120, 120),
  Case(60, "1", "60.00", 60, UNIFORM, 60, 60, sparse=True),
  Case(50, "1/2", "100.00", 50, UNIFORM, 50, 50, sparse=True),
  # Below 128 seconds: 128.
  Case(128, "30", "4.27", 128, UNIFORM, 128, 128),
  Case(300, "30", "10.00", 128, UNIFORM, 128, 128),
  Case(1797, "30", "59.90", 128, UNIFORM, 128, 128),
  Case(5000, "60000/1001", "83.42", 128, UNIFORM, 128, 128),
  Case(175, "7/5", "125.00", 128, UNIFORM, 128, 128),
  Case(3806, "30000/1001", "126.99", 128, UNIFORM, 128, 128),
  Case(3839, "30", "127.97", 128, UNIFORM, 128, 128),
  Case(15359, "120", "127.99", 128, UNIFORM, 128, 128),
  # Longer: every round(rate)-th as pixels, one a second as features.
  Case(3840, "30", "128.00", 128, 30, 128, 128),
  Case(3855, "30", "128.50", 129, 30, 128, 128),
  Case(210, "7/5", "150.00", 210, 1, 150, 150),
  Case(300, "2", "150.00", 150, 2, 150, 150),
  Case(375, "5/2", "150.00", 188, 2, 150, 150),
  # Frames over duration are not quite 7.5 and 12.5 in floats here. (Every 8th
  # are 123, so that there are 128 uniform ones.)
  Case(977, "15/2", "130.27", 128, UNIFORM, 130, 130),
  Case(1631, "25/2", "130.48", 136, 12, 130, 130),
  Case(1125, "15/2", "150.00", 141, 8, 150, 150),
  Case(1875, "25/2", "150.00", 157, 12, 150, 150),
  # Once a frame is late by 1/900000 s: a rate less than 7.5 by a hair.
  Case(1125, "1012500000/135000001", "150.00", 161, 7, 150, 150),
  Case(4500, "30", "150.00", 150, 30, 150, 150),
  Case(4500, "24000/1001", "187.69", 188, 24, 187, 187),
  Case(100, "1/2", "200.00", 100, UNIFORM, 100, 100),
  Case(18000, "30", "600.00", 600, 30, 600, 600),
  Case(17982, "30000/1001", "600.00", 600, 30, 599, 599),
  Case(300, "1/2", "600.00", 300, 1, 300, 300),
  Case(600, "1", "600.00", 600, 1, 600, 600),
]
