"""Writers for other programs: TensorBoard, Weights & Biases, XProf.

TensorBoard's event files are written without TensorFlow: tensorboardX has their
messages and checksum. Its own writer is not used, since it hands events to a
thread through a bounded queue: a full disk ends the thread, and then training
stops without a word when the queue is full. wandb is imported only by a run
that asks for it.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from hourjax.errors import UserError


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """Hides PyTorch from imports in the block.

  tensorboardX imports it where it is installed, which takes seconds and
  hundreds of megabytes that nothing here needs.
  """
  if "torch" in sys.modules:
    yield
    return
  hidden: Any = None  # an import of it fails as if it were not installed
  sys.modules["torch"] = hidden
  try:
    yield
  finally:
    del sys.modules["torch"]


with _without_torch():
  # protobuf makes these classes when their module is imported.
  from tensorboardX.proto.event_pb2 import (
    Event,  # pyrefly: ignore[missing-module-attribute]
    SessionLog,  # pyrefly: ignore[missing-module-attribute]
  )
  from tensorboardX.proto.summary_pb2 import (
    Summary,  # pyrefly: ignore[missing-module-attribute]
  )
  from tensorboardX.record_writer import masked_crc32c
  from tensorboardX.summary import text


class TensorBoardWriter:
  """Writes metrics as TensorBoard events, each start of a run to a new file.

  The file says from which step on the files before it no longer count, so
  TensorBoard shows one curve of a run that was started several times.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    start: int,
    config: Mapping[str, Any],
  ):
    """Creates the file.

    Args:
      folder: of the files of all starts of the run.
      start: step that the run goes on from, 0 for a new one.
      config: of the run; is shown as text.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads files in the order of their names. The nanoseconds tell
    # two starts within a second apart.
    now = time.time_ns()
    name = f"events.out.tfevents.{now // 10**9:010}.{now % 10**9:09}"
    path = folder / f"{name}.{socket.gethostname()}"
    self._file = open(path, "xb")  # noqa: SIM115 (see close)
    self._add(file_version="brain.Event:2")
    begins = SessionLog(status=SessionLog.START)
    self._add(step=start + 1, session_log=begins)
    as_json = json.dumps(config, indent=2, default=str)
    self._add(step=start, summary=text("config", f"```json\n{as_json}\n```"))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes a point for each tag.

    Args:
      step: that was taken.
      values: by tag; TensorBoard groups tags by what stands before "/".
    """
    points = (Summary.Value(tag=t, simple_value=v) for t, v in values.items())
    self._add(step=step, summary=Summary(value=points))

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _add(self, **fields: Any) -> None:
    """Writes one event, with its length and checksums."""
    event = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(event))
    record = (length, _checksum(length), event, _checksum(event))
    self._file.write(b"".join(record))
    self._file.flush()


def _checksum(data: bytes) -> bytes:
  """Returns the checksum that event files use."""
  return struct.pack("<I", masked_crc32c(data))


def require_wandb(project: str) -> None:
  """Checks that the package wandb is installed, without importing it.

  Args:
    project: that was asked for, for the message.

  Raises:
    UserError: it is not installed.
  """
  if importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"config.metrics.wandb is {project!r}, but the package wandb is not"
      " installed; run `pip install -e '.[wandb]'`, or leave"
      " config.metrics.wandb empty"
    )


class WandbWriter:
  """Sends metrics to Weights & Biases, all starts of a workdir as one run.

  wandb_id.txt in the workdir holds the run's id. WANDB_MODE=offline and the
  other environment variables of wandb work as usual. W&B accepts each step
  once: steps that are taken again after a crash keep their first values.
  """

  def __init__(
    self,
    project: str,
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
  ):
    """Begins or resumes the run.

    Args:
      project: at W&B.
      workdir: of the run.
      config: of the run, to be shown.

    Raises:
      UserError: the package is not installed, or W&B refuses, for instance
        without a login.
    """
    require_wandb(project)
    import wandb

    folder = pathlib.Path(workdir)
    self._run: Any = None
    try:
      self._run = wandb.init(
        project=project,
        id=_run_id(folder / "wandb_id.txt"),
        name=folder.absolute().name,
        resume="allow",
        dir=folder,
        config=dict(config),
        # wandb must not take over what this process prints.
        settings=wandb.Settings(console="off"),
      )
    except wandb.errors.Error as error:
      raise UserError(
        f"config.metrics.wandb is {project!r}, but W&B says: {error}; run"
        " `wandb login` on this machine, or set WANDB_MODE=offline and `wandb"
        " sync` later"
      ) from None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Sends values by tag; after a failure nothing more is sent."""
    self._attempt(lambda: self._run.log(dict(values), step=step))

  def close(self) -> None:
    """Ends the run at W&B for now."""
    self._attempt(lambda: self._run.finish())
    self._run = None

  def _attempt(self, call: Callable[[], Any]) -> None:
    """Calls wandb, and gives it up if that fails."""
    if self._run is None:
      return
    try:
      call()
    except Exception as error:  # any error: training must go on
      print(f"W&B gets nothing more from here: {error!r}", file=sys.stderr)
      self._run = None


def _run_id(path: pathlib.Path) -> str:
  """Returns the id in a file, or a new one that is written to it."""
  if path.exists() and (known := path.read_text().strip()):
    return known
  made = uuid.uuid4().hex[:12]
  path.write_text(made + "\n")
  return made


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
