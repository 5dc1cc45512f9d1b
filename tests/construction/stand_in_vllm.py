"""Stands for `vllm serve MODEL --port=N ...`, on the demo's videos.

It takes the options that vLLM takes, loads for a moment, and ends on SIGTERM.
The model `broken` ends at once, as one that does not fit the GPU does.
"""

import argparse
import os
import pathlib
import signal
import sys
import time

from tests.construction import model_server

VIDEOS = 2


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("command", choices=["serve"])
  parser.add_argument("model")
  for name in ("served-model-name", "host", "limit-mm-per-prompt"):
    parser.add_argument(f"--{name}", required=True)
  for name in ("port", "tensor-parallel-size", "max-model-len"):
    parser.add_argument(f"--{name}", type=int, required=True)
  parser.add_argument("--enable-prefix-caching", action="store_true")
  options = parser.parse_args()
  if options.model == "broken":
    sys.exit("CUDA out of memory")
  time.sleep(1)
  player = model_server.Player(model_server.scripts_of(VIDEOS))
  signal.signal(signal.SIGTERM, lambda *_: None)
  with model_server.running(player, options.port):
    signal.pause()
  pathlib.Path(os.environ["STAND_IN_ENDED"]).touch()


if __name__ == "__main__":
  main()
