"""Processes that meet, and all the ways in which they do not."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hourjax.errors import UserError
from hourjax.parallel import hosts, rendezvous

ROOT = Path(__file__).parents[2]
START = """
from hourjax import command
from hourjax.parallel import hosts
def main(_):
  hosts.start_hosts()
  print("met", hosts.index(), hosts.count())
command.run(main)
"""


@pytest.fixture
def port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def _met(address, claims, seconds=10.0, late=0.0):
  """The error of each of these (process, processes); "" if it may go on."""
  errors = [None] * len(claims)

  def one(number):
    process, processes = claims[number]
    time.sleep(late * number)
    try:
      rendezvous.meet(address, processes, process, seconds=seconds)
      errors[number] = ""
    except UserError as error:
      errors[number] = str(error)

  numbers = range(len(claims))
  threads = [threading.Thread(target=one, args=(n,)) for n in numbers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return errors


def test_all_are_there_and_the_port_is_free_again(port):
  for order in ((0, 1, 2), (2, 1, 0)):
    claims = [(process, 3) for process in order]
    assert _met(f"localhost:{port}", claims, late=0.1) == [""] * 3


def test_some_do_not_come(port, monkeypatch, capsys):
  monkeypatch.setattr(rendezvous, "_QUIET", 0.3)
  errors = _met(f"localhost:{port}", [(0, 4), (2, 4)], seconds=1.5)
  said = (
    f"coordinator localhost:{port}: processes 1, 3 of 4 did not come within"
    " 2 s; start one on every host"
  )
  assert all(words.startswith(said) for words in errors)
  lines = capsys.readouterr().err.splitlines()
  waiting = rf"waiting for processes 1, 3 of 4 at localhost:{port} \(\d+ s\)"
  assert re.fullmatch(waiting, lines[-1])


def test_process_0_does_not_come(port, monkeypatch, capsys):
  monkeypatch.setattr(rendezvous, "_QUIET", 0.3)
  (error,) = _met(f"localhost:{port}", [(1, 2)], seconds=1)
  assert f"localhost:{port}: connection refused after 1 s; start process 0" in (
    error
  )
  assert f"waiting for process 0 at localhost:{port}" in capsys.readouterr().err


def test_they_disagree(port):
  twice = _met(f"localhost:{port}", [(0, 3), (1, 3), (1, 3)])
  assert all("two processes say that they are process 1 of 3" in x
             for x in twice)  # fmt: skip
  counts = _met(f"localhost:{port}", [(0, 3), (1, 2)])
  said = "process 1 was started as one of 2, process 0 as one of 3"
  assert all(said in words for words in counts)


def test_who_came_and_left_is_waited_for_again(port):
  address = f"localhost:{port}"
  first = threading.Thread(target=_met, args=(address, [(0, 3)]))
  first.start()
  time.sleep(0.3)
  with socket.create_connection(("localhost", port)) as left:
    left.sendall(b"hourjax-rendezvous 2 3\n")
    assert left.recv(100).startswith(b"wait for process 1 of 3")
  # Whoever calls at ports is not taken for a process.
  with socket.create_connection(("localhost", port)) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert stranger.recv(100) == b""
  assert _met(address, [(1, 3), (2, 3)]) == ["", ""]
  first.join(20)
  assert not first.is_alive()


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n", b""])
def test_another_program_answers(port, monkeypatch, words):
  monkeypatch.setattr(rendezvous, "_ANSWER", 0.5)
  with socket.socket() as other:
    other.bind(("localhost", port))
    other.listen()
    other.settimeout(10)

    def answer():
      connection, _ = other.accept()
      connection.sendall(words)
      time.sleep(2)
      connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    (error,) = _met(f"localhost:{port}", [(1, 2)])
    thread.join()
    assert "what answers there is no process 0 that waits" in error
    (error,) = _met(f"localhost:{port}", [(0, 2)])
    assert f"port {port} is taken on this machine" in error


def test_an_address_that_is_not_ours(port):
  (error,) = _met(f"nowhere.invalid:{port}", [(0, 2)], seconds=1)
  assert "no machine of the name 'nowhere.invalid' is known, and it" in error
  (error,) = _met(f"nowhere.invalid:{port}", [(1, 2)], seconds=1)
  assert "known after 1 s; start process 0 there, or correct" in error


@pytest.mark.parametrize("given", ["soon", "0", "-3", "nan", "1e9"])
def test_how_long_to_wait(given):
  with pytest.raises(UserError, match="HOURJAX_WAIT_SECONDS"):
    hosts._wait_seconds({"HOURJAX_WAIT_SECONDS": given})
  assert hosts._wait_seconds({}) == 300


def _start(port, process, processes, seconds):
  return subprocess.Popen(
    [sys.executable, "-c", START],
    cwd=ROOT,
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "HOURJAX_COORDINATOR": f"localhost:{port}",
      "HOURJAX_PROCESSES": str(processes),
      "HOURJAX_PROCESS": str(process),
      "HOURJAX_WAIT_SECONDS": str(seconds),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_processes_of_a_run(port):
  """They meet and go on to jax; a taken port ends the next two in words."""
  first = [_start(port, process, 2, 60) for process in range(2)]
  for process, each in enumerate(first):
    out, said = each.communicate(timeout=120)
    assert each.returncode == 0 and out == f"met {process} 2\n", said
  with socket.socket() as other:
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    other.bind(("localhost", port))
    other.listen()
    (late,) = [_start(port, 0, 2, 5)]
    out, said = late.communicate(timeout=60)
  assert late.returncode == 2 and not out
  assert said.startswith(f"error: coordinator localhost:{port}: port {port} is")
  assert said.count("\n") == 1


def test_a_machine_that_is_missing_is_no_mistake(port, monkeypatch, capsys):
  """On TPU VMs, where jax knows who is who: the run shall start again."""
  found = {
    "coordinator_address": f"localhost:{port}",
    "num_processes": 2,
    "process_id": 1,
  }
  for name in ("HOURJAX_COORDINATOR", "HOURJAX_PROCESSES", "HOURJAX_PROCESS"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOURJAX_WAIT_SECONDS", "0.5")
  monkeypatch.setattr(hosts, "settings_of", lambda _: {})
  monkeypatch.setattr(hosts, "_detected", lambda _: found)
  with pytest.raises(SystemExit) as end:
    hosts.start_hosts()
  assert isinstance(end.value.code, str) and "start process 0" in end.value.code
