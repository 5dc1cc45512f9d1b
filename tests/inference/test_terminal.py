"""A session as it is printed, and mistakes found before it begins."""

import pytest

from hourjax.errors import UserError
from hourjax.inference.answering import Answer
from hourjax.inference.chat_session import ChatSession
from hourjax.inference.sampling import GREEDY, Sampling
from hourjax.inference.terminal import (
  TerminalChat,
  check_options,
  clean_exit,
  image_paths,
  progress_bar,
)


class Says(ChatSession):
  """Gives one answer, streamed in the parts given."""

  def __init__(self, parts: list[str], finished: bool = True):
    self.parts, self.finished = parts, finished

  def ask(self, question, *, max_tokens, sampling, stream):
    if question == "bad":
      raise UserError("no such thing")
    for part in self.parts:
      stream(part)
    return Answer(self.parts[-1], len(self.parts), self.finished)


def test_half_letters_wait(capsys):
  TerminalChat(Says(["a", "a \ufffd", "a \ufffd\ufffd", "a é!"])).ask("Who?")
  assert capsys.readouterr().out == "a é!\n"


def test_nothing_and_too_much(capsys):
  TerminalChat(Says([""])).ask("Who?")
  TerminalChat(Says(["so"], finished=False), max_tokens=1).ask("Who?")
  assert capsys.readouterr().out == "[no words]\nso [cut at 1 tokens]\n"


def test_lines_of_a_pipe(capsys, tmp_path):
  (tmp_path / "asked").write_text("Who?\n\nbad\nWhy?")
  with (tmp_path / "asked").open() as source:
    failed = TerminalChat(Says(["yes"])).ask_lines(source)
  said = capsys.readouterr()
  assert failed == 1
  assert said.out == "\n> Who?\nyes\n\n> bad\n\n> Why?\nyes\n"
  assert said.err == "error: no such thing\n"


@pytest.mark.parametrize(
  "error, status", [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)]
)
def test_how_it_ends(monkeypatch, tmp_path, error, status):
  with (tmp_path / "out").open("w") as out:
    monkeypatch.setattr("sys.stdout", out)
    with pytest.raises(SystemExit) as ended, clean_exit():
      raise error
  assert ended.value.code == status


def test_typed_bytes_that_are_no_text(monkeypatch, tmp_path):
  """They reach the question's check, not a traceback."""
  (tmp_path / "asked").write_bytes(b"caf\xe9?\n")
  with (tmp_path / "asked").open(encoding="utf-8") as typed:
    monkeypatch.setattr("sys.stdin", typed)
    with clean_exit():
      assert typed.readline() == "caf\udce9?\n"


def test_no_bar_where_nothing_takes_time(capsys):
  with progress_bar("read", "frame"):
    pass
  assert not capsys.readouterr().err
  with progress_bar("read", "frame") as report:
    report(0, 4)
    report(4, 4)
  assert "4/4" in capsys.readouterr().err


def test_options(tmp_path):
  good = {
    "questions": ["Who?"],
    "video": "a.mp4",
    "features": None,
    "images": [],
    "duration": None,
    "sampling": GREEDY,
    "picture": str(tmp_path / "attention.png"),
  }
  check_options(**good)
  none = {"video": None, "picture": ""}
  for change, message in (
    ({"questions": ["two", "words"]}, "2 arguments, 'two' and more"),
    ({"questions": [" "]}, "the question is empty"),
    ({"video": None}, "give one of --video"),
    ({"images": ["a.jpg"]}, "give one of --video"),
    ({"video": "a.npy"}, "--video=a.npy is no video; features are --feat"),
    ({**none, "features": "a.mp4"}, "--features=a.mp4 is no .npy file"),
    ({**none, "images": ["a.jpg", ""]}, "an image without a name"),
    ({**none, "images": ["a"], "picture": "a.png"}, "leave it out with --im"),
    ({"duration": 3.0}, "--duration is of --features"),
    ({"sampling": Sampling(top_p=0.5)}, "--top_p=0.5 is of draws"),
    ({"picture": str(tmp_path / "no" / "a.png")}, "is no folder for the pict"),
  ):
    with pytest.raises(UserError, match=message):
      check_options(**{**good, **change})


@pytest.mark.parametrize(
  "values, expected",
  [
    ([], []),
    (["a.png"], ["a.png"]),
    (["a.png", "none.png"], ["a.png", "none.png"]),
    (["a.png,b.png"], ["a.png", "b.png"]),
    (["a.png, b.png"], ["a.png", "b.png"]),
    (["x,y.png"], ["x,y.png"]),
    (["x,y.png,a.png"], ["x,y.png", "a.png"]),
    (["a.png,x,y.png", "b.png"], ["a.png", "x,y.png", "b.png"]),
    (["none,y.png"], ["none", "y.png"]),
    (["a.png,"], ["a.png", ""]),  # which `check_options` refuses
    ([""], [""]),
  ],
)
def test_names_with_commas(tmp_path, monkeypatch, values, expected):
  monkeypatch.chdir(tmp_path)
  for name in ("a.png", "b.png", "x,y.png"):
    (tmp_path / name).touch()
  assert image_paths(values) == expected
