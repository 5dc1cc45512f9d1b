"""Rendezvous: the processes of a run meet before jax connects them.

jax answers a port that is taken with a segmentation fault, and a process that
does not come with an abort after five silent minutes. So they meet here first,
at the same address, with messages for what goes wrong. Process 0 listens. Each
process connects and sends its number; process 0 does so too, which shows
whether the address is its own. Process 0 then sends to all of them which
processes are missing, that they can go on once all are there, or an error.

  process i to 0   hourjax-rendezvous I OF_N
  process 0 to i   wait WORDS       a few times a second
                   go               all are here
                   error WORDS      nobody goes on
"""

import contextlib
import errno
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator

from hourjax.errors import UserError

_HELLO = re.compile(r"hourjax-rendezvous (\d{1,7}) (\d{1,7})")
_LINE = 4096  # bytes of a message, at most
_QUIET = 5.0  # seconds of waiting before a line about it is printed
_EVERY = 15.0  # seconds between two such lines
_ANSWER = 10.0  # seconds within which process 0 answers
_RETRY = 0.5
_LINGER = 1.5  # seconds in which late processes are still sent the error


def meet(address: str, processes: int, process: int, *, seconds: float) -> None:
  """Waits until all processes of a run are there.

  Args:
    address: host:port, of process 0.
    processes: of the run.
    process: this one's number, from 0.
    seconds: to wait for the others.

  Raises:
    UserError: the port is taken, a process does not come, or two claim one
      number or different counts. It is raised on all processes that came.
  """
  host, _, port = address.rpartition(":")
  host = host.strip("[]") or "localhost"
  with contextlib.ExitStack() as stack:
    if process == 0:
      server = _Server(_listening(address, int(port)), processes, seconds)
      stack.enter_context(server.running())
    _Client(address, host, int(port), processes, process, seconds).wait()


def _listening(address: str, port: int) -> socket.socket:
  """Returns a socket at the port, on all of this machine's addresses."""
  families = [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]
  for family, every in families:
    try:
      found = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
      continue  # a machine without this family
    try:
      found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      if family == socket.AF_INET6:
        found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
      found.bind((every, port))
      found.listen(1024)
      return found
    except OSError as error:
      found.close()
      if error.errno == errno.EADDRINUSE:
        raise UserError(
          f"coordinator {address}: port {port} is taken on this machine, by"
          " another program or an earlier run; end that, or choose another"
          " port for all processes (HOURJAX_COORDINATOR)"
        ) from None
      if error.errno == errno.EACCES:
        raise UserError(
          f"coordinator {address}: port {port} is not for everyone to use;"
          " choose one above 1023 (HOURJAX_COORDINATOR)"
        ) from None
  raise UserError(
    f"coordinator {address}: this machine cannot listen at port {port}; choose"
    " another one for all processes (HOURJAX_COORDINATOR)"
  )


def _names(processes: Iterable[int]) -> str:
  """Returns "process 2" or "processes 1, 3", at most eight of them named."""
  numbers = sorted(processes)
  said = ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
  return f"process{'es' if len(numbers) > 1 else ''} {said}"


class _Server:
  """Runs the side of process 0, which counts the processes that came."""

  def __init__(self, listener: socket.socket, processes: int, seconds: float):
    self._listener, self._processes = listener, processes
    self._seconds, self._until = seconds, time.monotonic() + seconds
    self._here: dict[int, socket.socket] = {}
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._error = ""

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Serves as long as the block runs; the port is free afterwards."""
    thread = threading.Thread(target=self._serve, daemon=True)
    thread.start()
    try:
      yield
    finally:
      self._stop.set()
      thread.join()

  def _serve(self) -> None:
    self._listener.settimeout(0.2)
    with self._listener:
      while not self._judge():
        with contextlib.suppress(OSError):
          connection, _ = self._listener.accept()
          threading.Thread(
            target=self._greet, args=(connection,), daemon=True
          ).start()
      for connection in self._here.values():
        _closed_by_other(connection)

  def _greet(self, connection: socket.socket) -> None:
    """Reads who a caller is, and counts it if it is a process of the run."""
    hello = None
    with contextlib.suppress(OSError, UnicodeDecodeError):
      connection.settimeout(_ANSWER)
      hello = _HELLO.fullmatch(connection.makefile("r").readline(_LINE).strip())
    if not hello:  # whoever else calls at ports
      connection.close()
      return
    process, processes = int(hello[1]), int(hello[2])
    with self._lock:
      if processes != self._processes:
        self._refuse(
          f"process {process} was started as one of {processes}, process 0 as"
          f" one of {self._processes}; set HOURJAX_PROCESSES alike"
        )
      elif process in self._here and _is_open(self._here[process]):
        self._refuse(
          f"two processes say that they are process {process} of {processes};"
          " give each its own HOURJAX_PROCESS"
        )
      if self._error:
        self._tell(f"error {self._error}", connection)
        threading.Thread(
          target=_closed_by_other, args=(connection,), daemon=True
        ).start()
      else:
        self._here[process] = connection

  def _refuse(self, words: str) -> None:
    """Fails the rendezvous; processes that come late get the error too."""
    self._error = self._error or words
    self._until = time.monotonic() + _LINGER

  def _judge(self) -> bool:
    """Sends all processes the state; returns whether the rendezvous is over."""
    with self._lock:
      late = time.monotonic() > self._until
      if self._stop.is_set() and not self._error:
        return True
      if self._error:
        self._tell(f"error {self._error}", *self._here.values())
        return late
      gone = [k for k, each in self._here.items() if not _is_open(each)]
      for process in gone:
        del self._here[process]
      missing = set(range(self._processes)) - set(self._here)
      if not missing:
        self._tell("go", *self._here.values())
        return True
      if late:
        self._refuse(
          f"{_names(missing)} of {self._processes} did not come within"
          f" {self._seconds:.0f} s; start one on every host, with the same"
          " coordinator (HOURJAX_WAIT_SECONDS waits longer)"
        )
      self._tell(
        f"wait for {_names(missing)} of {self._processes}",
        *self._here.values(),
      )
      return False

  def _tell(self, words: str, *connections: socket.socket) -> None:
    for connection in connections:
      with contextlib.suppress(OSError):
        connection.sendall(f"{words}\n".encode())


def _is_open(connection: socket.socket) -> bool:
  """Returns whether the other side is still connected."""
  try:
    connection.setblocking(False)
    return connection.recv(1) != b""
  except BlockingIOError:
    return True
  except OSError:
    return False
  finally:
    with contextlib.suppress(OSError):
      connection.settimeout(_ANSWER)


def _closed_by_other(connection: socket.socket) -> None:
  """Waits for the other side to close: ours would keep the port busy."""
  with contextlib.suppress(OSError), connection:
    connection.settimeout(2)
    while connection.recv(_LINE):
      pass


class _Client:
  """Runs the side of any process."""

  def __init__(
    self,
    address: str,
    host: str,
    port: int,
    processes: int,
    process: int,
    seconds: float,
  ):
    self._address, self._place = address, (host, port)
    self._processes, self._process = processes, process
    self._began, self._seconds = time.monotonic(), seconds
    self._said = self._began + _QUIET - _EVERY

  def wait(self) -> None:
    """Waits for "go"; raises UserError on everything else."""
    trouble = "nobody listens there"
    while self._waited() < self._seconds:
      try:
        with socket.create_connection(self._place, timeout=5) as connection:
          return self._talk(connection)
      except socket.gaierror:
        trouble = f"no machine of the name {self._place[0]!r} is known"
      except TimeoutError:
        trouble = "the machine does not answer"
      except OSError as error:
        trouble = (error.strerror or str(error)).lower()
      self._say(f"waiting for process 0 at {self._address}: {trouble}")
      time.sleep(_RETRY)
    if self._process == 0:
      raise UserError(
        f"coordinator {self._address}: {trouble}, and it should be this"
        " machine, where process 0 runs; correct HOURJAX_COORDINATOR"
      )
    raise UserError(
      f"coordinator {self._address}: {trouble} after {self._seconds:.0f} s;"
      " start process 0 there, or correct HOURJAX_COORDINATOR (host and port"
      " of process 0; HOURJAX_WAIT_SECONDS waits longer)"
    )

  def _talk(self, connection: socket.socket) -> None:
    """Says who this process is, and waits for what process 0 answers."""
    connection.sendall(
      f"hourjax-rendezvous {self._process} {self._processes}\n".encode()
    )
    connection.settimeout(_ANSWER)
    file, heard = connection.makefile("r", errors="replace"), False
    while True:
      try:
        line = file.readline(_LINE).strip()
      except OSError:  # silence, or it was reset
        line = ""
      verb, _, words = line.partition(" ")
      if verb == "go":
        return
      if verb == "error":
        raise UserError(f"coordinator {self._address}: {words}")
      if verb != "wait":
        raise UserError(self._stranger(heard))
      heard = True
      self._say(f"waiting {words} at {self._address}")

  def _stranger(self, heard: bool) -> str:
    """Returns the error for an answer that no waiting process 0 would give."""
    if heard:
      return (
        f"coordinator {self._address}: process 0 has ended; start all"
        f" {self._processes} processes again"
      )
    return (
      f"coordinator {self._address}: what answers there is no process 0 that"
      " waits: another program has the port, or the run began without this"
      " process; choose another port for all processes (HOURJAX_COORDINATOR),"
      " or end the run and start all of them"
    )

  def _waited(self) -> float:
    return time.monotonic() - self._began

  def _say(self, words: str) -> None:
    """Prints a line, unless one was printed a short time ago."""
    now = time.monotonic()
    if now - self._said >= _EVERY:
      self._said = now
      print(f"{words} ({self._waited():.0f} s)", file=sys.stderr, flush=True)
