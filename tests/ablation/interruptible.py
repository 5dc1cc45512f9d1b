"""A process that ends like a training on Ctrl-C, and says that it did."""

import pathlib
import sys
import time

folder = pathlib.Path(sys.argv[1].partition("=")[2])
(folder / "started").touch()
try:
  time.sleep(60)
except KeyboardInterrupt:
  time.sleep(0.3)  # it saves
  (folder / "saved").touch()
  sys.exit(130)
