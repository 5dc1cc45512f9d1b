"""The paper's tables of ablations, as data: a row is a line.

From *Unleashing Hour-Scale Video Training for Long Video-Language
Understanding* (arXiv 2506.05332), sections 5.4 and A.4. Its ablations are those
of the 3B model, trained on 70,000 conversations about videos and 60,000 about
images or text, from the weights after image-language pretraining. Accuracies
are in percent.
"""

import dataclasses
from collections.abc import Mapping

from hourjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Times:
  """Stands for the configuration's own value of a key, times a factor."""

  factor: float


Value = str | int | float | Times


@dataclasses.dataclass(frozen=True)
class Row:
  """Describes one line of a table.

  Attributes:
    label: what is varied.
    overrides: keys of the configuration and their values.
    paper: the paper's accuracies, one for each of the table's `columns`; empty
      where it gives none.
    direction: -1 where the paper says that the row is worse than the default
      one and gives no figure.
  """

  label: str
  overrides: Mapping[str, Value]
  paper: tuple[float, ...] = ()
  direction: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
  """Describes a table or figure.

  Attributes:
    title: what it compares.
    rows: its lines.
    default: label of the row that the others are compared with.
    columns: the benchmarks of the paper's figures.
    task: the task, or group of tasks, whose questions it is about; empty for
      all questions.
    note: what a reader of the results should know.
  """

  title: str
  rows: tuple[Row, ...]
  default: str
  columns: tuple[str, ...] = ()
  task: str = ""
  note: str = ""

  def __post_init__(self) -> None:
    assert self.default in [row.label for row in self.rows]
    assert all(len(r.paper) in (0, len(self.columns)) for r in self.rows)


def _one_frame_of(ratio: int) -> dict[str, Value]:
  """Returns overrides that keep one frame of so many.

  The most frames that are kept change with it, since otherwise long videos
  would keep the same number at every ratio.
  """
  return {
    "forgetting.temporal_ratio": ratio,
    "forgetting.max_frames": Times(4 / ratio),
  }


_BLOCKS = "model.memaug_layers"
_SPATIAL, _RATIO = "forgetting.spatial", "forgetting.ratio"
_TEMPORAL, _FRAMES = "forgetting.temporal", "forgetting.temporal_ratio"
_SCALE, _POSITIONS = "memory.scale", "memory.positions"
_LONG = ("LongVideoBench", "LVBench")

TABLES: dict[str, Table] = {
  "3": Table(
    "Table 3: spatial forgetting",
    (
      Row("all tokens, without MemAug", {_RATIO: 1, _FRAMES: 4, _BLOCKS: 0},
          (52.8, 84.7, 58.8)),
      Row("random", {_SPATIAL: "random"}, (51.9, 84.5, 59.6)),
      Row("uniform", {_SPATIAL: "uniform"}, (51.5, 83.7, 59.5)),
    ),
    default="random",
    columns=("MMStar", "ScienceQA", "RealWorldQA"),
    note="The paper compares them on single images, after stage 1.",
  ),
  "4": Table(
    "Table 4: temporal forgetting",
    (
      Row("uniform", {_TEMPORAL: "uniform"}, (54.0, 40.6)),
      Row("keyframe", {_TEMPORAL: "keyframe"}, (53.5, 40.3)),
      Row("question-guided", {_TEMPORAL: "question"}, (53.4, 39.7)),
      Row("random", {_TEMPORAL: "random"}, (53.2, 38.8)),
    ),
    default="uniform",
    columns=_LONG,
  ),
  "5": Table(
    "Table 5: with and without MemAug",
    (
      Row("uniform", {_TEMPORAL: "uniform"}, (54.0, 40.6)),
      Row("uniform, without MemAug", {_TEMPORAL: "uniform", _BLOCKS: 0},
          (52.1, 38.3)),
      Row("keyframe", {_TEMPORAL: "keyframe"}, (53.5, 40.3)),
      Row("keyframe, without MemAug", {_TEMPORAL: "keyframe", _BLOCKS: 0},
          (52.0, 38.9)),
      Row("question-guided", {_TEMPORAL: "question"}, (53.4, 39.7)),
      Row("question-guided, without MemAug",
          {_TEMPORAL: "question", _BLOCKS: 0}, (51.0, 37.5)),
    ),
    default="uniform",
    columns=_LONG,
  ),
  "6": Table(
    "Table 6: blocks of MemAug",
    (
      Row("1 block", {_BLOCKS: 1}, (59.4, 53.2, 40.0)),
      Row("2 blocks", {_BLOCKS: 2}, (59.8, 53.5, 40.3)),
      Row("4 blocks", {_BLOCKS: 4}, (59.7, 54.0, 40.6)),
      Row("8 blocks", {_BLOCKS: 8}, (59.2, 53.4, 40.5)),
    ),
    default="4 blocks",
    columns=("TempCompass", *_LONG),
  ),
  "9": Table(
    "Table 9: positions in MemAug",
    (
      Row("structured", {_POSITIONS: "structured"}, (46.3,)),
      Row("counted in order", {_POSITIONS: "counted"}, (35.6,)),
      Row("no rotation", {_POSITIONS: "none"}, (35.6,)),
    ),
    default="structured",
    columns=("Video-MME, temporal reasoning",),
    task="temporal reasoning",
    note="The paper has one row without structured positions and does not say"
    " whether tokens were then counted or not rotated at all: both are tried."
    " Its 7B model falls from 56.5 to 38.4.",
  ),
  "figure4": Table(
    "Figure 4: frames that are kept, and scale of the memory",
    (
      Row("keep 1 of 4 frames, all of the memory", _one_frame_of(4)),
      Row("keep all frames", _one_frame_of(1)),
      Row("keep 1 of 2", _one_frame_of(2)),
      Row("keep 1 of 8", _one_frame_of(8)),
      Row("keep 1 of 16", _one_frame_of(16)),
      Row("50 % of the memory", {**_one_frame_of(4), _SCALE: 0.5},
          direction=-1),
      Row("25 % of the memory", {**_one_frame_of(4), _SCALE: 0.25},
          direction=-1),
      Row("kept tokens only", {**_one_frame_of(4), _SCALE: 0.0},
          direction=-1),
    ),
    default="keep 1 of 4 frames, all of the memory",
    columns=("LVBench",),
    note="The paper draws these figures without stating them, and says that"
    " accuracy falls with the scale of the memory. The most frames that are"
    " kept change with the ratio.",
  ),
}  # fmt: skip


def find_table(name: str) -> Table:
  """Returns a table by its name.

  Raises:
    UserError: there is no such table; lists those that there are.
  """
  if name not in TABLES:
    raise UserError(
      f"--table={name} is none of the paper's ablations; choose one of"
      f" {', '.join(TABLES)}"
    )
  return TABLES[name]
