"""What a run shows: a bar on a terminal, lines elsewhere."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_BAR = 8  # columns of the bar that numbers leave free at least


class Screen:
  """Shows the logged steps on stderr."""

  def __init__(self, *, steps: int, start: int):
    """Draws the bar if stderr is a terminal.

    What others print while it stands goes above it, if it is printed from
    Python; lines that a library writes without it follow the bar.
    """
    self._steps, self._terminal = steps, sys.stderr
    self._bar, self._undo = None, contextlib.ExitStack()
    if sys.stderr.isatty():
      self._bar = tqdm(
        total=steps,
        initial=start,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.3,
        bar_format="{n_fmt}/{total_fmt} {bar} {desc}",
      )
      self._undo.enter_context(_prints_above(self._bar))

  def step(self, done: int) -> None:
    """Moves the bar to the number of steps taken."""
    if self._bar is not None:
      self._bar.update(done - self._bar.n)

  def show(self, step: int, row: Mapping[str, Any], left: float) -> None:
    """Shows what is in the row, if it is.

    Args:
      step: that was taken.
      row: as in metrics.jsonl.
      left: seconds to the end of the run.
    """
    count = f"{step}/{self._steps}"
    if self._bar is None:
      numbers = "  ".join(_numbers(row, left))
      print(f"step {count}  {numbers}", file=sys.stderr, flush=True)
      return
    room = _columns(self._terminal) - len(count) - _BAR
    shown = []
    for part in _numbers(row, left):
      room -= len(part) + 2
      if room >= 0:
        shown.append(part)
    self._bar.set_description_str("  ".join(shown), refresh=False)
    self.step(step)
    self._bar.refresh()

  def close(self) -> None:
    """Leaves the last state of the bar and a line end."""
    self._undo.close()
    if self._bar is not None:
      self._bar.close()


def duration(seconds: float) -> str:
  """3 h 25 min as 3:25:00, from a day on as "2 d 3:25"."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours >= 24:
    return f"{hours // 24} d {hours % 24}:{minutes:02}"
  return f"{hours}:{minutes:02}:{rest:02}"


def _numbers(row: Mapping[str, Any], left: float) -> list[str]:
  """The numbers as text, those that matter most first."""
  forms = {
    "loss": "loss {:.3f}",
    "grad_norm": "grad norm {:.2f}",
    "step_seconds": "{:.3g} s/step",
    "mfu": "MFU {:.1%}",
    "video_hours_per_second": "{:.3g} video h/s",
  }
  found = {k: form.format(row[k]) for k, form in forms.items() if k in row}
  found["left"] = f"{duration(left)} left"
  order = ("loss", "grad_norm", "step_seconds", "left", "mfu",
           "video_hours_per_second")  # fmt: skip
  return [found[key] for key in order if key in found]


def _columns(terminal) -> int:
  """Its width; 80 if it does not say."""
  try:
    return os.get_terminal_size(terminal.fileno()).columns or 80
  except (OSError, ValueError):
    return 80


@contextlib.contextmanager
def _prints_above(bar: tqdm):
  """Lets Python's prints and logs clear the bar, and draws it again below."""
  real = {name: getattr(sys, name) for name in ("stdout", "stderr")}
  above = {
    name: _Above(stream, bar)
    for name, stream in real.items()
    if stream.isatty()
  }
  handlers = [
    (handler, name)
    for handler in _stream_handlers()
    for name in above
    if handler.stream is real[name]
  ]
  for name, stream in above.items():
    setattr(sys, name, stream)
  for handler, name in handlers:
    handler.setStream(above[name])
  try:
    yield
  finally:
    for handler, name in handlers:
      handler.setStream(real[name])
    for name, stream in above.items():
      if getattr(sys, name) is stream:
        setattr(sys, name, real[name])
      stream.end()


def _stream_handlers() -> list[logging.StreamHandler]:
  """Handlers of the root logger; absl's keeps its own inside."""
  found = [getattr(h, "python_handler", h) for h in logging.root.handlers]
  return [h for h in found if isinstance(h, logging.StreamHandler)]


class _Above:
  """A stream whose whole lines appear above a bar."""

  def __init__(self, stream, bar: tqdm):
    self._stream, self._bar = stream, bar
    self._held, self._lock = "", threading.RLock()

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Holds the end of `text` back until its line is complete."""
    with self._lock:
      lines, newline, self._held = (self._held + text).rpartition("\n")
      if newline:
        self._print(lines + newline)
    return len(text)

  def writelines(self, lines) -> None:
    self.write("".join(lines))

  def end(self) -> None:
    """Prints what was held back."""
    with self._lock:
      if self._held:
        self._print(self._held + "\n")
      self._held = ""

  def _print(self, text: str) -> None:
    with tqdm.get_lock():
      self._bar.clear(nolock=True)
      self._stream.write(text)
      self._stream.flush()
      self._bar.refresh(nolock=True)
