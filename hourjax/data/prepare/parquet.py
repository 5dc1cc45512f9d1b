"""Records in parquet files, with their images, as Hugging Face has them.

Of LLaVA-OneVision: columns id, image (its bytes and a name), conversations and
data_source, in a folder of parquet files for each part. The images are unpacked
to files below the media folder, named by their content, or stay where they are
and are read from there.
"""

import contextlib
import datetime
import decimal
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet

from hourjax.atomic_file import write_file
from hourjax.data.media import parquet_images
from hourjax.data.records.media_keys import modality_of
from hourjax.errors import UserError

FOLDER = "unpacked"  # below the media folder

_ROWS = 32  # read at a time, with their images
_ENDINGS = {
  b"\xff\xd8\xff": ".jpg",
  b"\x89PNG": ".png",
  b"GIF8": ".gif",
  b"BM": ".bmp",
  b"II*\0": ".tif",
  b"MM\0*": ".tif",
}


class Embedded(NamedTuple):
  """An image inside a parquet file."""

  content: bytes
  file: pathlib.Path
  column: str
  row: int
  position: int | None


class ParquetRecords:
  """The records of parquet files that belong together, in their order."""

  def __init__(self, paths: Sequence[pathlib.Path], step: Callable[[int], Any]):
    """Reads what the files say of themselves.

    Args:
      paths: of the files.
      step: called with a number of rows.

    Raises:
      UserError: a file is no parquet file.
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
      # With pre_buffer, all that has been read stays in memory.
      with (
        _reading(path),
        pyarrow.parquet.ParquetFile(path, pre_buffer=False) as table,
      ):
        for batch in table.iter_batches(_ROWS, use_threads=False):
          for raw in batch.to_pylist():
            yield f"{path}[{row}]", _record(raw, path, row)
            row += 1

  def close(self) -> None:
    pass


class Pictures:
  """Gives the images of records that are in parquet files their names."""

  def __init__(
    self, media: pathlib.Path | None, how: Literal["unpack", "keep"]
  ):
    """Touches nothing yet.

    Args:
      media: the media folder.
      how: whether images are unpacked below it or stay where they are.
    """
    self._media, self._keep = media, how == "keep"
    self._checked: set[tuple] = set()

  def name(self, image: Embedded) -> str:
    """The name of an image, relative to the media folder.

    Unpacked files are named by their content: a second run finds them there,
    and a file is whole or not there at all.

    Raises:
      UserError: no media folder, or it cannot be written.
    """
    if self._media is None:
      raise UserError(
        f"{image.file} holds images; give --media, the folder that they are"
        " unpacked to or, with --parquet_images=keep, that it lies in"
      )
    return self._inside(image) if self._keep else self._unpacked(image)

  def _inside(self, image: Embedded) -> str:
    media, file = self._media.absolute(), image.file.absolute()
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

  def _unpacked(self, image: Embedded) -> str:
    digest = hashlib.blake2b(image.content, digest_size=16).hexdigest()
    name = f"{FOLDER}/{digest[:2]}/{digest[2:]}{_ending(image.content)}"
    path = self._media / name
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
  """Turns what goes wrong with a file into a UserError that names it."""
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
  record = {}
  for key, value in raw.items():
    if modality_of(key) == "image":
      record[key] = _images(value, path, key, row)
    else:
      record[key] = _plain(value)
  if record.get("data_source") in (None, ""):
    # train-00000-of-00001.parquet tells nothing, its folder does.
    record["data_source"] = path.absolute().parent.name
  return record


def _images(value: Any, path: pathlib.Path, column: str, row: int) -> Any:
  def one(part: Any, position: int | None) -> Any:
    content = part.get("bytes") if isinstance(part, dict) else part
    if isinstance(content, bytes):
      return Embedded(content, path, column, row, position)
    # No bytes: the name of a file beside.
    return part.get("path") if isinstance(part, dict) else part

  if isinstance(value, list):
    return [one(part, i) for i, part in enumerate(value)]
  return one(value, None)


def _plain(value: Any) -> Any:
  """A value as JSON has it."""
  if isinstance(value, dict):
    return {str(key): _plain(part) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(part) for part in value]
  if isinstance(value, bytes):
    # Recognised by `check_unread` where it is a picture.
    return f"{len(value)} bytes{_ending(value)}"
  if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
    return str(value)
  if isinstance(value, decimal.Decimal):
    return str(value)
  if isinstance(value, float) and not abs(value) < float("inf"):
    return None
  return value


def _ending(content: bytes) -> str:
  if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
    return ".webp"
  found = (e for mark, e in _ENDINGS.items() if content.startswith(mark))
  return next(found, ".img")
