"""The data of all trainings, made once for all processes of a test run."""

import fcntl

import pytest

from tests.training import runs

BAD = {
  "id": "bad",
  "video": "nowhere.mp4",
  "conversations": [
    {"from": "human", "value": "<image>\nWhy?"},
    {"from": "gpt", "value": "So."},
  ],
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  """Six conversations about three videos, and a record without its video.

  Tests must not change what is in this folder.
  """
  base = tmp_path_factory.getbasetemp()
  if base.name.startswith("popen-"):
    base = base.parent  # that of all workers of pytest-xdist
  folder, done = base / "training-data", base / "training-data.done"
  with open(base / "training-data.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not done.exists():
      runs.make_data(folder, BAD)
      done.touch()
  return folder
