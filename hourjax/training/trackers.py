"""TensorBoard event files, without TensorFlow.

tensorboardX has the messages and the checksum. Its writer is not used: it
hands events to a thread through a bounded queue, so that a full disk, which
ends the thread, would stop training without a word.
"""
# MERGED hourjax.training.tracker:
# Weights & Biases, imported only by a run that asks for it.

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
from collections.abc import Iterator, Mapping
from typing import Any

from hourjax.errors import UserError


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """tensorboardX imports PyTorch where there is one, for seconds of each start
  and hundreds of megabytes that nothing here needs."""
  if "torch" in sys.modules:
    yield
    return
  sys.modules["torch"] = None
  try:
    yield
  finally:
    del sys.modules["torch"]


with _without_torch():
  from tensorboardX.proto.event_pb2 import Event, SessionLog
  from tensorboardX.proto.summary_pb2 import Summary
  from tensorboardX.record_writer import masked_crc32c
  from tensorboardX.summary import text


class Events:
  """Writes scalars of one start of a run into a file of its own.

  The file says from which step on the files before it no longer count, so a
  run that goes on from a checkpoint shows one curve.
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
      folder: of all starts of the run.
      start: step that the run goes on from, 0 for a new one.
      config: shown as text.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Read in the order of their names. Nanoseconds: a run may start twice
    # within a second.
    now = time.time_ns()
    name = f"events.out.tfevents.{now // 10**9:010}.{now % 10**9:09}"
    path = folder / f"{name}.{socket.gethostname()}"
    self._file = open(path, "xb")  # noqa: SIM115 (see close)
    self._add(file_version="brain.Event:2")
    begins = SessionLog(status=SessionLog.START)
    self._add(step=start + 1, session_log=begins)
    shown = json.dumps(config, indent=2, default=str)
    self._add(step=start, summary=text("config", f"```json\n{shown}\n```"))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One point for each tag; TensorBoard groups them by what precedes "/"."""
    points = (Summary.Value(tag=t, simple_value=v) for t, v in values.items())
    self._add(step=step, summary=Summary(value=points))

  def close(self) -> None:
    self._file.close()

  def _add(self, **fields) -> None:
    event = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(event))
    record = (length, _checksum(length), event, _checksum(event))
    self._file.write(b"".join(record))
    self._file.flush()


def _checksum(data: bytes) -> bytes:
  return struct.pack("<I", masked_crc32c(data))


def require_wandb(project: str) -> None:
  """Checks that the package is there, without importing it.

  Raises:
    UserError: it is not.
  """
  if importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"config.watch.wandb is {project!r}, but the package wandb is not"
      " installed; run `pip install -e '.[wandb]'`, or leave"
      " config.watch.wandb empty"
    )


class WandbRun:
  """One run at W&B for all starts of a workdir: wandb_id.txt holds its id.

  WANDB_MODE=offline and the other variables of wandb work as ever. W&B takes
  a step once: those that are taken again after a crash keep the values of the
  first time.
  """

  def __init__(
    self,
    project: str,
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
  ):
    """Begins or resumes the run.

    Raises:
      UserError: the package is missing, or W&B refuses, e.g. without login.
    """
    require_wandb(project)
    import wandb

    folder = pathlib.Path(workdir)
    try:
      self._run = wandb.init(
        project=project,
        id=_run_id(folder / "wandb_id.txt"),
        name=folder.absolute().name,
        resume="allow",
        dir=folder,
        config=dict(config),
        # Our own lines go to the terminal as they are.
        settings=wandb.Settings(console="off"),
      )
    except wandb.errors.Error as error:
      raise UserError(
        f"config.watch.wandb is {project!r}, but W&B says: {error}; run `wandb"
        " login` on this machine, or set WANDB_MODE=offline and `wandb sync`"
        " later"
      ) from None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Sends values; after a failure nothing more is sent."""
    self._attempt(lambda: self._run.log(dict(values), step=step))

  def close(self) -> None:
    self._attempt(lambda: self._run.finish())
    self._run = None

  def _attempt(self, call) -> None:
    if self._run is None:
      return
    try:
      call()
    except Exception as error:  # whatever it is, training matters more
      print(f"W&B gets nothing more from here: {error!r}", file=sys.stderr)
      self._run = None


def _run_id(path: pathlib.Path) -> str:
  if path.exists() and (known := path.read_text().strip()):
    return known
  made = uuid.uuid4().hex[:12]
  path.write_text(made + "\n")
  return made
