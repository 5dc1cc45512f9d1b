"""Long work says what it is, quick work nothing."""

import re
import time

import pytest

from hourjax import progress


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
  monkeypatch.setattr(progress, "_LONG", 0.1)


def test_long_work_says_what_it_is_ever_less_often(capsys):
  with progress.step("compiling the step"):
    time.sleep(1.0)
  lines = capsys.readouterr().err.splitlines()
  assert 2 <= len(lines) <= 4  # after 0.1, 0.2, 0.4 and 0.8 s
  assert all(
    re.fullmatch(r"compiling the step \(\d s so far\)", line) for line in lines
  )
  time.sleep(0.3)
  assert not capsys.readouterr().err


def test_quick_work_says_nothing(capsys):
  with progress.step("opening"):
    pass
  with pytest.raises(KeyError), progress.step("opening"):
    raise KeyError
  time.sleep(0.3)
  assert not capsys.readouterr().err


def test_beside_a_bar_that_moves(capsys):
  with progress.step("encoding"), progress.bar(3, unit="it", desc="x") as bar:
    bar.update()
    time.sleep(0.5)
    assert "encoding" not in capsys.readouterr().err
    bar.update(2)
    time.sleep(1.0)
  assert "encoding (1 s so far)" in capsys.readouterr().err


def test_bars_that_a_library_makes(capsys):
  """Ours in look and words; those that are not wanted are not drawn."""
  bars = progress.library_bar("fetching a/b", lambda made: made["unit"] == "B")
  with bars(total=0, unit="it", desc="Fetching 3 files") as hidden:
    hidden.update()
  with bars(total=4, unit="B", desc="Reconstructing") as shown:
    shown.set_description("Done")
    shown.refresh()
    shown.update(4)
  said = capsys.readouterr().err
  assert said.startswith("fetching a/b: ") and "4/4" in said
  assert "Fetching" not in said and "Done" not in said
  assert said.count("fetching a/b: ") == 1  # no line for every refresh
