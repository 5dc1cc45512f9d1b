"""Keeps a library's pages about an error from hiding our line about it."""

import functools
import logging
import os
import sys
import warnings

from absl import logging as absl_logging


@functools.cache  # once is enough
def quiet_orbax() -> None:
  """Orbax tells no one but us of reads and writes that fail.

  Each of its errors is raised as well, and then we say it. Beside that it logs
  every thread's traceback, and asyncio what became of the other arrays: a full
  disk was 190 KB on the screen, a damaged file half of that.
  """
  absl_logging.get_absl_logger().addFilter(_not_of_orbax)
  logging.getLogger("asyncio").addFilter(_not_abandoned)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
  inside = f"{os.sep}orbax{os.sep}" in record.pathname
  return not inside or record.levelno < logging.ERROR


def _not_abandoned(record: logging.LogRecord) -> bool:
  return "exception was never retrieved" not in record.getMessage()


def _unraisable(before, unraisable) -> None:
  """Leaves out coroutines of Orbax and what comes after their loop's end."""
  late = str(unraisable.exc_value) == "Event loop is closed"
  trace, inside = unraisable.exc_traceback, False
  while trace is not None and not inside:
    inside = f"{os.sep}orbax{os.sep}" in trace.tb_frame.f_code.co_filename
    trace = trace.tb_next
  if not late and not inside:
    before(unraisable)
