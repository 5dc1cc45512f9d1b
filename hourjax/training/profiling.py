"""Traces of chosen steps, for TensorBoard's profile page and XProf."""

import os
import pathlib
import re
import sys
import time

import jax

from hourjax.errors import UserError


def parse_steps(text: str) -> range:
  """Returns the steps of "a:b", which are a to b-1; none for an empty text.

  Raises:
    UserError: the text has another form, or means no step.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r"(\d+):(\d+)", text)
  steps = range(*map(int, match.groups())) if match else range(0)
  if not steps or not steps[0]:
    raise UserError(
      f"config.metrics.profile_steps is {text!r}; write a:b to trace the steps"
      " a to b-1, with 1 <= a < b, as 10:15"
    )
  return steps


class Profiler:
  """Traces steps into WORKDIR/profile, with `jax.profiler`."""

  def __init__(self, workdir: str | os.PathLike, steps: range):
    """Starts nothing yet.

    Args:
      workdir: of the run.
      steps: to trace.
    """
    self._folder = pathlib.Path(workdir) / "profile"
    self._steps = steps
    self._tracing = False
    self._step: jax.profiler.StepTraceAnnotation | None = None

  def begin_step(self, step: int) -> float:
    """Starts or ends the trace where one of its ends is, before a step.

    Both wait until the devices are done, so the trace has whole steps.

    Args:
      step: that begins now.

    Returns:
      The seconds that this took.
    """
    self._end_step()
    took = 0.0
    if self._tracing != (step in self._steps):
      began = time.monotonic()
      (self._stop if self._tracing else self._start)()
      took = time.monotonic() - began
    if self._tracing:
      # XProf finds the steps of a trace by this annotation.
      self._step = jax.profiler.StepTraceAnnotation("train", step_num=step)
      self._step.__enter__()
    return took

  def close(self) -> None:
    """Ends a trace that is under way, and writes its file."""
    self._end_step()
    if self._tracing:
      self._stop()

  def _end_step(self) -> None:
    """Ends the annotation of the step before."""
    if self._step is not None:
      self._step.__exit__(None, None, None)
      self._step = None

  def _start(self) -> None:
    """Starts the trace."""
    jax.block_until_ready(jax.live_arrays())
    try:
      jax.profiler.start_trace(self._folder)
    except RuntimeError as error:  # another trace is under way
      print(f"no trace of these steps: {error}", file=sys.stderr)
      self._steps = range(0)
    else:
      self._tracing = True

  def _stop(self) -> None:
    """Writes the trace."""
    jax.block_until_ready(jax.live_arrays())
    self._tracing = False
    try:
      jax.profiler.stop_trace()
    except (RuntimeError, OSError) as error:
      print(f"the trace was not written: {error}", file=sys.stderr)
    else:
      print(f"wrote a trace into {self._folder}", file=sys.stderr)
