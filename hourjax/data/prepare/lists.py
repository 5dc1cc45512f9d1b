"""Lists of files to prepare: which, how much of each, for which stream.

    datasets:
      - json_path: llava/single.json
        sampling_strategy: first:10%
      - json_path: videomarathon.json
        stream: long
        media_prefix: "videomarathon/{data_source}"
      - json_path: ocr.json
        media_root: /data/ocr

The format is LLaVA's, with `stream`, `format`, `media_prefix` and the roots in
addition. A path is relative to the list's folder or, as in LLaVA's lists, to
the working directory. A prefix is a folder below --media and may hold
"{data_source}": the videos of VideoMarathon lie in folders of that name, which
its records leave out. A root (`media_root`, or `image_folder` and
`video_folder`) is a path below --media, or the name of a folder there.
"""

import dataclasses
import fractions
import hashlib
import math
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import yaml
from jaxtyping import Bool

from hourjax import schema
from hourjax.errors import UserError

PARQUET = ".parquet"
# In a list of LLaVA's form, what names MosaicML shards instead of a file.
SHARD_KEYS = ("shard_path", "local_path", "remote", "local", "choose")

_HEAD = 1 << 16  # bytes of a possible index of shards that are read

STREAM = "default"
SOURCE = "{data_source}"  # stands for the record's source in a prefix
FORMATS = ("records", "questions")

_ROOTS = ("media_root", "image_folder", "video_folder")
_KEYS = (
  *("json_path", "sampling_strategy", "stream", "media_prefix", "format"),
  *_ROOTS,
)
_MOST_BYTES = 1 << 20  # of a list; the official ones have 9,000
_MOST_VALUES = 100_000  # of a list, each alias counted as what it stands for
_RULE = re.compile(r"(first|end|random):\s*(\d+(?:\.\d+)?)\s*(%?)")


def expand(path: str | os.PathLike) -> list[pathlib.Path]:
  """Returns the files that a path given for records stands for.

  A folder stands for all parquet files in it, at any depth, in order of their
  names: the layout of LLaVA-OneVision on Hugging Face.

  Returns:
    The files; the path itself if it is not a folder.

  Raises:
    UserError: the folder has no parquet files, or holds MosaicML shards.
  """
  path = pathlib.Path(path)
  if path.suffix == ".mds" or (path.is_file() and _is_index(path)):
    raise UserError(shards_message(f"{path} is one of"))
  if not path.is_dir():
    return [path]
  if _is_index(path / "index.json"):
    raise UserError(shards_message(f"{path} holds"))
  found = sorted(
    file
    for file in path.rglob(f"*{PARQUET}")
    if not any(part.startswith(".") for part in file.relative_to(path).parts)
  )
  if found:
    return found
  if next(path.rglob("*.mds"), None):
    raise UserError(shards_message(f"{path} holds"))
  others = sorted(path.glob("*.json*"))[:3]
  raise UserError(
    f"{path} is a folder without {PARQUET} files; give the records' file"
    + (f", such as {', '.join(map(str, others))}" if others else "")
  )


def shards_message(found: str) -> str:
  """Words the message about MosaicML shards.

  Args:
    found: first words of the message: what names or holds the shards.
  """
  return (
    f"{found} MosaicML shards, which are packed copies of records and their"
    " images; give the JSON lists and the images that they were packed from, or"
    " unpack them with the package mosaicml-streaming: each sample of"
    " `streaming.StreamingDataset(local=FOLDER)` has its record under 'text'"
    " and its pictures under 'image'"
  )


def _is_index(path: pathlib.Path) -> bool:
  """Returns whether a file is the index of MosaicML shards."""
  if path.name != "index.json":
    return False
  try:
    with open(path, "rb") as file:
      head = file.read(_HEAD)
  except OSError:
    return False
  return b'"shards"' in head and b'"mds"' in head


@dataclasses.dataclass(frozen=True)
class Rule:
  """Says how much of a file is taken (`sampling_strategy`).

  Attributes:
    which: "all", "first", "end" (the last) or "random" conversations.
    amount: number of conversations, or percent of them, rounded up.
    percent: whether `amount` is in percent.
  """

  which: str = "all"
  amount: fractions.Fraction = fractions.Fraction(100)
  percent: bool = True

  def chosen(
    self, total: int, *, seed: int, name: str
  ) -> Bool[np.ndarray, "N"]:
    """Returns which of `total` conversations are taken.

    For example, first:10% of 25 takes the first 3.

    Args:
      total: number of conversations in the file.
      seed: seed of random choices, together with `name`.
      name: name of the file, so that the choices in two files differ.
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
  """Describes one entry of a list, or one option of the command.

  Attributes:
    paths: files that belong together: those of one question table, or the
      parquet files of one folder.
    format: "records", or "questions" for a table with one question a row.
    rule: how much of it is taken.
    stream: conversations of different streams share no row in training.
    media_prefix: folder put before the media paths, or ""; SOURCE in it is
      replaced.
    name: the path as the user wrote it.
    image_prefix: replaces `media_prefix` for images, if not None.
    video_prefix: replaces `media_prefix` for videos, if not None.
  """

  paths: tuple[pathlib.Path, ...]
  format: Literal["records", "questions"] = "records"
  rule: Rule = Rule()
  stream: str = STREAM
  media_prefix: str = ""
  name: str = ""
  image_prefix: str | None = None
  video_prefix: str | None = None

  def prefix(self, modality: str, source: str) -> str:
    """Returns the folder that is put before the media paths of a record.

    Args:
      modality: "image" or "video".
      source: source of the record, which replaces SOURCE.
    """
    own = self.image_prefix if modality == "image" else self.video_prefix
    prefix = self.media_prefix if own is None else own
    return prefix.replace(SOURCE, source)

  @classmethod
  def of_files(
    cls,
    paths: Sequence[str],
    format: Literal["records", "questions"] = "records",
    media_prefix: str = "",
  ) -> "Item":
    """Makes an item of files given on the command line, taken whole.

    Raises:
      UserError: a folder has no records.
    """
    found = [file for path in paths for file in expand(path)]
    return cls(
      tuple(found),
      format,
      media_prefix=media_prefix,
      name=paths[0],
    )


def parse_rule(text: Any, where: str) -> Rule:
  """Parses `all`, `first:N%`, `end:N%` or `random:N%`; N% may be a count.

  Raises:
    UserError: it is anything else; the message begins with `where`.
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


def read_list(
  path: str | os.PathLike,
  *,
  media: str | os.PathLike | None = None,
  media_prefix: str = "",
) -> list[Item]:
  """Reads a YAML list of files.

  Args:
    path: path of the list.
    media: the media folder, which roots must lie below.
    media_prefix: prefix of the entries without a prefix or root of their own.

  Raises:
    UserError: the file cannot be read, is not YAML, has unknown keys or wrong
      values; the message names the entry.
  """
  path = pathlib.Path(path)
  content = _load(path)
  entries = content.get("datasets") if isinstance(content, dict) else None
  if not isinstance(entries, list) or not entries:
    found = schema.shorten(content, 80)
    raise UserError(
      f"{path}: expected 'datasets:' with a list of entries such as"
      f" {{json_path: a.json, sampling_strategy: all}}, found {found}"
    )
  unknown = [repr(key) for key in content if key != "datasets"]
  if unknown:
    raise UserError(
      f"{path}: unknown key {', '.join(unknown)} beside 'datasets'; remove it"
    )
  return [
    _item(entry, path, media, media_prefix, f"{path}: datasets[{i}]")
    for i, entry in enumerate(entries)
  ]


def report_elsewhere(path: str | os.PathLike, items: Sequence[Item]) -> None:
  """Prints how many files of a list were found in the working directory."""
  parent = pathlib.Path(path).parent
  here = [i for i in items if not (parent / i.name).exists()]
  here = [i for i in here if (pathlib.Path.cwd() / i.name).exists()]
  if here:
    print(
      f"{path}: {len(here)} of {len(items)} files are not beside the list and"
      f" are taken from the working directory, such as {here[0].paths[0]}",
      file=sys.stderr,
    )


def _load(path: pathlib.Path) -> Any:
  """Reads a YAML file of bounded size."""
  try:
    os.stat(path)
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(f"cannot read {path}: {reason}") from error
  remedy = "give a YAML list of files"
  text = schema.read_bytes(path, remedy=remedy, most=_MOST_BYTES)
  try:
    content = yaml.safe_load(text.decode("utf-8-sig"))
  except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
    raise UserError(f"{path} is not valid YAML: {error}") from error
  except RecursionError:
    raise UserError(f"{path} is nested too deep; {remedy}") from None
  # Aliases of aliases let a short text stand for more than memory can hold.
  if _values(content) > _MOST_VALUES:
    raise UserError(
      f"{path} stands for more than {_MOST_VALUES:,} values; write its entries"
      " out, without aliases"
    )
  return content


def _values(content: Any) -> int:
  """Counts nested values; stops a little beyond _MOST_VALUES."""
  count, pending = 0, [content]
  while pending and count <= _MOST_VALUES:
    value = pending.pop()
    count += 1
    if isinstance(value, dict):
      pending += [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set):
      pending += value
  return count


def _item(
  entry: Any,
  path: pathlib.Path,
  media: str | os.PathLike | None,
  prefix: str,
  where: str,
) -> Item:
  """Reads one entry of a list; `where` names it in messages."""
  if not isinstance(entry, dict):
    found = schema.shorten(entry, 80)
    raise UserError(f"{where}: expected keys and values, found {found}")
  shard_keys = [key for key in SHARD_KEYS if key in entry]
  if shard_keys:
    message = shards_message(f"{shard_keys[0]} names")
    raise UserError(f"{where}: {message}")
  for key, value in entry.items():
    if key not in _KEYS:
      raise UserError(
        f"{where}: unknown key {key!r}; known are {', '.join(_KEYS)}"
      )
    if not isinstance(value, str) or (not value and key != "media_prefix"):
      raise UserError(
        f"{where}: {key} must be text, found {schema.shorten(value)}"
      )
  if "json_path" not in entry:
    raise UserError(f"{where}: no json_path; name the file to read")
  form = entry.get("format", FORMATS[0])
  if form not in FORMATS:
    raise UserError(
      f"{where}: format {form!r}; write one of {', '.join(FORMATS)}"
    )
  roots = {
    key: _below(entry[key], path, media, f"{where}: {key}")
    for key in _ROOTS
    if key in entry
  }
  if "media_root" in roots and "media_prefix" in entry:
    raise UserError(
      f"{where}: both media_root ({entry['media_root']!r}) and media_prefix"
      f" ({entry['media_prefix']!r}); keep one"
    )
  found = _found(entry["json_path"], path, f"{where}: json_path")
  return Item(
    paths=tuple(expand(found)),
    format=form,
    rule=parse_rule(entry.get("sampling_strategy", "all"), where),
    stream=entry.get("stream", STREAM),
    media_prefix=roots.get("media_root", entry.get("media_prefix", prefix)),
    name=entry["json_path"],
    image_prefix=roots.get("image_folder"),
    video_prefix=roots.get("video_folder"),
  )


def _found(name: str, path: pathlib.Path, where: str) -> pathlib.Path:
  """Finds a path of a list beside the list or in the working directory.

  If it is in neither place, the path beside the list is returned.
  """
  beside, here = path.parent / name, pathlib.Path.cwd() / name
  there = [p for p in (beside, here) if os.path.exists(p)]
  if len(there) == 2 and not os.path.samefile(beside, here):
    raise UserError(
      f"{where} {name!r} is both {beside.absolute()} and {here}; write the"
      " absolute path of the one that is meant"
    )
  return there[0] if there else beside


def _below(
  name: str, path: pathlib.Path, media: str | os.PathLike | None, where: str
) -> str:
  """Returns a root relative to the media folder, with SOURCE unchanged."""
  if media is None:
    raise UserError(f"{where} {name!r} needs the media folder; give --media")
  head, source, tail = name.partition(SOURCE)
  root = _found(head or ".", path, where)
  if not root.is_dir():
    root = pathlib.Path(media) / head
  if not root.is_dir():
    raise UserError(f"{where} {name!r}: {root.absolute()} is no folder")
  inside = os.path.relpath(root.absolute(), os.path.abspath(media))
  if inside.split(os.sep)[0] == os.pardir:
    inside = os.path.relpath(os.path.realpath(root), os.path.realpath(media))
  if inside.split(os.sep)[0] == os.pardir:
    raise UserError(
      f"{where} {name!r} lies outside the media folder {media}; give a --media"
      " that holds both, with links to them if they lie apart"
    )
  prefix = "" if inside == os.curdir else inside
  between = "/" if source and prefix and head.endswith("/") else ""
  return f"{prefix}{between}{source}{tail}"


@dataclasses.dataclass(frozen=True)
class Options:
  """Holds the options that determine a prepared dataset.

  Attributes:
    items: files to read.
    tokenizer: folder of the tokenizer that counts tokens.
    media: folder of videos and images, or None.
    features: feature store that durations are taken from, or None.
    check_media: whether the media of every record must exist; videos are then
      opened for their duration.
    columns: names of the columns of question tables, by role.
    seed: seed of `random:N%`.
    parquet_images: "unpack" images in parquet files below `media`, or "keep"
      them there.
    holdout: share or number of videos to hold out, see `parse_holdout`; empty
      for nothing.
  """

  items: tuple[Item, ...]
  tokenizer: str
  media: str | None = None
  features: str | None = None
  check_media: bool = True
  columns: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  seed: int = 0
  parquet_images: str = "unpack"
  holdout: str = ""
