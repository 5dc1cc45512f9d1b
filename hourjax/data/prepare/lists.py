"""Lists of files: which to read, how much of each, for which stream.

    datasets:
      - json_path: llava/single.json
        sampling_strategy: first:10%
      - json_path: videomarathon.json
        stream: long
        media_prefix: "videomarathon/{data_source}"

The form is LLaVA's; `stream`, `media_prefix` and `format` are additions. A
prefix may be "{data_source}": VideoMarathon's videos lie in folders of that
name, which its records leave out.
"""

import dataclasses
import fractions
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import yaml
from jaxtyping import Bool

from hourjax.errors import UserError

STREAM = "default"
SOURCE = "{data_source}"  # in a prefix: the record's
FORMATS = ("records", "questions")

_KEYS = ("json_path", "sampling_strategy", "stream", "media_prefix", "format")
_RULE = re.compile(r"(first|end|random):\s*(\d+(?:\.\d+)?)\s*(%?)")


@dataclasses.dataclass(frozen=True)
class Rule:
  """How much of a file is taken.

  Attributes:
    which: all of it, its first or last conversations, or random ones.
    amount: number of conversations, or percent of them, rounded up.
    percent: whether `amount` is in percent.
  """

  which: Literal["all", "first", "end", "random"] = "all"
  amount: fractions.Fraction = fractions.Fraction(100)
  percent: bool = True

  def chosen(
    self, total: int, *, seed: int, name: str
  ) -> Bool[np.ndarray, "N"]:
    """Which of `total` conversations are taken.

    first:10% of 25: the first 3.

    Args:
      total: conversations in the file.
      seed: of random choices, together with `name`.
      name: of the file, so that two files are not drawn from alike.
    """
    count = self.amount * total / 100 if self.percent else self.amount
    count = min(total, math.ceil(count))
    if self.which == "random":
      digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
      rng = np.random.default_rng([seed, int.from_bytes(digest)])
      where = rng.choice(total, count, replace=False, shuffle=False)
    elif self.which == "end":
      where = np.arange(total - count, total)
    else:
      where = np.arange(count)
    chosen = np.zeros(total, bool)
    chosen[where] = True
    return chosen


@dataclasses.dataclass(frozen=True)
class Item:
  """What one entry of a list, or one option of the command, asks for.

  Attributes:
    paths: files that belong together; several only for one question table.
    format: records, or a table with one question a row.
    rule: how much of it.
    stream: conversations of different streams share no row in training.
    media_prefix: folder put before the media paths, or ""; SOURCE in it is
      replaced.
    name: of the item as the user wrote it.
  """

  paths: tuple[pathlib.Path, ...]
  format: Literal["records", "questions"] = "records"
  rule: Rule = Rule()
  stream: str = STREAM
  media_prefix: str = ""
  name: str = ""

  @classmethod
  def of_files(
    cls,
    paths: Sequence[str],
    format: Literal["records", "questions"] = "records",
    media_prefix: str = "",
  ) -> "Item":
    """All of some files, as given on the command line."""
    return cls(
      tuple(map(pathlib.Path, paths)),
      format,
      media_prefix=media_prefix,
      name=paths[0],
    )


def parse_rule(text: Any, where: str) -> Rule:
  """Reads `all`, `first:N%`, `end:N%`, `random:N%` or a count for N%.

  Raises:
    UserError: anything else, naming `where`.
  """
  if text == "all":
    return Rule()
  match = _RULE.fullmatch(text.strip()) if isinstance(text, str) else None
  if match:
    which, number, percent = match.groups()
    amount = fractions.Fraction(number)
    whole = percent or amount.denominator == 1
    if whole and amount > 0 and not (percent and amount > 100):
      return Rule(which, amount, bool(percent))
  raise UserError(
    f"{where}: sampling_strategy {text!r}; write all, first:N%, end:N% or"
    " random:N% with 0 < N <= 100, or a whole number of conversations for N%"
  )


def read_list(path: str | os.PathLike) -> list[Item]:
  """Reads a YAML list of files; its paths are relative to the list.

  Raises:
    UserError: not readable, not YAML, unknown keys, bad values; the message
      names the entry.
  """
  path = pathlib.Path(path)
  try:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise UserError(f"{path} is not valid YAML: {error}") from error
  entries = content.get("datasets") if isinstance(content, dict) else None
  if not isinstance(entries, list) or not entries:
    raise UserError(
      f"{path}: expected 'datasets:' with a list of entries such as"
      f" {{json_path: a.json, sampling_strategy: all}}, found {content!r:.80}"
    )
  unknown = [repr(key) for key in content if key != "datasets"]
  if unknown:
    raise UserError(
      f"{path}: unknown key {', '.join(unknown)} beside 'datasets'; remove it"
    )
  return [
    _item(entry, path, f"{path}: datasets[{i}]")
    for i, entry in enumerate(entries)
  ]


def _item(entry: Any, path: pathlib.Path, where: str) -> Item:
  if not isinstance(entry, dict):
    raise UserError(f"{where}: expected keys and values, found {entry!r:.80}")
  for key, value in entry.items():
    if key not in _KEYS:
      raise UserError(
        f"{where}: unknown key {key!r}; known are {', '.join(_KEYS)}"
      )
    if not isinstance(value, str) or (not value and key != "media_prefix"):
      raise UserError(f"{where}: {key} must be text, found {value!r}")
  if "json_path" not in entry:
    raise UserError(f"{where}: no json_path; name the file to read")
  form = entry.get("format", FORMATS[0])
  if form not in FORMATS:
    raise UserError(
      f"{where}: format {form!r}; write one of {', '.join(FORMATS)}"
    )
  return Item(
    paths=(path.parent / entry["json_path"],),
    format=form,
    rule=parse_rule(entry.get("sampling_strategy", "all"), where),
    stream=entry.get("stream", STREAM),
    media_prefix=entry.get("media_prefix", ""),
    name=entry["json_path"],
  )
