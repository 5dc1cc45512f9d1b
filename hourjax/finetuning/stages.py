"""The stages of a fine-tuning: which are finished, and what they took.

OUT/stages.json holds for which questions, model and settings they were, and
of each stage the forecast, the seconds that it took in all its starts, and
whether it has ended. The same command again does what is left.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any

from hourjax import progress, schema
from hourjax.atomic_file import write_file
from hourjax.errors import UserError
from hourjax.finetuning.forecast import Stage

_NAME = "stages.json"


class Took(schema.Schema):
  """Holds one stage.

  Attributes:
    forecast: seconds that were expected; None if that was not known.
    seconds: that it took so far.
    done: whether it has ended.
  """

  forecast: float | None = None
  seconds: float = 0.0
  done: bool = False


class _Saved(schema.Schema):
  """Describes stages.json."""

  about: dict[str, str]
  stages: dict[str, Took]


class Stages:
  """Runs stages, each once, and keeps their times.

  Attributes:
    took: what is known of each stage, by its name, in order.
  """

  def __init__(self, out: pathlib.Path, about: dict[str, str]):
    """Reads what an earlier start left.

    Args:
      out: folder of the fine-tuning.
      about: what the stages depend on.

    Raises:
      UserError: the folder holds a fine-tuning of something else.
    """
    self._path, self._about = out / _NAME, about
    self.took: dict[str, Took] = {}
    if not self._path.exists():
      return
    remedy = "delete it, or choose another --out"
    saved = schema.read_schema(_Saved, self._path, remedy=remedy)
    differ = [k for k, v in about.items() if saved.about.get(k) != v]
    if differ:
      raise UserError(
        f"{out} holds a fine-tuning with other {' and '.join(differ)};"
        f" choose another --out, or delete {out} to start anew"
      )
    self.took = saved.stages

  def is_done(self, name: str) -> bool:
    """Returns whether a stage has ended in an earlier start."""
    return name in self.took and self.took[name].done

  def expect(self, stage: Stage) -> None:
    """Notes the forecast of a stage, until it begins."""
    if not self.took.get(stage.name, Took()).seconds:
      self._set(stage.name, forecast=stage.seconds)

  def run(self, name: str, work: Callable[[], Any]) -> None:
    """Runs a stage, unless it has ended before.

    Args:
      name: of the stage.
      work: does it; returns False if it has not ended. Whatever it raises ends
        the command, and the time counts.
    """
    took = self.took.get(name, Took())
    if took.done:
      print(f"== {name}: done before, in {progress.duration(took.seconds)}")
      return
    expected = (
      f" (about {progress.duration(took.forecast)})" if took.forecast else ""
    )
    print(f"== {name}{expected}", flush=True)
    began, done = time.monotonic(), False
    try:
      done = work() is not False
    finally:
      self._set(
        name, done=done, seconds=took.seconds + time.monotonic() - began
      )

  def _set(self, name: str, **changes: Any) -> None:
    """Changes what is known of a stage, and writes stages.json."""
    took = self.took.get(name, Took())
    self.took[name] = took.model_copy(update=changes)
    saved = _Saved(about=self._about, stages=self.took)
    write_file(self._path, saved.model_dump_json(indent=2) + "\n")
