"""The prepared dataset: checked conversations, and what planning needs.

    FOLDER/hourjax-train.array_record-*   conversations, as TFDS writes them
    FOLDER/dataset_info.json, features.json
    FOLDER/columns.npz                    `Columns`: token counts and the like
    FOLDER/about.json                     what the dataset was made of

`tfds.builder_from_directory(FOLDER).as_data_source("train")` opens it, and so
does Grain. A folder ROOT/NAME/1.0.0 is opened by name too:
`tfds.data_source("NAME", data_dir="ROOT")`. TensorFlow is never imported.
"""

import contextlib
import json
import operator
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_info

from hourjax.data.columns import Columns, ColumnsBuilder, Measures
from hourjax.data.example import decode_record, encode_record, features
from hourjax.data.records import Record
from hourjax.errors import UserError

FORMAT = 2  # changes with the layout above
SHARD = 50_000  # conversations a file

_NAME, _SPLIT, _VERSION = "hourjax", "train", "1.0.0"
_ABOUT, _COLUMNS = "about.json", "columns.npz"


class PreparedWriter:
  """Writes a prepared dataset; it appears under its name when complete.

  A context manager. What an interrupted run leaves lies in `partial`, a
  hidden folder beside, and is removed by the next run.

  Attributes:
    partial: where the dataset is until then; more files may be put there.
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
    self._file, self._shards, self._bytes = None, [], 0
    try:
      shutil.rmtree(self.partial, ignore_errors=True)
      self.partial.mkdir(parents=True)
    except OSError as error:
      raise UserError(
        f"cannot make {self.partial}: {error.strerror}; choose another folder"
      ) from error

  def __enter__(self) -> "PreparedWriter":
    return self

  def __exit__(self, kind, error, trace) -> None:
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
    pictures: int = 0,
  ) -> None:
    """Adds a conversation; the arguments are those of `encode_record`."""
    facts = {"stream": stream, "duration": duration, "pictures": pictures}
    video = record.media[0] if record.modality == "video" else None
    encoded = encode_record(record, measures, **facts)
    self.add_encoded(encoded, measures, record.source, video=video, **facts)

  def add_encoded(
    self,
    encoded: bytes,
    measures: Measures,
    source: str,
    stream: str,
    video: str | None,
    duration: float | None,
    pictures: int,
  ) -> None:
    """Adds a conversation that `encode_record` has serialised."""
    with self._writing():
      if not self._shards or self._shards[-1] == SHARD:
        self._next_shard()
      self._file.write(encoded)
    self._shards[-1] += 1
    self._bytes += len(encoded)
    self._columns.add(measures, source, stream, video, duration, pictures)

  def columns(self) -> Columns:
    """The columns of all conversations so far."""
    return self._columns.build()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
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

  def _next_shard(self) -> None:
    self._close_shard()
    path = self.partial / f"shard-{len(self._shards)}"
    # Single records can be read only where each is a group of its own.
    self._file = array_record_module.ArrayRecordWriter(
      str(path), "group_size:1"
    )
    self._shards.append(0)

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
    self.columns().save(self.partial / _COLUMNS)
    about = {"format": FORMAT, "conversations": sum(self._shards)}
    text = json.dumps(about | self._about, indent=1, ensure_ascii=False)
    (self.partial / _ABOUT).write_text(text, encoding="utf-8")
    replaced = self.folder.with_name(f".{self.folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if self.folder.exists():
      self.folder.rename(replaced)
    self.partial.rename(self.folder)
    shutil.rmtree(replaced, ignore_errors=True)


class Prepared:
  """A prepared dataset.

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
      UserError: nothing there, incomplete, or of another version.
    """
    self.folder = pathlib.Path(folder)
    self.about = _read_about(self.folder)
    self.columns = Columns.load(self.folder / _COLUMNS)
    self.records: Sequence[Record] = _Records(self.folder)
    counts = (self.about["conversations"], len(self.columns), len(self.records))
    if len(set(counts)) != 1:
      raise UserError(
        f"{self.folder} has {counts[2]} conversations in its files,"
        f" {counts[1]} in {_COLUMNS} and {counts[0]} in {_ABOUT}; run"
        " `python -m hourjax.prepare` again"
      )

  def __len__(self) -> int:
    return len(self.columns)


class _Records(Sequence):
  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    try:
      builder = tfds.builder_from_directory(folder)
      self._source = builder.as_data_source(_SPLIT)
      self._length = len(self._source)
    except Exception as error:  # of many kinds, some bare
      raise UserError(
        f"{folder} cannot be opened as a TFDS dataset ({error}); run"
        " `python -m hourjax.prepare` again"
      ) from error

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: SupportsIndex) -> Record:
    at = operator.index(index)
    at += self._length if at < 0 else 0
    if not 0 <= at < self._length:
      raise IndexError(f"record {index} of {self._length}")
    try:
      example = self._source[at]
    except Exception as error:  # the library raises bare ones
      raise UserError(
        f"conversation {at} of {self._folder} cannot be read ({error}); run"
        " `python -m hourjax.prepare` again"
      ) from error
    return decode_record(example)


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
  try:
    about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    found = about["format"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{folder} is no prepared dataset ({_ABOUT}: {error}); run"
      f" `python -m hourjax.prepare --out={folder}` or correct the folder",
      kind="missing",
    ) from None
  if found != FORMAT:
    raise UserError(
      f"{folder} has format {found}, this code reads {FORMAT}; run `python -m"
      " hourjax.prepare` again"
    )
  return about
