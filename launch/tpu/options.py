"""Options of launch/tpu_vm.py: one-line messages, ranges of numbers."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
  """Parses options; reports a mistake in one line with the closest name."""

  def error(self, message: str) -> NoReturn:
    """Prints the mistake and exits with status 2."""
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    known = self._names()
    for word in sys.argv[1:cut]:
      name = word.partition("=")[0]
      if name.startswith("--") and not any(x.startswith(name) for x in known):
        near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
        near = near or difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        message = f"unknown option {name}; {hint}"
        break
    else:
      if message.startswith("unrecognized"):
        message += "; options start with --, and the trainer's stand after --"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

  def _names(self) -> list[str]:
    """Returns all options of this parser and of the given verbs."""
    names = list(self._option_string_actions)
    for action in self._actions:
      if isinstance(action, argparse._SubParsersAction):
        for verb in set(action.choices) & set(sys.argv):
          names += action.choices[verb]._option_string_actions
    return names


def at_least(kind: type, least: float) -> Callable[[str], float]:
  """Returns an argparse type: a number of this kind, at least `least`."""

  def read(text: str) -> float:
    value = kind(text)
    if not least <= value < math.inf:
      raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
    return value

  read.__name__ = {int: "whole number", float: "number"}[kind]
  return read
