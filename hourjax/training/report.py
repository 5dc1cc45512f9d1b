"""From steps to what `Watch` writes down of them."""

from collections.abc import Mapping
from typing import Any

from hourjax.training.experiment import Experiment
from hourjax.training.feed import Feed
from hourjax.training.optimizer import COMPONENTS, schedule
from hourjax.training.watch import Watch
from hourjax.training.work import RowWork


class Report:
  """Adds up steps between two that are logged."""

  def __init__(
    self,
    watch: Watch,
    experiment: Experiment,
    work: RowWork,
    feed: Feed,
    steps: int,
  ):
    self._watch, self._work, self._feed = watch, work, feed
    self._rows = experiment.step_rows
    optimizer = experiment.optimizer
    self._rates = {
      name: schedule(optimizer.rate(name), steps, optimizer.warmup)
      for name in COMPONENTS
      if optimizer.rate(name) > 0
    }
    self._waited = feed.waited
    self._clear()

  def add(self, position: int, scalars: Mapping[str, Any]) -> None:
    """Counts a step whose first row is at `position`."""
    work = self._work.of(position, self._rows)
    self._tokens += int(scalars["tokens"])
    self._seconds += work.video_seconds
    self._flops += work.flops

  def write(
    self, step: int, scalars: Mapping[str, Any], counts: Mapping[str, int]
  ) -> None:
    """Writes a step down, with what was added up since the last one."""
    # A skipped step leaves the optimizer's own count of steps as it was.
    done = step - 1 - counts["skipped_steps"]
    waited, self._waited = self._feed.waited - self._waited, self._feed.waited
    self._watch.wrote(
      step,
      {key: value for key, value in scalars.items() if key != "finite"},
      tokens=self._tokens,
      video_seconds=self._seconds,
      model_flops=self._flops,
      data_wait=waited,
      learning_rates={
        name: float(rate(max(done, 0))) for name, rate in self._rates.items()
      },
      counts=counts,
    )
    self._clear()

  def _clear(self):
    self._tokens, self._seconds, self._flops = 0, 0.0, 0.0
