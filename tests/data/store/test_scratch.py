import subprocess
import sys
import textwrap
import uuid

import pytest

from hourjax.atomic_file import Scratch
from hourjax.errors import UserError


@pytest.fixture(params=["folder", "url"])
def root(request, tmp_path, monkeypatch):
  if request.param == "folder":
    return tmp_path
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  return f"memory://{uuid.uuid4().hex}"


def _names(folder):
  return sorted(p.name for p in folder.iterdir() if p.name != "lock")


def test_files_differ_and_are_gone_afterwards(root):
  scratch, other = Scratch(root, "00000"), Scratch(root, "00001")
  with scratch.held(), other.held():
    files = [s.file() for s in (scratch, other) for _ in range(3)]
    assert len(set(files)) == 6
    for file in files:
      file.touch()
  assert not scratch.folder.exists() and not other.folder.exists()


def test_what_dead_runs_left_is_removed(root):
  for label in ("00000", "00001", "beam-x"):
    Scratch(root, label).file().touch()
  scratch = Scratch(root, "00000")
  with scratch.held():
    assert _names(scratch.folder.parent) == [".partial-00000"]
    assert _names(scratch.folder) == []


def test_living_runs_are_left_alone(root):
  first, second = Scratch(root, "00000"), Scratch(root, "00001")
  with first.held():
    first.file().touch()
    with second.held():
      assert len(_names(first.folder)) == 1
    with (
      pytest.raises(UserError, match=r"another extraction .*--worker=i/n"),
      Scratch(root, "00000").held(),
    ):
      pass
    assert len(_names(first.folder)) == 1


def test_a_killed_process_holds_nothing(tmp_path):
  code = f"""
    import os, signal
    from hourjax.atomic_file import Scratch
    with Scratch({str(tmp_path)!r}, "00000").held():
      Scratch({str(tmp_path)!r}, "00000").file().touch()
      os.kill(os.getpid(), signal.SIGKILL)
  """
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
  assert done.returncode == -9
  scratch = Scratch(tmp_path, "00000")
  assert len(_names(scratch.folder)) == 1
  with scratch.held():
    assert _names(scratch.folder) == []
