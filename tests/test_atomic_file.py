"""A kill at any moment leaves the old file or the new one."""

import os
import subprocess
import sys
import textwrap
import uuid

import pytest

from hourjax.atomic_file import (
  TempFiles,
  new_folder,
  replace_file,
  write_file,
)
from hourjax.errors import UserError


@pytest.mark.parametrize("several", [False, True])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, several):
  path = tmp_path / "a.json"
  write_file(path, "old", several_writers=several)
  with (
    pytest.raises(ZeroDivisionError),
    replace_file(path, several_writers=several) as partial,
  ):
    partial.write_text("ne")
    raise ZeroDivisionError
  assert path.read_text() == "old"
  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      write_file(path, "new", several_writers=several)
  assert path.read_text() == "old"
  write_file(path, "é".encode(), several_writers=several)
  assert path.read_text() == "é"
  assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
  (tmp_path / ".a.partial").write_text("longer than the new content")
  write_file(tmp_path / "a", "new")
  assert (tmp_path / "a").read_text() == "new"
  assert len(list(tmp_path.iterdir())) == 1


def test_several_writers_use_names_of_their_own(tmp_path):
  path = tmp_path / "a"
  with replace_file(path, several_writers=True) as one:
    with replace_file(path, several_writers=True) as two:
      assert one != two
      two.write_text("second")
    one.write_text("first")
  assert path.read_text() == "first"


@pytest.fixture(params=["folder", "url"])
def root(request, tmp_path, monkeypatch):
  if request.param == "folder":
    return tmp_path
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  return f"memory://{uuid.uuid4().hex}"


def _names(folder):
  return sorted(p.name for p in folder.iterdir() if p.name != "lock")


def test_files_differ_and_are_gone_afterwards(root):
  files, other = TempFiles(root, "00000"), TempFiles(root, "00001")
  with files.locked(), other.locked():
    paths = [x.new_path() for x in (files, other) for _ in range(3)]
    assert len(set(paths)) == 6
    for path in paths:
      path.touch()
  assert not files.folder.exists() and not other.folder.exists()


def test_what_dead_runs_left_is_removed(root):
  for label in ("00000", "00001", "beam-x"):
    TempFiles(root, label).new_path().touch()
  files = TempFiles(root, "00000")
  with files.locked():
    assert _names(files.folder.parent) == [".partial-00000"]
    assert _names(files.folder) == []


def test_living_runs_are_left_alone(root):
  first, second = TempFiles(root, "00000"), TempFiles(root, "00001")
  with first.locked():
    first.new_path().touch()
    with second.locked():
      assert len(_names(first.folder)) == 1
    with (
      pytest.raises(UserError, match=r"another extraction .*--worker=i/n"),
      TempFiles(root, "00000").locked(),
    ):
      pass
    assert len(_names(first.folder)) == 1


def test_a_killed_process_holds_nothing(tmp_path):
  code = f"""
    import os, signal
    from hourjax.atomic_file import TempFiles
    with TempFiles({str(tmp_path)!r}, "00000").locked():
      TempFiles({str(tmp_path)!r}, "00000").new_path().touch()
      os.kill(os.getpid(), signal.SIGKILL)
  """
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
  assert done.returncode == -9
  files = TempFiles(tmp_path, "00000")
  assert len(_names(files.folder)) == 1
  with files.locked():
    assert _names(files.folder) == []


def test_a_folder_appears_when_it_is_complete(tmp_path):
  out = tmp_path / "there" / "out"
  with new_folder(out) as partial:
    (partial / "a").write_text("1")
    assert not out.exists()
    with (
      pytest.raises(UserError, match="another process is writing"),
      new_folder(out),
    ):
      pass
  assert [path.name for path in out.parent.iterdir()] == ["out"]
  assert [path.name for path in out.iterdir()] == ["a"]
  with (
    pytest.raises(UserError, match="exists and is not empty"),
    new_folder(out),
  ):
    pass


def test_a_folder_that_failed_or_was_left(tmp_path):
  out = tmp_path / "out"
  with pytest.raises(KeyError), new_folder(out) as partial:
    (partial / "a").write_text("1")
    raise KeyError
  assert not list(tmp_path.iterdir())
  # As a killed process leaves it.
  (tmp_path / ".out.partial/old").mkdir(parents=True)
  (tmp_path / ".out.partial/lock").write_text("")
  out.mkdir()
  with new_folder(out) as partial:
    (partial / "b").write_text("2")
  assert [path.name for path in out.iterdir()] == ["b"]
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
