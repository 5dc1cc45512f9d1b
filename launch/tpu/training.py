"""The trainer's command line, as every worker runs it."""

from __future__ import annotations

import hashlib
import re
import shlex
import time

from tpu.errors import LaunchError

_ODD = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")


def train_command(arguments: list[str], env: list[str]) -> list[str]:
  """Returns the command `env KEY=VALUE ... python -m hourjax.train ...`.

  Args:
    arguments: options of the trainer.
    env: environment variables, KEY=VALUE each.

  Raises:
    LaunchError: a variable has no value or an invalid name, or a character
      would be changed on the way to the workers.
  """
  for pair in env:
    if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", pair):
      raise LaunchError(f"--env={pair}: write --env=KEY=VALUE")
  for option, texts in (("--env", env), ("the trainer's option", arguments)):
    for text in texts:
      _check_characters(option, text)
  prefix = ["env", *env] if env else []
  return [*prefix, "python", "-m", "hourjax.train", *arguments]


def _check_characters(what: str, text: str) -> None:
  """Refuses characters that shells, terminals or ssh would split or change.

  These are control characters, all line separators (U+2028 among them), and
  bytes that are not UTF-8.
  """
  odd = _ODD.search(text)
  if odd:
    raise LaunchError(
      f"{what} {ascii(text)[:80]}: U+{ord(odd[0]):04X} would not arrive on the"
      " workers as it is; leave it out, or put the value into a file"
    )


def check_env_file(path: str) -> None:
  """Refuses a file of variables that the workers could not read.

  Raises:
    LaunchError: a line is not KEY=VALUE; the message gives its number.
  """
  try:
    with open(path, encoding="utf-8", newline="") as file:
      # Split as the workers' shell does, at "\n" only.
      lines = file.read().split("\n")
  except OSError as error:
    raise LaunchError(f"--env_file={path}: {error.strerror}") from None
  except UnicodeDecodeError:
    raise LaunchError(f"--env_file={path}: it is not UTF-8") from None
  for number, line in enumerate(lines, 1):
    if "\r" in line or "\0" in line:
      raise LaunchError(
        f"--env_file={path}: line {number} ends or breaks with a character"
        " that would become part of the value (a file from Windows?); save it"
        " with plain line ends"
      )
    comment = not line.strip() or line.startswith("#")
    if not comment and not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", line):
      raise LaunchError(f"--env_file={path}: line {number} is no KEY=VALUE")


def workdir_of(arguments: list[str]) -> str | None:
  """Returns the last --workdir among options, None if there is none."""
  found = None
  for option, following in zip(arguments, [*arguments[1:], None]):
    if option in ("--workdir", "-workdir"):
      found = following
    elif option.startswith(("--workdir=", "-workdir=")):
      found = option.split("=", 1)[1]
  return found


def check_workdir(
  arguments: list[str], *, workers: int, until_done: bool, shared: str
) -> None:
  """Refuses a workdir that some worker, or the next TPU, could not read.

  Args:
    arguments: options of the trainer.
    workers: number of workers that train together.
    until_done: whether the run continues on another TPU after a preemption.
    shared: folder that is the same storage on all workers and outlives them,
      "" if there is none.

  Raises:
    LaunchError: the run could not be resumed from there.
  """
  workdir = workdir_of(arguments)
  if not workdir:
    raise LaunchError(
      "no --workdir among the trainer's options; give one after --, as in"
      " `run --shared_path=/mnt/hour ... -- --config=..."
      " --workdir=/mnt/hour/RUN`"
    )
  remedy = (
    "give --shared_path=FOLDER, a mount that all workers have and that outlives"
    " them, and a --workdir below it"
  )
  if "://" in workdir:
    raise LaunchError(
      f"--workdir={workdir} is a URL; a run needs a folder: {remedy}"
    )
  for option, path in (("--workdir", workdir), ("--shared_path", shared)):
    if ".." in path.split("/"):
      raise LaunchError(
        f"{option}={path}: '..' may lead out of what the workers share; write"
        " the path without it"
      )
  if shared and (not shared.startswith("/") or not shared.strip("/")):
    raise LaunchError(
      f"--shared_path={shared} is no mount; give its absolute path, as in"
      " --shared_path=/mnt/hour"
    )
  if shared and (workdir + "/").startswith(shared.rstrip("/") + "/"):
    return
  if until_done:
    raise LaunchError(
      f"--workdir={workdir} is a disk of the TPU VM and is lost with it, but"
      f" --until_done resumes from there; {remedy}"
    )
  if workers > 1:
    raise LaunchError(
      f"--workdir={workdir} is another disk on each of the {workers} workers,"
      f" who write one checkpoint together; {remedy}"
    )
  if not workdir.startswith("/"):
    raise LaunchError(
      f"--workdir={workdir} lies in the shipped code, which `setup` replaces;"
      " give an absolute path"
    )


def job_of(command: list[str]) -> str:
  """Returns the short name of a command line, a digest that marks its runs."""
  return hashlib.sha256(shlex.join(command).encode()).hexdigest()[:8]


def run_id(command: list[str]) -> str:
  """Returns the name of a new run: job, date, time and milliseconds."""
  now = time.time()
  clock = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
  return f"{job_of(command)}-{clock}-{int(now * 1000) % 1000:03d}"
