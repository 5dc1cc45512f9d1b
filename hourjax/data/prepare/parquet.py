"""Records in parquet files with their images, as on Hugging Face.

LLaVA-OneVision has columns id, image (bytes and a name), conversations and
data_source, and a folder of parquet files for each part. The images are
unpacked to files below the media folder, named by their content, or stay in the
parquet files and are read from there.
"""

import contextlib
import datetime
import decimal
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from hourjax.atomic_file import write_file
from hourjax.data.media import parquet_images
from hourjax.data.records.media_keys import modality_of
from hourjax.errors import UserError

FOLDER = "unpacked"  # below the media folder

_ROWS = 32  # rows that are read at a time, with their images
_ENDINGS = {
  b"\xff\xd8\xff": ".jpg",
  b"\x89PNG": ".png",
  b"GIF8": ".gif",
  b"BM": ".bmp",
  b"II*\0": ".tif",
  b"MM\0*": ".tif",
}


class Embedded(NamedTuple):
  """Holds an image inside a parquet file, and its place there."""

  content: bytes
  file: pathlib.Path
  column: str
  row: int
  position: int | None


class ParquetRecords:
  """Reads the records of parquet files that belong together, in order."""

  def __init__(self, paths: Sequence[pathlib.Path], step: Callable[[int], Any]):
    """Reads the numbers of rows.

    Args:
      paths: the files.
      step: called with the number of rows of each file.

    Raises:
      UserError: a file is not a parquet file.
    """
    self._paths, self._length = paths, 0
    for path in paths:
      with _reading(path), pyarrow.parquet.ParquetFile(path) as table:
        rows = table.metadata.num_rows
      self._length += rows
      step(rows)

  def __len__(self) -> int:
    return self._length

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    """Yields (place, raw record); images are `Embedded`."""
    for path in self._paths:
      row = 0
      # With pre_buffer, everything that was read stays in memory.
      with (
        _reading(path),
        pyarrow.parquet.ParquetFile(path, pre_buffer=False) as table,
      ):
        for batch in table.iter_batches(_ROWS, use_threads=False):
          for raw in batch.to_pylist():
            yield f"{path}[{row}]", _record(raw, path, row)
            row += 1

  def close(self) -> None:
    """Does nothing: there are no temporary files."""


class EmbeddedImages:
  """Names the images of records in parquet files, and unpacks them."""

  def __init__(self, media: pathlib.Path | None, how: str):
    """Reads and writes nothing yet.

    Args:
      media: the media folder.
      how: "unpack" images below it, or "keep" them in their files.
    """
    self._media, self._keep = media, how == "keep"
    self._checked: set[tuple] = set()

  def name(self, image: Embedded) -> str:
    """Returns the name of an image relative to the media folder.

    Unpacked files are named by their content and written at once, so that a
    second run finds them complete.

    Raises:
      UserError: there is no media folder, or it cannot be written.
    """
    if self._media is None:
      raise UserError(
        f"{image.file} holds images; give --media, the folder that they are"
        " unpacked to or, with --parquet_images=keep, that it lies in"
      )
    if self._keep:
      return self._inside(image, self._media.absolute())
    return self._unpacked(image, self._media)

  def _inside(self, image: Embedded, media: pathlib.Path) -> str:
    """Returns the name of an image that stays in its parquet file."""
    file = image.file.absolute()
    if not file.is_relative_to(media):
      raise UserError(
        f"{file} lies outside the media folder {media}, so that its images"
        " cannot stay there; move it, or give --parquet_images=unpack"
      )
    if (image.file, image.column) not in self._checked:
      parquet_images.check_groups(image.file, image.column)
      self._checked.add((image.file, image.column))
    return parquet_images.name_of(
      file.relative_to(media).as_posix(),
      image.column,
      image.row,
      image.position,
    )

  def _unpacked(self, image: Embedded, media: pathlib.Path) -> str:
    """Writes an image to a file unless it is there; returns its name."""
    digest = hashlib.blake2b(image.content, digest_size=16).hexdigest()
    name = f"{FOLDER}/{digest[:2]}/{digest[2:]}{_ending(image.content)}"
    path = media / name
    try:
      if not path.exists() or path.stat().st_size != len(image.content):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, image.content, several_writers=True)
    except OSError as error:
      raise UserError(
        f"cannot write {path}: {error.strerror}; free some space, or give"
        " --parquet_images=keep to leave the images in their files"
      ) from error
    return name


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
  """Translates errors of a parquet file into UserErrors that name it."""
  try:
    with open(path, "rb") as file:
      head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
      raise UserError(
        f"{path} is a Git-LFS pointer, not the file itself; fetch it with `git"
        " lfs pull`, or download it again"
      )
    yield
  except (pyarrow.ArrowException, OSError) as error:
    reason = getattr(error, "strerror", None) or str(error)
    raise UserError(
      f"cannot read {path} as parquet: {reason}; fetch it again"
    ) from error


def _record(raw: dict, path: pathlib.Path, row: int) -> dict[str, Any]:
  """Returns a row as a raw record, with `Embedded` images."""
  record = {}
  for key, value in raw.items():
    if modality_of(key) == "image":
      record[key] = _images(value, path, key, row)
    else:
      record[key] = _plain(value)
  if record.get("data_source") in (None, ""):
    # The folder names the source; train-00000-of-00001.parquet does not.
    record["data_source"] = path.absolute().parent.name
  return record


def _images(value: Any, path: pathlib.Path, column: str, row: int) -> Any:
  """Returns the image or images of a cell."""

  def one(part: Any, position: int | None) -> Any:
    content = part.get("bytes") if isinstance(part, dict) else part
    if isinstance(content, bytes):
      return Embedded(content, path, column, row, position)
    # Without bytes it is the name of a file.
    return part.get("path") if isinstance(part, dict) else part

  if isinstance(value, list):
    return [one(part, i) for i, part in enumerate(value)]
  return one(value, None)


def _plain(value: Any) -> Any:
  """Converts a value of parquet to one that JSON can hold."""
  if isinstance(value, dict):
    return {str(key): _plain(part) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(part) for part in value]
  if isinstance(value, bytes):
    # The ending lets `check_unread` recognise an image in an unread column.
    return f"{len(value)} bytes{_ending(value)}"
  if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
    return str(value)
  if isinstance(value, decimal.Decimal):
    return str(value)
  if isinstance(value, float) and not abs(value) < float("inf"):
    return None
  return value


def _ending(content: bytes) -> str:
  """Returns the file ending that the first bytes of an image imply."""
  if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
    return ".webp"
  found = (e for mark, e in _ENDINGS.items() if content.startswith(mark))
  return next(found, ".img")
