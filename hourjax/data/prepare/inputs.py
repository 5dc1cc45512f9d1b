"""The files of a dataset as one stream of conversations."""

import dataclasses
import functools
import itertools
import pathlib
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from hourjax import progress
from hourjax.data.prepare.convert import Dropped, Job
from hourjax.data.prepare.lists import PARQUET, Item, Options
from hourjax.data.prepare.parquet import (
  Embedded,
  EmbeddedImages,
  ParquetRecords,
)
from hourjax.data.prepare.question_tables import QuestionTable
from hourjax.data.prepare.report import Report
from hourjax.data.records.files import stream_records
from hourjax.data.records.media_keys import media_key, modality_of
from hourjax.data.records.record import on_disk
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError


class RecordFile:
  """Reads the records of one file."""

  def __init__(self, path: pathlib.Path, step: Callable[[int], Any]):
    """Counts the records; calls `step(1)` for each."""
    self._path, self._length = path, 0
    for _ in stream_records(path):
      self._length += 1
      step(1)

  def __len__(self) -> int:
    return self._length

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    return stream_records(self._path)

  def close(self) -> None:
    """Does nothing: there are no temporary files."""


@dataclasses.dataclass
class Input:
  """Holds a source and which of its N conversations are taken."""

  item: Item
  source: RecordFile | ParquetRecords | QuestionTable
  chosen: Bool[np.ndarray, "N"]


def open_inputs(
  options: Options, scratch: pathlib.Path, report: Report
) -> list[Input]:
  """Reads all files once, to find mistakes early and to count conversations.

  Args:
    options: of the dataset.
    scratch: existing folder for temporary files, which `jobs` removes.
    report: counts the rows that are left out.

  Raises:
    UserError: a file is missing or cannot be read at all.
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
        source = _records(item.paths, bar.update)
      chosen = item.rule.chosen(len(source), seed=options.seed, name=item.name)
      files.append(Input(item, source, chosen))
  return files


def _records(
  paths: Sequence[pathlib.Path], step: Callable[[int], Any]
) -> RecordFile | ParquetRecords:
  """Opens the files of one item by their format."""
  if paths[0].name.lower().endswith(PARQUET):
    return ParquetRecords(paths, step)
  return RecordFile(paths[0], step)


class Names:
  """Finds the names that the media of records have on disk.

  Attributes:
    media: the media folder, or None.
    store: the feature store, or None.
    images: names images that are in parquet files.
  """

  def __init__(
    self,
    media: pathlib.Path | None,
    store: FeatureStore | None,
    images: EmbeddedImages,
  ):
    """Opens nothing; see the attributes for the arguments."""
    self.media, self.store, self.images = media, store, images
    self._found = functools.lru_cache(1 << 16)(self._other_form)

  def find(self, name: str) -> str:
    """Returns the name in the Unicode form that the file has on disk.

    Unicode can write é as one character or as two. They look alike, but a name
    in a list made on one system is often not the name of the file on another.
    """
    return name if name.isascii() else self._found(name)

  def _other_form(self, name: str) -> str:
    """As `find`, for a name that is not ASCII."""
    if self.store is not None and name not in self.store:
      forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
      stored = [form for form in sorted(forms) if form in self.store]
      if len(stored) == 1:
        return stored[0]
    if self.media is None:
      return name
    return on_disk(self.media, name) or name


def jobs(files: Iterable[Input], names: Names) -> Iterator[Job]:
  """Yields the chosen conversations of all files.

  Args:
    files: as `open_inputs` returns them.
    names: finds the names of their media.

  Raises:
    UserError: images of a parquet file cannot be unpacked.
  """
  for file in files:
    found = itertools.compress(file.source, file.chosen)
    for where, raw in found:
      raw, repairs = _adapted(raw, where, file.item, names)
      yield Job(where, raw, file.item.stream, repairs=repairs)
    file.source.close()


def _adapted(
  raw: Any, where: str, item: Item, names: Names
) -> tuple[Any, tuple[str, ...]]:
  """Returns the record with its media's names on disk, and what was repaired.

  A record without a source gets the name of its file as the source.
  """
  if not isinstance(raw, dict):
    return raw, ()
  if raw.get("data_source") in (None, ""):
    raw["data_source"] = item.paths[0].name.split(".")[0]
  try:
    key = media_key(raw, where)
  except UserError:  # `parse_record` reports it
    return raw, ()
  modality = modality_of(key) if key is not None else None
  if key is None or modality is None:
    return raw, ()
  prefix = item.prefix(modality, str(raw["data_source"]))
  repairs = []

  def named(value: Any) -> Any:
    if isinstance(value, Embedded):
      return names.images.name(value)
    if not isinstance(value, str) or not value:
      return value
    path = posixpath.join(prefix, value) if prefix else value
    found = names.find(path)
    if found != path:
      repairs.append("name in another Unicode form")
    return found

  value = raw[key]
  many = isinstance(value, list) and not isinstance(value, Embedded)
  raw[key] = [named(v) for v in value] if many else named(value)
  return raw, tuple(dict.fromkeys(repairs))
