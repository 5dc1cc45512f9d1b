"""The files of a dataset as one stream of conversations."""

import dataclasses
import itertools
import pathlib
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool

from hourjax import progress
from hourjax.data.prepare.convert import Dropped, Job
from hourjax.data.prepare.lists import SOURCE, Item
from hourjax.data.prepare.options import Options
from hourjax.data.prepare.report import Report
from hourjax.data.prepare.tables import QuestionTable
from hourjax.data.record_files import stream_records
from hourjax.errors import UserError


class RecordFile:
  """The records of one file."""

  def __init__(self, path: pathlib.Path, step: Callable[[int], Any]):
    self._path, self._length = path, 0
    for _ in stream_records(path):
      self._length += 1
      step(1)

  def __len__(self) -> int:
    return self._length

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    return stream_records(self._path)

  def close(self) -> None:
    pass


@dataclasses.dataclass
class Input:
  """A file and which of its N conversations are taken."""

  item: Item
  source: RecordFile | QuestionTable
  chosen: Bool[np.ndarray, "N"]


def open_inputs(
  options: Options, scratch: pathlib.Path, report: Report
) -> list[Input]:
  """Reads all files once: mistakes show early, and all counts are known.

  Args:
    options: of the dataset.
    scratch: existing folder for what is put aside; `jobs` empties it.
    report: gets the rows that are left out.

  Raises:
    UserError: a file is missing or broken as a whole.
  """

  def skip(where: str, error: UserError) -> None:
    report.drop(Dropped(where, None, error.kind, f"{where}: {error}"))

  files = []
  with progress.bar(0, unit="row", desc="read") as bar:
    for number, item in enumerate(options.items):
      if item.format == "questions":
        aside = scratch / f"questions-{number}"
        source = QuestionTable(
          item.paths, options.columns, aside, skip=skip, step=bar.update
        )
      else:
        source = RecordFile(item.paths[0], bar.update)
      chosen = item.rule.chosen(len(source), seed=options.seed, name=item.name)
      files.append(Input(item, source, chosen))
  return files


def jobs(files: Iterable[Input]) -> Iterator[Job]:
  """The chosen conversations of all files."""
  for file in files:
    found = itertools.compress(file.source, file.chosen)
    for where, raw in found:
      yield Job(where, _adapted(raw, file.item), file.item.stream)
    file.source.close()


def _adapted(raw: Any, item: Item) -> Any:
  """The record with the item's media prefix and a source of some name."""
  if not isinstance(raw, dict):
    return raw
  if raw.get("data_source") in (None, ""):
    raw["data_source"] = item.paths[0].name.split(".")[0]
  prefix = item.media_prefix.replace(SOURCE, str(raw["data_source"]))
  for key in ("video", "image") if prefix else ():
    value = raw.get(key)
    if isinstance(value, str) and value:
      raw[key] = posixpath.join(prefix, value)
    elif isinstance(value, list):
      raw[key] = [
        posixpath.join(prefix, v) if isinstance(v, str) else v for v in value
      ]
  return raw
