"""Which files a path given for records stands for."""

import os
import pathlib

from hourjax.errors import UserError

PARQUET = ".parquet"
# In a list of LLaVA's form, what names MosaicML shards instead of a file.
SHARD_KEYS = ("shard_path", "local_path", "remote", "local", "choose")

_HEAD = 1 << 16  # bytes of an index that are looked at


def expand(path: str | os.PathLike) -> list[pathlib.Path]:
  """The files that a path stands for.

  A folder stands for all parquet files in it, at any depth, by name: the form
  in which Hugging Face has LLaVA-OneVision.

  Returns:
    The path itself if it is no folder.

  Raises:
    UserError: a folder without parquet files, or MosaicML shards.
  """
  path = pathlib.Path(path)
  if path.suffix == ".mds" or (path.is_file() and _is_index(path)):
    raise UserError(shards(f"{path} is one of"))
  if not path.is_dir():
    return [path]
  if _is_index(path / "index.json"):
    raise UserError(shards(f"{path} holds"))
  found = sorted(
    file
    for file in path.rglob(f"*{PARQUET}")
    if not any(part.startswith(".") for part in file.relative_to(path).parts)
  )
  if found:
    return found
  if next(path.rglob("*.mds"), None):
    raise UserError(shards(f"{path} holds"))
  others = sorted(path.glob("*.json*"))[:3]
  raise UserError(
    f"{path} is a folder without {PARQUET} files; give the records' file"
    + (f", such as {', '.join(map(str, others))}" if others else "")
  )


def shards(found: str) -> str:
  """What is told of MosaicML shards.

  Args:
    found: how they were met, as the first words.
  """
  return (
    f"{found} MosaicML shards, which are packed copies of records and their"
    " images; give the JSON lists and the images that they were packed from, or"
    " unpack them with the package mosaicml-streaming: each sample of"
    " `streaming.StreamingDataset(local=FOLDER)` has its record under 'text'"
    " and its pictures under 'image'"
  )


def _is_index(path: pathlib.Path) -> bool:
  """Whether a file is the index of MosaicML shards."""
  if path.name != "index.json":
    return False
  try:
    with open(path, "rb") as file:
      head = file.read(_HEAD)
  except OSError:
    return False
  return b'"shards"' in head and b'"mds"' in head
