"""Being asked to leave: by SIGTERM (preemption, `stop`) or Ctrl-C."""

import os
import signal
import sys
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Leave:
  """Tells after which step to save and leave; the same one on all processes.

  The first signal asks, the second ends the process at once. Of several
  processes any one may be asked, with SIGTERM: jax passes it on and finds the
  next step that none has taken. Ctrl-C becomes SIGTERM there.

  Attributes:
    signal: that asked, None before.
  """

  def __init__(self):
    """Takes over the signals until `close`."""
    self.signal: int | None = None
    self._several = jax.process_count() > 1
    self._before = {}
    if threading.current_thread() is not threading.main_thread():
      return  # in a notebook's thread signals belong to the notebook
    # Of several processes SIGTERM is jax's, since `jax.distributed` started.
    asked = [signal.SIGINT] + [signal.SIGTERM] * (not self._several)
    for number in asked:
      self._before[number] = signal.signal(number, self._on_signal)

  def at_once(self) -> bool:
    """Whether a process alone is to leave before it has taken a step.

    Several can agree on a step only once they take some.
    """
    return self.signal is not None and not self._several

  def reached(self, step: int) -> bool:
    """Whether to leave after `step`. Every process asks after every step."""
    if not self._several:
      return self.signal is not None
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    self.signal = self.signal or signal.SIGTERM
    return True

  def close(self) -> None:
    """Gives the signals back."""
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    if self.signal is not None:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
      return
    self.signal = number
    # Not print: the signal may have come in the middle of one.
    name = signal.Signals(number).name
    os.write(
      sys.__stderr__.fileno(),
      f"\n{name}: saving after this step, then leaving; once more to leave at"
      " once\n".encode(),
    )
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)
