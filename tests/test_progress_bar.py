"""What a reader sees: on a terminal (a pty, played back) and in a file."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from hourjax.progress import ProgressBar, duration

ROW = {
  "loss": 2.3104,
  "grad_norm": 0.8,
  "step_seconds": 1.2345,
  "mfu": 0.412,
  "video_hours_per_second": 0.83,
}


class Terminal:
  """A terminal that is stdout and stderr of this process."""

  def __init__(self, monkeypatch, columns):
    self._master, slave = pty.openpty()
    size = struct.pack("HHHH", 24, columns, 0, 0)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    self._streams = [os.fdopen(os.dup(slave), "w") for _ in range(2)]
    os.close(slave)
    monkeypatch.setattr(sys, "stdout", self._streams[0])
    monkeypatch.setattr(sys, "stderr", self._streams[1])
    self._bytes = b""
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self):
    try:
      while data := os.read(self._master, 4096):
        self._bytes += data
    except OSError:  # the other side was closed
      pass

  def lines(self):
    """Closes it; the lines that stand on it, without blanks at their ends."""
    for stream in self._streams:
      stream.close()
    self._reader.join(20)
    os.close(self._master)
    lines, column = [""], 0
    for sign in self._bytes.decode():
      if sign == "\n":
        lines.append("")
      elif sign == "\r":
        column = 0
      else:
        assert sign.isprintable()  # no other control of the cursor
        line = lines[-1].ljust(column)
        lines[-1] = line[:column] + sign + line[column + 1 :]
        column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch):
  """To be called within the test: pytest sets its own streams before it."""
  return lambda columns=100: Terminal(monkeypatch, columns)


def test_an_evaluation_stays_on_the_bar_and_is_a_line_of_a_log(
  terminal, capsys
):
  evaluated = {"eval/answer_loss": 1.25, "eval/first_token_accuracy": 0.5}
  found = terminal(140)
  bar = ProgressBar(steps=20, start=0)
  bar.show(10, ROW | evaluated, left=60)
  bar.show(20, ROW, left=0)
  bar.close()
  (line,) = filter(None, found.lines())
  assert "20/20" in line and "loss 2.310  held-out 1.250  letters 50%" in line


def test_a_bar(terminal):
  terminal = terminal()
  bar = ProgressBar(steps=200, start=0)
  for step in range(1, 101):
    bar.update(step - 1)
    if step % 10 == 0:
      bar.show(step, ROW, left=12_345.6)
  bar.close()
  bar, after = terminal.lines()
  assert after == ""
  assert re.fullmatch(
    r"100/200 \S+ +loss 2.310  grad norm 0.80  1.23 s/step  3:25:46 left"
    r"  MFU 41.2%  0.83 video h/s",
    bar,
  )


def test_others_print_above_the_bar(terminal):
  terminal = terminal()
  log = logging.getLogger("somebody")
  handler = logging.StreamHandler(sys.stderr)
  logging.root.addHandler(handler)
  bar = ProgressBar(steps=20, start=0)
  try:
    for step in range(1, 21):
      bar.update(step - 1)
      bar.show(step, ROW, left=20 - step)
      if step == 5:
        print("saved", "step", 5)
        print("part of a line, ", end="", file=sys.stderr)
      if step == 9:
        print("and the rest", file=sys.stderr)
        log.warning("a warning")
        sys.stdout.writelines(["two\n", "lines\n"])
    print("no end", end="", flush=True)
    bar.close()
  finally:
    logging.root.removeHandler(handler)
  print("after")
  *above, bar, after, last = terminal.lines()
  assert above == [
    "saved step 5",
    "part of a line, and the rest",
    "a warning",
    "two",
    "lines",
    "no end",
  ]
  assert bar.startswith("20/20 ") and "loss 2.310" in bar
  assert (after, last) == ("after", "")


def test_streams_are_given_back(terminal):
  terminal = terminal()
  before = sys.stdout, sys.stderr
  bar = ProgressBar(steps=20, start=0)
  assert (sys.stdout, sys.stderr) != before
  assert sys.stderr.isatty() and sys.stderr.fileno() == before[1].fileno()
  bar.close()
  assert (sys.stdout, sys.stderr) == before
  terminal.lines()


def test_a_narrow_terminal_leaves_numbers_out(terminal):
  terminal = terminal(columns=60)
  bar = ProgressBar(steps=200, start=0)
  bar.show(100, ROW, left=60)
  bar.close()
  (bar, _) = terminal.lines()
  assert len(bar) <= 60
  assert bar.endswith("loss 2.310  grad norm 0.80  1.23 s/step")


def test_lines_elsewhere(capsys):
  out = sys.stdout
  bar = ProgressBar(steps=200, start=0)
  assert sys.stdout is out
  bar.update(9)
  bar.show(10, ROW, left=60)
  bar.show(20, {"loss": 1.0}, left=0)
  bar.close()
  captured = capsys.readouterr()
  assert captured.err.splitlines() == [
    "step 10/200  loss 2.310  grad norm 0.80  1.23 s/step  0:01:00 left"
    "  MFU 41.2%  0.83 video h/s",
    "step 20/200  loss 1.000  0:00:00 left",
  ]
  assert not captured.out


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.4, "0:00:00"),
    (59.6, "0:01:00"),
    (86_399, "23:59:59"),
    (86_399.9, "1 d 0:00"),
    (200_000, "2 d 7:33"),
  ],
)
def test_duration(seconds, text):
  assert duration(seconds) == text
