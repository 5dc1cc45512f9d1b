"""What a dataset is made of, and whether an existing one is made of it."""

import json
import os
import pathlib
from typing import Any

import pydantic

from hourjax import schema
from hourjax.data.prepare.options import Options
from hourjax.data.prepared import Prepared
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError

_SUMMARY = "summary.json"


class _Count(schema.Schema):
  conversations: int
  questions: int
  videos: int
  hours: float
  videos_of_unknown_duration: int


class _Kind(schema.Schema):
  """How many were dropped or repaired for one reason, and some of them."""

  count: int
  examples: list[str] = pydantic.Field(min_length=1)


class _Summary(schema.Schema):
  """What is printed of a summary."""

  kept: _Count
  sources: dict[str, _Count]
  streams: dict[str, _Count]
  dropped: dict[str, _Kind]
  repaired: dict[str, _Kind] = pydantic.Field(default_factory=dict)
  videos_without_features: _Kind | None = None
  repeated_ids: int


def describe(
  options: Options, tokenizer: Tokenizer, store: FeatureStore | None
) -> dict[str, Any]:
  """What the dataset depends on, JSON values only.

  Files are told apart by size and time of change, a feature store by the
  number of its videos.

  Args:
    options: of the dataset.
    tokenizer: that counts.
    store: that durations come from.

  Raises:
    UserError: a file is missing.
  """
  stored = None if store is None else [options.features, len(store)]
  described = {
    "tokenizer": tokenizer.fingerprint,
    "media": options.media,
    "features": stored,
    "check_media": options.check_media,
    "columns": {k: list(v) for k, v in options.columns.items()},
    "seed": options.seed,
  }
  if options.parquet_images != "unpack":
    described["parquet_images"] = options.parquet_images
  for item in options.items:
    rule = f"{item.rule.which}:{item.rule.amount}"
    rule += "%" if item.rule.percent else ""
    for path in item.paths:
      what = [item.format, rule, item.stream, item.media_prefix]
      roots = {"images": item.image_prefix, "videos": item.video_prefix}
      what += [f"{k}:{v}" for k, v in roots.items() if v is not None]
      stat = _stat(path, pathlib.Path(item.name).absolute())
      key, value = f"file {path.absolute()}", [*stat, *what]
      described.setdefault(key, []).append(value)
  return described


def find(
  folder: pathlib.Path, wanted: dict[str, Any], overwrite: bool
) -> dict | None:
  """The summary of a dataset that is made of what is wanted.

  Returns:
    None where a dataset may be written.

  Raises:
    UserError: the folder holds another dataset, which may not be
      overwritten, or something that is no dataset.
  """
  if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
    return None
  try:
    found = Prepared(folder).about.get("options", {})
  except UserError as error:
    if overwrite and (folder / "about.json").is_file():
      return None
    raise UserError(
      f"{folder} exists and is no prepared dataset of this version ({error});"
      " choose another --out"
    ) from error
  keys = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
  if not keys:
    remedy = "give --overwrite to prepare again"
    summary = schema.read_json(folder / _SUMMARY, remedy=remedy)
    schema.validate(_Summary, summary, _SUMMARY, remedy=remedy)
    return summary
  if overwrite:
    return None
  lines = [f"\n  {k}: {found.get(k)!r} -> {wanted.get(k)!r}" for k in keys]
  raise UserError(
    f"{folder} holds a dataset made of something else; give --overwrite to"
    f" replace it, or another --out:{''.join(lines)}"
  )


def write_summary(folder: pathlib.Path, summary: dict) -> None:
  """Writes the summary that `find` reads."""
  text = json.dumps(summary, indent=1, ensure_ascii=False)
  (folder / _SUMMARY).write_text(text, encoding="utf-8")


def _stat(path: pathlib.Path, here: pathlib.Path) -> list[int]:
  try:
    stat = os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: a NUL in the name
    reason = getattr(error, "strerror", None) or error
    # A list's path was looked for from the working directory too.
    nor = "" if here == path.absolute() else f", nor is there {here}"
    raise UserError(f"cannot read {path}: {reason}{nor}") from error
  return [stat.st_size, stat.st_mtime_ns]
