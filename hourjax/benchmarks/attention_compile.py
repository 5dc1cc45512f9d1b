"""Starts `attention_child` and reads what the compiler leaves behind."""

import concurrent.futures
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from hourjax import progress
from hourjax.benchmarks import schedule
from hourjax.benchmarks.attention_child import Job
from hourjax.benchmarks.schedule import Piece
from hourjax.errors import UserError
from hourjax.planning.children import REASON, ask_child

_LAYOUT = re.compile(r"\d+(x\d+){1,2}")
_AT_ONCE = 2  # programs that are compiled
_LIMIT = 240  # seconds for one program


class Compiled(NamedTuple):
  """What is known of a compiled program.

  Attributes:
    figures: of `attention_child.compile_job`; None if it was not compiled.
    missing: the reason then, in short.
    kernels: pieces of the kernels that were asked for, by pattern.
  """

  figures: dict[str, Any] | None
  missing: str
  kernels: dict[str, list[list[Piece]]]

  def memory(self) -> dict[str, Any]:
    """MiB of temporaries in HBM, or why there is no such number."""
    if self.figures is None:
      return {"not_compiled": self.missing}
    return {"hbm_temporaries_mib": mib(self.figures["temporaries"])}


def mib(size: float) -> float:
  """Bytes in MiB."""
  return round(size / (1 << 20), 1)


def check_topology(name: str) -> None:
  """Raises UserError for a topology that no compiler knows."""
  generation, _, layout = name.partition(":")
  if generation not in schedule.FLOP_PER_CYCLE:
    raise UserError(
      f"--topology={name}: {generation!r} is no generation of TPU; known are"
      f" {', '.join(schedule.FLOP_PER_CYCLE)}"
    )
  if not _LAYOUT.fullmatch(layout):
    raise UserError(
      f"--topology={name}: give its chips, such as {generation}:2x4"
    )


def compile_in_child(job: Job, *kernels: str) -> Compiled:
  """Compiles in a process of its own.

  Args:
    job: what to compile.
    *kernels: patterns of the kernels whose schedule is read. It is there as
      soon as a kernel is compiled, even if the rest of the program takes
      longer than `_LIMIT`.

  Raises:
    UserError: if the compiler refuses for another reason than memory.
  """
  with tempfile.TemporaryDirectory() as folder:
    flags = schedule.DUMP_FLAGS.format(folder=folder) if kernels else ""
    figures, missing = _run(job, flags)
    read = {
      name: schedule.read_kernels(pathlib.Path(folder), name)
      for name in kernels
    }
  return Compiled(figures, missing, read)


def run_all(name: str, calls: dict[str, Callable]) -> dict[str, Any]:
  """Calls of no argument, a few at once, and their results by name.

  The first error cancels those that have not begun.
  """
  results = {}
  with (
    concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool,
    progress.bar(len(calls), unit="program", desc=name) as shown,
  ):
    waiting = {pool.submit(call): key for key, call in calls.items()}
    try:
      for done in concurrent.futures.as_completed(waiting):
        results[waiting[done]] = done.result()
        shown.set_postfix_str(waiting[done], refresh=False)
        shown.update()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
  return results


def _run(job: Job, flags: str) -> tuple[dict[str, Any] | None, str]:
  """The child's figures, or None and why not."""
  found = ask_child(
    "hourjax.benchmarks.attention_child",
    job._asdict(),
    limit=_LIMIT,
    flags=flags,
  )
  if found.late:
    return None, found.reason
  if found.answer is None:
    raise UserError(
      f"--topology={job.topology}: cannot compile {job.what} for"
      f" {job.devices} device(s), {job.queries} queries and {job.keys} keys:"
      f" {found.reason}"
    )
  if "exhausted" in found.answer:
    return None, found.answer["exhausted"].splitlines()[0][:REASON]
  return found.answer, ""
