"""Stands for `python` on a worker of the fake cloud.

It makes environments that are itself, notes what pip is told to install, and
for `-m hourjax.train` counts steps in a checkpoint: until a file `finish` lies
in the workdir, or `crash` with an exit status. SIGTERM saves and leaves with 0,
as the trainer does. /mnt/hour is a folder of the cloud.
"""

import os
import pathlib
import signal
import sys
import time

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
HOME = pathlib.Path(os.environ["HOME"])


def main(argv):
  if argv[0] == "-c":
    exec(argv[1])
  elif argv[0] == "--version":
    print("Python 3.11 of the fake")
  elif argv[:2] == ["-m", "venv"]:
    python = pathlib.Path(argv[2]) / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(CLOUD / "python")
  elif argv[:2] == ["-m", "pip"]:
    with open(HOME / "pip.txt", "a") as file:
      file.write(" ".join(argv[2:]) + "\n")
    if (CLOUD / "pip_fails").exists():
      sys.exit("ERROR: No matching distribution found for jax==0.0.0")
  elif argv[:2] == ["-m", "hourjax.train"]:
    train(argv[2:])
  else:
    sys.exit(f"no stand-in for {argv}")


def train(options):
  workdir = next(x for x in options if x.startswith("--workdir=")).split("=")[1]
  workdir = pathlib.Path(workdir.replace("/mnt/hour", f"{CLOUD}/mount"))
  workdir.mkdir(parents=True, exist_ok=True)
  node, worker = HOME.parts[-2:]
  saved = workdir / f"{node}-{worker}"
  step = int(saved.read_text()) if saved.exists() else 0
  stops = []
  signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
  print("options", *options)
  print("platforms", os.environ.get("JAX_PLATFORMS"))
  print("note", os.environ.get("NOTE"))
  print("from step", step)
  while not (workdir / "finish").exists():
    crash = workdir / "crash"
    if crash.exists() and worker == "0":
      print("Traceback: it broke", file=sys.stderr)
      sys.exit(int(crash.read_text()))
    if stops and not (workdir / "deaf").exists():
      print("saved at step", step)
      return
    step += 1
    saved.with_suffix(".new").write_text(str(step))
    saved.with_suffix(".new").rename(saved)
    time.sleep(0.02)
  print("trained to step", step)


main(sys.argv[1:])
