"""A process that writes its process number into a file, and sleeps."""

import os
import pathlib
import time

pathlib.Path(input()).write_text(str(os.getpid()))
time.sleep(300)
