"""Progress of a command: bars, and a line where one thing takes long.

`bar` counts units of work, `ProgressBar` shows the metrics of a training run
beside its steps, and `step` names what takes long. All of them can also be read
in a log file.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

from tqdm import tqdm

_LONG = 3.0  # seconds until the first line
_BARS: weakref.WeakSet[tqdm] = weakref.WeakSet()


def bar(total: int, *, unit: str, desc: str) -> tqdm:
  """Returns a tqdm bar; into a file or pipe it writes a line every 10 seconds.

  Args:
    total: number of units of work.
    unit: its name.
    desc: what is shown before the bar.
  """
  kind, options = _kind()
  made = kind(total=total, unit=unit, desc=desc, **options)
  _BARS.add(made)
  return made


def _kind() -> tuple[type[tqdm], dict[str, Any]]:
  """Returns the class of a bar on this stderr, and its options."""
  if sys.stderr.isatty():
    return tqdm, {"mininterval": 0.3}
  return _Lines, {"mininterval": 10, "ncols": 110, "ascii": True}


def library_bar(
  desc: str, is_shown: Callable[[Mapping[str, Any]], bool]
) -> type[tqdm]:
  """Returns a class for a library that makes its bars itself.

  Args:
    desc: what is shown before a bar, whatever the library says.
    is_shown: takes the arguments of a bar, and returns whether it is drawn.
  """
  kind, options = _kind()

  class Bar(kind):
    """Draws one of the library's bars as ours, or none."""

    def __init__(self, *args: Any, **made: Any):
      shown = is_shown(made)
      made = {**made, **options, "desc": desc, "disable": not shown}
      made.pop("bar_format", None)
      super().__init__(*args, **made)
      if shown:
        _BARS.add(self)

    def set_description(
      self, desc: str | None = None, refresh: bool | None = True
    ) -> None:
      """Keeps our words."""

    set_description_str = set_description

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> Any:
      """Draws a bar anew on a terminal; elsewhere that would be a line more."""
      return kind is _Lines or super().refresh(nolock, lock_args)

  return Bar


class _Lines(tqdm):
  """Writes lines instead of returning to the start of one."""

  def moveto(self, n: int) -> None:
    """Stays where it is: a file has no lines above to go back to."""

  @staticmethod
  def status_printer(file: Any) -> Callable[[str], None]:  # pyrefly: ignore[bad-override]  tqdm's has no types
    """Returns what writes the bar; tqdm calls it."""

    def write(text: str) -> None:
      if text.strip():
        print(text, file=file, flush=True)

    return write


def _moves(each: tqdm) -> bool:
  """Returns whether a bar is on the screen, and not at its end."""
  return not each.disable and each.n > 0 and each.n != each.total


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
  """Prints what is being done, and for how long, if the block takes long.

  For instance "compiling the train step (12 s so far)", on stderr, after three
  seconds and each time that the time has doubled. Nothing is printed for quick
  work, or while a bar moves.

  Args:
    text: what is being done.
  """
  done, began = threading.Event(), time.monotonic()

  def print_time() -> None:
    wait = _LONG
    while not done.wait(began + wait - time.monotonic()):
      took = time.monotonic() - began
      if not any(_moves(each) for each in list(_BARS)):
        print(f"{text} ({took:.0f} s so far)", file=sys.stderr, flush=True)
      wait *= 2

  thread = threading.Thread(target=print_time, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


_MIN_BAR = 8  # columns that the numbers leave to the bar


class ProgressBar:
  """Shows the logged steps on stderr."""

  def __init__(self, *, steps: int, start: int):
    """Draws the bar if stderr is a terminal.

    While it is there, what Python prints or logs appears above it. Lines that a
    library writes in another language follow the bar.

    Args:
      steps: of the run.
      start: step that the run goes on from.
    """
    self._steps, self._terminal = steps, sys.stderr
    self._evaluated: dict[str, Any] = {}  # last, which stays on the bar
    self._bar: tqdm | None = None
    self._undo = contextlib.ExitStack()
    if sys.stderr.isatty():
      self._bar = tqdm(
        total=steps,
        initial=start,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.3,
        bar_format="{n_fmt}/{total_fmt} {bar} {desc}",
      )
      self._undo.enter_context(_print_above_bars())

  def update(self, done: int) -> None:
    """Moves the bar.

    Args:
      done: number of steps taken.
    """
    if self._bar is not None:
      self._bar.update(done - self._bar.n)

  def show(self, step: int, row: Mapping[str, Any], left: float) -> None:
    """Shows the metrics of a step, as many as there is room for.

    Args:
      step: that was taken.
      row: metrics as in metrics.jsonl; those that it lacks are left out.
      left: seconds to the end of the run.
    """
    count = f"{step}/{self._steps}"
    if self._bar is None:
      numbers = "  ".join(_numbers(row, left))
      print(f"step {count}  {numbers}", file=sys.stderr, flush=True)
      return
    self._evaluated |= {k: v for k, v in row.items() if k.startswith("eval/")}
    room = _columns(self._terminal) - len(count) - _MIN_BAR
    fitting = []
    for part in _numbers({**self._evaluated, **row}, left):
      room -= len(part) + 2
      if room >= 0:
        fitting.append(part)
    self._bar.set_description_str("  ".join(fitting), refresh=False)
    self.update(step)
    self._bar.refresh()

  def close(self) -> None:
    """Leaves the last state of the bar, and ends its line."""
    self._undo.close()
    if self._bar is not None:
      self._bar.close()


def duration(seconds: float) -> str:
  """Returns 3 h 25 min as "3:25:00", from a day on as "2 d 3:25"."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours >= 24:
    return f"{hours // 24} d {hours % 24}:{minutes:02}"
  return f"{hours}:{minutes:02}:{rest:02}"


def _numbers(row: Mapping[str, Any], left: float) -> list[str]:
  """Returns metrics as text, the most important ones first."""
  forms = {
    "loss": "loss {:.3f}",
    "eval/answer_loss": "held-out {:.3f}",
    "eval/first_token_accuracy": "letters {:.0%}",
    "grad_norm": "grad norm {:.2f}",
    "step_seconds": "{:.3g} s/step",
    "mfu": "MFU {:.1%}",
    "video_hours_per_second": "{:.3g} video h/s",
  }
  found = {k: form.format(row[k]) for k, form in forms.items() if k in row}
  found["left"] = f"{duration(left)} left"
  order = ("loss", "eval/answer_loss", "eval/first_token_accuracy",
           "grad_norm", "step_seconds", "left", "mfu",
           "video_hours_per_second")  # fmt: skip
  return [found[key] for key in order if key in found]


def _columns(terminal: TextIO) -> int:
  """Returns the width of a terminal; 80 if it does not know it."""
  try:
    return os.get_terminal_size(terminal.fileno()).columns or 80
  except (OSError, ValueError):
    return 80


@contextlib.contextmanager
def _print_above_bars() -> Iterator[None]:
  """Makes prints and logs of Python appear above all bars."""
  real = {name: getattr(sys, name) for name in ("stdout", "stderr")}
  above = {
    name: _LinesAboveBars(stream)
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
      stream.end()
      if getattr(sys, name) is stream:
        setattr(sys, name, real[name])


def _stream_handlers() -> list[logging.StreamHandler]:
  """Returns the root logger's stream handlers.

  absl's own handler is none, but holds one.
  """
  found = [getattr(h, "python_handler", h) for h in logging.root.handlers]
  return [h for h in found if isinstance(h, logging.StreamHandler)]


class _LinesAboveBars:
  """Passes on whole lines to a stream, while tqdm hides its bars."""

  def __init__(self, stream: TextIO):
    # Under this name tqdm looks for the stream that its bars are on.
    self._wrapped = stream
    self._held, self._lock = "", threading.RLock()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._wrapped, name)

  def write(self, text: str) -> int:
    """Writes the lines that are complete, and holds back the rest."""
    with self._lock:
      lines, newline, self._held = (self._held + text).rpartition("\n")
      if newline:
        self._print(lines + newline)
    return len(text)

  def writelines(self, lines: Iterable[str]) -> None:
    """Writes texts one after the other."""
    self.write("".join(lines))

  def end(self) -> None:
    """Writes what was held back."""
    with self._lock:
      if self._held:
        self._print(self._held + "\n")
      self._held = ""

  def _print(self, text: str) -> None:
    with tqdm.external_write_mode(file=self):
      self._wrapped.write(text)
      self._wrapped.flush()
