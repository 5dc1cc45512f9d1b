"""What the rows of a step ask of the model: seconds of video, operations."""

from typing import NamedTuple

import numpy as np

from hourjax.data.dataset import Dataset
from hourjax.data.plan import RowPlan
from hourjax.data.sizes import FIELDS
from hourjax.models.flops import count_flops, sample_work
from hourjax.training.experiment import Experiment
from hourjax.training.optimizer import COMPONENTS


class Work(NamedTuple):
  """Of some rows.

  Attributes:
    video_seconds: of the videos in them; one that several conversations of a
      row share counts once.
    flops: useful ones (`models.flops`), of the numerator of MFU.
  """

  video_seconds: float
  flops: float


class RowWork:
  """The work of rows, from the plan alone: the same on every host.

  Samples that could not be read are counted; they are few, or the run stops.
  """

  def __init__(self, experiment: Experiment, dataset: Dataset, plan: RowPlan):
    self._config, self._plan, self._dataset = experiment.model, plan, dataset
    self._frame_tokens = experiment.model.pool_side**2 + 1
    self._trained = {
      name for name in COMPONENTS if experiment.optimizer.rate(name) > 0
    }

  def of(self, position: int, rows: int) -> Work:
    """Of `rows` rows from `position` on."""
    groups = [
      group
      for k in range(rows)
      for group in self._plan.row(self._plan.advance(position, k))[1]
    ]
    if not groups:
      return Work(0.0, 0.0)
    samples = np.concatenate([np.asarray(group, int) for group in groups])
    # The first of a group brings the memory that the others read, too.
    starts = np.cumsum([0, *map(len, groups[:-1])])
    first = np.zeros(len(samples), bool)
    first[starts] = True
    work = sample_work(self._config, self._dataset.sizes[samples])
    work = work._replace(
      **{
        name: getattr(work, name) * first
        for name in ("images", "stored", "encoded", "memory", "untrained")
      }
    )
    parts = count_flops(self._config, work, self._trained)
    flops = sum(part.total.sum() for part in parts.values())
    return Work(float(self._seconds(samples[first]).sum()), float(flops))

  def _seconds(self, samples):
    """Where a duration is not known a frame is taken for a second."""
    columns = self._dataset.columns
    video = columns.video[samples]
    memory = self._dataset.sizes[samples][:, FIELDS.index("memory")]
    if not len(columns.videos):
      return np.zeros(len(samples))
    known = columns.duration[np.maximum(video, 0)]
    seconds = np.where(np.isnan(known), memory / self._frame_tokens, known)
    return np.where(video >= 0, seconds, 0.0)


def row_records(
  dataset: Dataset, plan: RowPlan, position: int, rows: int
) -> dict[int, list[str]]:
  """Ids of the records in each of `rows` rows, by their position."""
  found = {}
  for k in range(rows):
    at = plan.advance(position, k)
    groups = plan.row(at)[1]
    found[at] = [dataset.record(i).id for group in groups for i in group]
  return found
