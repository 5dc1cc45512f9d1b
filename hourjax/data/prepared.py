"""The prepared dataset: checked conversations, and what planning needs.

    FOLDER/hourjax-train.array_record-*   conversations, as TFDS writes them
    FOLDER/dataset_info.json, features.json
    FOLDER/columns.npz                    `Columns`: token counts and the like
    FOLDER/about.json                     what the dataset was made of

`tfds.builder_from_directory(FOLDER).as_data_source("train")` opens it, and so
does Grain. A folder ROOT/NAME/1.0.0 is opened by name too:
`tfds.data_source("NAME", data_dir="ROOT")`. TensorFlow is never imported.

TFDS imports the Python classes that features.json names, from wherever Python
finds them, so a folder from a stranger may run code. `Prepared` does not: it
reads with the features of `example`, compares the file with them as text, and
takes nothing else from it.
"""

import contextlib
import dataclasses
import json
import operator
import os
import pathlib
import shutil
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import pydantic
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source, array_record_module
from tensorflow_datasets.core import dataset_info

from hourjax import schema
from hourjax.data.columns import MODALITIES, Columns, ColumnsBuilder, Measures
from hourjax.data.records.example import (
  NUMBERS,
  decode_record,
  encode_record,
  features,
  features_json,
  parse_example,
)
from hourjax.data.records.record import Record
from hourjax.errors import UserError

FORMAT = 2  # changes with the layout above
SHARD = 50_000  # conversations a file

_NAME, _SPLIT, _VERSION = "hourjax", "train", "1.0.0"
_ABOUT, _COLUMNS = "about.json", "columns.npz"
_FEATURES, _INFO = "features.json", "dataset_info.json"
_AGAIN = "run `python -m hourjax.prepare` again"


class PreparedWriter:
  """Writes a prepared dataset, which appears under its name when complete.

  A context manager. What an interrupted run leaves lies in `partial`, a
  hidden folder beside, and is removed by the next run.

  Attributes:
    partial: where the dataset is until then; more files may be put there.
    held_out: whether each conversation is held out, to be set before the end;
      None where nothing is.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    tokenizer_id: str,
    about: dict[str, Any] | None = None,
  ):
    """Starts an empty dataset.

    Args:
      folder: of the dataset; an older one there is replaced at the end.
      tokenizer_id: `Tokenizer.fingerprint` of the tokenizer that counted.
      about: what else the dataset was made of, JSON values only.

    Raises:
      UserError: the folder cannot be made.
    """
    self.folder = pathlib.Path(folder).absolute()
    self.partial = self.folder.with_name(f".{self.folder.name}.partial")
    self._about = {"tokenizer_id": tokenizer_id, **(about or {})}
    self._columns = ColumnsBuilder()
    self._file: Any = None
    self._shards: list[int] = []  # conversations in each file
    self._bytes = 0
    self.held_out: np.ndarray | None = None
    try:
      shutil.rmtree(self.partial, ignore_errors=True)
      self.partial.mkdir(parents=True)
    except OSError as error:
      raise UserError(
        f"cannot make {self.partial}: {error.strerror}; choose another folder"
      ) from error

  def __enter__(self) -> "PreparedWriter":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    try:
      with self._writing():
        self._close_shard()
        if kind is None:
          self._finish()
    except UserError:
      if kind is None:
        raise  # else what went wrong first is what matters
    finally:
      shutil.rmtree(self.partial, ignore_errors=True)

  def add(
    self,
    record: Record,
    measures: Measures,
    *,
    stream: str = "default",
    duration: float | None = None,
    num_frames: int = 0,
    fps: float | None = None,
  ) -> None:
    """Adds a conversation.

    Args:
      record: checked.
      measures: of `measure_record`.
      stream: name of its stream.
      duration: of its video in seconds; None where it is not known.
      num_frames: in the video's file; 0 where it is not known.
      fps: average frames a second of the file; None where they are not known.
    """
    video = record.media[0] if record.modality == "video" else None
    encoded = encode_record(
      record, measures, stream=stream, duration=duration, frames=num_frames
    )
    self.add_encoded(
      encoded, measures, record.source, stream, video, duration, num_frames, fps
    )

  def add_encoded(
    self,
    encoded: bytes,
    measures: Measures,
    source: str,
    stream: str,
    video: str | None,
    duration: float | None,
    num_frames: int,
    fps: float | None = None,
  ) -> None:
    """Adds a conversation that `encode_record` has serialised; see `add`."""
    with self._writing():
      file = self._file
      if file is None or self._shards[-1] == SHARD:
        file = self._next_shard()
      file.write(encoded)
    self._shards[-1] += 1
    self._bytes += len(encoded)
    self._columns.add(
      measures, source, stream, video, duration, num_frames, fps
    )

  def columns(self) -> Columns:
    """Returns the columns of all conversations so far."""
    columns = self._columns.build()
    if self.held_out is None:
      return columns
    return dataclasses.replace(columns, held_out=self.held_out.astype(np.uint8))

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns what writing raises into a UserError."""
    try:
      yield
    except (OSError, RuntimeError) as error:  # array_record raises the second
      raise UserError(
        f"cannot write {self.partial}: {error}; free some space or choose"
        " another folder"
      ) from error

  def _close_shard(self) -> None:
    file, self._file = self._file, None
    if file is not None:
      file.close()

  def _next_shard(self) -> Any:
    """Opens the next file of conversations and returns it."""
    self._close_shard()
    path = self.partial / f"shard-{len(self._shards)}"
    # Single records can be read only where each is a group of its own.
    self._file = array_record_module.ArrayRecordWriter(
      str(path), "group_size:1"
    )
    self._shards.append(0)
    return self._file

  def _finish(self) -> None:
    if not self._shards:
      raise UserError(f"{self.folder} would hold no conversation; add some")
    identity = dataset_info.DatasetIdentity(
      name=_NAME,
      version=tfds.core.Version(_VERSION),
      data_dir=str(self.partial),
      module_name=_NAME,
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features())
    info.set_file_format("array_record")
    split = tfds.core.SplitInfo(
      name=_SPLIT, shard_lengths=self._shards, num_bytes=self._bytes
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    names = info.splits[_SPLIT].filenames
    for number, name in enumerate(sorted(names)):
      (self.partial / f"shard-{number}").rename(self.partial / name)
    info.write_to_directory(self.partial)
    columns = self.columns()
    columns.save(self.partial / _COLUMNS)
    about = {"format": FORMAT, "conversations": len(columns)}
    if held_out := int(columns.held_out.sum(dtype=np.int64)):
      about["held_out"] = held_out
    text = json.dumps(about | self._about, indent=1, ensure_ascii=False)
    (self.partial / _ABOUT).write_text(text, encoding="utf-8")
    replaced = self.folder.with_name(f".{self.folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if self.folder.exists():
      self.folder.rename(replaced)
    self.partial.rename(self.folder)
    shutil.rmtree(replaced, ignore_errors=True)


class Prepared:
  """Reads a prepared dataset.

  Attributes:
    folder: where it lies.
    about: what it was made of; `tokenizer_id` among it.
    columns: numbers of all conversations, in their order.
    records: the conversations; random access, nothing is kept in memory,
      and several threads may read.
  """

  def __init__(self, folder: str | os.PathLike):
    """Opens a dataset.

    Raises:
      UserError: nothing there, incomplete, damaged, of another version, or of
        other features.
    """
    self.folder = pathlib.Path(folder)
    self.about = _read_about(self.folder)
    _check_features(self.folder / _FEATURES)
    self.columns = Columns.load(self.folder / _COLUMNS)
    self.records: Sequence[Record] = _Records(self.folder, self.columns)
    counts = (self.about["conversations"], len(self.columns), len(self.records))
    if len(set(counts)) != 1:
      raise UserError(
        f"{self.folder} has {counts[2]} conversations in its files,"
        f" {counts[1]} in {_COLUMNS} and {counts[0]} in {_ABOUT}; {_AGAIN}"
      )
    held_out = int(self.columns.held_out.sum(dtype=np.int64))
    if held_out != self.about.get("held_out", 0):
      raise UserError(
        f"{self.folder} has {held_out} held-out conversations in {_COLUMNS} and"
        f" {self.about.get('held_out', 0)} in {_ABOUT}; {_AGAIN}"
      )

  def __len__(self) -> int:
    return len(self.columns)


@dataclasses.dataclass
class _Part:
  """Describes a file of conversations as the library wants it."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


class _Records(Sequence[Record]):
  """Gives records by index; each is read, and checked against the columns."""

  def __init__(self, folder: pathlib.Path, columns: Columns):
    self._folder, self._columns = folder, columns
    parts = _parts(folder)
    self._source = array_record_data_source.ArrayRecordDataSource(parts)
    self._length = sum(part.take for part in parts)

  def __len__(self) -> int:
    return self._length

  # Slices are never asked for.
  def __getitem__(  # pyrefly: ignore[bad-override]
    self, index: SupportsIndex
  ) -> Record:
    at = operator.index(index)
    at += self._length if at < 0 else 0
    if not 0 <= at < self._length:
      raise IndexError(f"record {index} of {self._length}")
    try:
      example = parse_example(self._source[at])
      record = decode_record(example)
    except Exception as error:  # the libraries raise bare ones
      raise UserError(
        f"conversation {at} of {self._folder} cannot be read ({error});"
        f" {_AGAIN}"
      ) from error
    for name, here, there in _both(example, record, self._columns, at):
      if here != there:
        raise UserError(
          f"conversation {at} of {self._folder} has {name}"
          f" {schema.shorten(here)} in its file and {schema.shorten(there)} in"
          f" {_COLUMNS}: they belong to different datasets; {_AGAIN}"
        )
    return record


def _both(
  example: Mapping[str, Any], record: Record, columns: Columns, at: int
) -> Iterator[tuple[str, Any, Any]]:
  """Yields (name, value in the file, value in the columns)."""
  yield "modality", record.modality, MODALITIES[columns.modality[at]]
  yield "source", record.source, columns.sources[columns.source[at]]
  if record.modality == "video":
    yield "media", record.media, (columns.videos[columns.video[at]],)
  else:
    yield "media", bool(record.media), record.modality == "image"
  for name in NUMBERS:
    yield name, int(example[name]), int(getattr(columns, name)[at])


class _About(schema.Schema):
  """Describes what the rest of the code relies on in about.json."""

  format: int
  conversations: int
  held_out: int = 0
  tokenizer_id: str
  options: dict[str, Any] = pydantic.Field(default_factory=dict)


class _Split(schema.Schema):
  name: str
  lengths: list[str] = pydantic.Field(alias="shardLengths")


class _Info(schema.Schema):
  """Describes what is read of dataset_info.json.

  This is a message of TFDS in proto3's JSON.
  """

  file_format: str = pydantic.Field(alias="fileFormat")
  splits: list[_Split]


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / _ABOUT
  remedy = (
    f"run `python -m hourjax.prepare --out={folder}` or correct the folder"
  )
  try:
    about = schema.read_json(path, remedy=remedy)
    found = about["format"] if isinstance(about, dict) else None
    if type(found) is int and found != FORMAT:
      raise UserError(
        f"{folder} has format {found}, this code reads {FORMAT}; {_AGAIN}"
      )
    schema.validate(_About, about, _ABOUT, remedy=remedy)
  except (UserError, KeyError) as error:
    raise UserError(
      f"{folder} is no prepared dataset ({error})", kind="missing"
    ) from None
  return about


def _check_features(path: pathlib.Path) -> None:
  """Compares features.json, as text, with that of this package.

  TFDS would import the classes that it names.
  """
  found = schema.read_json(path, remedy=_AGAIN)
  wanted = features_json()
  if found != wanted:
    where, there, here = _difference(found, wanted)
    raise UserError(
      f"{path} does not describe the features that hourjax writes: {where} is"
      f" {schema.shorten(there)}, not {schema.shorten(here)} (a class that it"
      f" names was not imported); {_AGAIN}, or do not trust its source"
    )


def _difference(found: Any, wanted: Any) -> tuple[str, Any, Any]:
  """Returns the place where two JSON values first differ, and both values."""
  names: list[str] = []
  while isinstance(found, dict) and isinstance(wanted, dict):
    key = min(k for k in {**wanted, **found} if found.get(k) != wanted.get(k))
    names.append(key)
    found, wanted = found.get(key), wanted.get(key)
  return ".".join(names) or "the whole", found, wanted


def _parts(folder: pathlib.Path) -> list[_Part]:
  """Lists the files of a dataset, with the number of conversations in each.

  Their names follow from their number; those in dataset_info.json might lead
  anywhere.
  """
  path = folder / _INFO
  info = schema.read_schema(_Info, path, remedy=_AGAIN)
  found = [split for split in info.splits if split.name == _SPLIT]
  if info.file_format != "array_record" or len(found) != 1:
    names = ", ".join(split.name for split in info.splits)
    raise UserError(
      f"{path} tells of the splits {names} as {info.file_format}, not of"
      f" {_SPLIT} as array_record; {_AGAIN}"
    )
  lengths, parts = found[0].lengths, []
  for number, length in enumerate(lengths):
    name = f"{_NAME}-{_SPLIT}.array_record-{number:05}-of-{len(lengths):05}"
    count = _count(folder, name)
    if str(count) != length:
      raise UserError(
        f"{folder / name} holds {count} conversations, {_INFO} says"
        f" {schema.shorten(length)}; {_AGAIN}"
      )
    parts.append(_Part(str(folder / name), 0, count, count))
  if not parts:
    raise UserError(f"{path} tells of no file; {_AGAIN}")
  return parts


def _count(folder: pathlib.Path, name: str) -> int:
  """Returns the number of conversations in a file, from its last bytes."""
  schema.check_file(folder / name, remedy=_AGAIN)
  try:
    reader = array_record_module.ArrayRecordReader(str(folder / name))
    with contextlib.closing(reader):  # which raises what was found before
      return reader.num_records()
  except Exception as error:  # of many kinds, some bare
    raise UserError(
      f"the conversations of {folder} cannot be read ({name}: {error});"
      f" {_AGAIN}"
    ) from error
