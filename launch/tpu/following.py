"""Logs of all workers, printed while they grow."""

import subprocess
import sys
import threading
import time

from tpu.gcloud import Gcloud
from tpu.workers import Worker, Workers


def follow(workers: Workers, gcloud: Gcloud, retry_seconds: float) -> int:
  """Prints the log lines of all workers, each with its name, until all ended.

  A lost connection is opened again and continues at the line where it broke.

  Args:
    workers: whose logs are printed.
    gcloud: opens the connections.
    retry_seconds: between two attempts to connect.

  Returns:
    Exit status: 0, or 2 if a worker could not be followed to its end.
  """
  if gcloud.dry_run:
    workers.each(lambda x: gcloud.ssh(x.node, x.index, _command(workers, x)))
    return 0
  lock = threading.Lock()
  failed: list[Worker] = []
  running: set[subprocess.Popen[str]] = set()

  def one(worker: Worker) -> None:
    line, lost = 1, 0
    while lost < 5:
      command = workers.follow_command(worker, line)
      process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace",
      )  # fmt: skip
      running.add(process)
      with process:
        assert process.stdout and process.stderr  # both are pipes
        errors = threading.Thread(target=process.stderr.read, daemon=True)
        errors.start()
        for text in process.stdout:
          line, lost = line + 1, 0
          with lock:
            sys.stdout.write(f"[{worker}] {text}")
            sys.stdout.flush()
      running.discard(process)
      if not process.returncode:
        return
      lost += 1
      gcloud.say(f"{worker}: connection lost; again from line {line}")
      time.sleep(retry_seconds)
    failed.append(worker)

  threads = [threading.Thread(target=one, args=(x,), daemon=True)
             for x in workers.all]  # fmt: skip
  for thread in threads:
    thread.start()
  try:
    for thread in threads:
      thread.join()
  finally:  # also when a signal ends this process
    for process in list(running):
      process.terminate()
  for worker in failed:
    gcloud.say(f"{worker} could not be followed; `status` tells what it does")
  return 2 if failed else 0


def _command(workers: Workers, worker: Worker) -> str:
  """Returns the remote part of the command, for a dry run."""
  return workers.follow_command(worker, 1)[-1]
