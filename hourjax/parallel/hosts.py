"""The processes of a run: how they find each other, exchange messages, end.

On TPU VMs one process runs on each host and finds the others without any
setting. Elsewhere (CPUs, several processes on one machine) the environment
says who is who, e.g. for the first of two:

    HOURJAX_COORDINATOR=localhost:9876 HOURJAX_PROCESSES=2 HOURJAX_PROCESS=0

They wait HOURJAX_WAIT_SECONDS for one another, 300 if it is not set.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hourjax.errors import UserError
from hourjax.parallel import rendezvous

_KEYS = ("HOURJAX_COORDINATOR", "HOURJAX_PROCESSES", "HOURJAX_PROCESS")
_WAIT = "HOURJAX_WAIT_SECONDS"
_MESSAGE_BYTES = 4096
# Seconds after which the others notice that a process is gone.
_SILENCE = 60
_LAST_WORDS = 2  # seconds that process 0 leaves others to print their errors


def start_hosts() -> None:
  """Joins the other processes of the run, before jax touches a device.

  Does nothing where the run has one process: on a machine without TPU, unless
  the environment names others.

  Raises:
    UserError: the environment is incomplete, or the others did not come.
  """
  settings = settings_of(os.environ)
  if settings is None:
    return
  wait = _wait_seconds(os.environ)
  by_hand = bool(settings)
  settings = settings or _detected(wait)
  if settings.get("num_processes", 1) > 1:
    try:
      rendezvous.meet(
        settings["coordinator_address"],
        settings["num_processes"],
        settings["process_id"],
        seconds=wait,
      )
    except UserError as error:
      if by_hand:
        raise
      # Not a mistake of the user: a machine was preempted or is late. As it is
      # no UserError, launch/tpu_vm.py starts the run again.
      sys.exit(f"error: {error}")
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=_SILENCE, **settings)
  except (RuntimeError, ValueError) as error:
    raise UserError(
      f"the processes of this run did not find each other: {error}; start one"
      " on every host within five minutes"
    ) from None


def _wait_seconds(environ: Mapping[str, str]) -> float:
  """Returns for how many seconds processes wait for one another."""
  given = environ.get(_WAIT) or "300"
  try:
    seconds = float(given)
  except ValueError:
    seconds = 0.0
  if not 0 < seconds < 86_400:
    raise UserError(f"{_WAIT}={given}: give seconds, up to a day")
  return seconds


def _detected(seconds: float) -> dict[str, Any]:
  """Returns who is who on TPU VMs, as jax finds out; {} leaves it to jax."""
  try:
    from jax._src.clusters import ClusterEnv

    address, processes, process, _ = (
      ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(seconds)
      )
    )
  except Exception:
    # It is no part of jax's interface; asked again, jax itself will say why.
    return {}
  if None in (address, processes, process):
    return {}
  return {
    "coordinator_address": address,
    "num_processes": processes,
    "process_id": process,
  }


def settings_of(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns arguments for `jax.distributed.initialize`, None not to call it.

  They are empty on TPU VMs, where jax asks the metadata server for them. On a
  machine without TPU chips, importing jax has set TPU_SKIP_MDS_QUERY.

  Args:
    environ: variables of the environment.

  Raises:
    UserError: HOURJAX_... variables that are incomplete or no numbers.
  """
  given = {key: environ[key] for key in _KEYS if environ.get(key)}
  if given:
    if len(given) < len(_KEYS):
      raise UserError(
        f"{', '.join(given)} is set, but not"
        f" {', '.join(key for key in _KEYS if key not in given)}; set all three"
        " or none"
      )
    address, processes, process = given.values()
    if not (processes.isdecimal() and process.isdecimal()) or int(
      process
    ) >= int(processes):
      raise UserError(
        f"HOURJAX_PROCESS={process} of HOURJAX_PROCESSES={processes}: must be"
        " numbers, the first from 0 to one less than the second"
      )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
      raise UserError(
        f"HOURJAX_COORDINATOR={address} must be host:port, with a port from 1"
        " to 65535"
      )
    return {
      "coordinator_address": address,
      "num_processes": int(processes),
      "process_id": int(process),
    }
  platforms = environ.get("JAX_PLATFORMS")
  if platforms and "tpu" not in platforms.split(","):
    return None
  managed = environ.get("TPU_PROCESS_ADDRESSES", "") or environ.get(
    "TPU_WORKER_HOSTNAMES", ""
  )
  return {} if managed or not environ.get("TPU_SKIP_MDS_QUERY") else None


def count() -> int:
  """Returns the number of processes."""
  return jax.process_count()


def index() -> int:
  """Returns the number of this process, from 0."""
  return jax.process_index()


def is_primary() -> bool:
  """Returns whether this is process 0, which writes what only one may write."""
  return index() == 0


def agree(message: str) -> dict[int, str]:
  """Exchanges messages between all processes.

  All processes must call it, in the same order as their other collectives.

  Args:
    message: of this process; "" says nothing. It is cut at 4096 bytes.

  Returns:
    The messages by process, on all of them the same, without the empty ones.
  """
  if jax.process_count() == 1:
    return {0: message} if message else {}
  mine = np.zeros(_MESSAGE_BYTES, np.uint8)
  data = np.frombuffer(message.encode()[:_MESSAGE_BYTES], np.uint8)
  mine[: len(data)] = data
  every = np.asarray(multihost_utils.process_allgather(mine))
  texts = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in every]
  return {i: text for i, text in enumerate(texts) if text}


def tell(message: str) -> str:
  """Returns the message of process 0, on all processes; see `agree`."""
  return agree(message if is_primary() else "").get(0, "")


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Runs a block; if it fails on one process, it fails on all of them.

  So no process waits in a collective for one that has ended. The block itself
  must contain no collective.

  Raises:
    UserError: it failed on another process; with its message.
  """
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  message = f"{failure or type(failure).__name__}" if failure else ""
  messages = agree(message)
  if failure is not None:
    raise failure
  if messages:
    process, text = min(messages.items())
    raise UserError(f"process {process} of {count()}: {text}")


@contextlib.contextmanager
def leaving() -> Iterator[None]:
  """Ends the process at once on an error that others may not have noticed.

  An ordinary exit would wait for the other processes, and these, in a
  collective, for this one. Once this process is gone jax ends the others,
  within a minute or so. A process that is alone fails as usual.
  """
  try:
    yield
  except Exception as error:
    if count() == 1:
      raise
    expected = isinstance(error, UserError)
    if expected:
      print(f"error: {error}", file=sys.stderr)
    else:
      traceback.print_exc()
    print(
      f"process {index()} of {count()} leaves; the others will end, too",
      file=sys.stderr,
      flush=True,
    )
    if is_primary():
      # All are connected to process 0 and end with it. Where all have failed
      # alike, the others can print their errors first.
      time.sleep(_LAST_WORDS)
    os._exit(2 if expected else 1)
