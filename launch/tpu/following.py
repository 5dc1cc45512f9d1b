"""Logs of all workers as they grow."""

import subprocess
import sys
import threading
import time

from tpu.gcloud import Gcloud
from tpu.workers import Worker, Workers


def follow(workers: Workers, gcloud: Gcloud, retry_seconds: float) -> int:
  """Prints every worker's lines, after its name, until all runs have ended.

  A connection that is lost is made again, from the line where it broke.
  Returns 0, or 2 if some worker could not be followed to its end.
  """
  if gcloud.dry_run:
    workers.each(lambda x: gcloud.ssh(x.node, x.index, _command(workers, x)))
    return 0
  lock, failed, running = threading.Lock(), [], set()

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
  finally:  # also where a signal ends this
    for process in list(running):
      process.terminate()
  for worker in failed:
    gcloud.say(f"{worker} could not be followed; `status` tells what it does")
  return 2 if failed else 0


def _command(workers: Workers, worker: Worker) -> str:
  return workers.follow_command(worker, 1)[-1]
