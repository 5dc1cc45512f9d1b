"""Records: conversations about one video, some images or nothing.

A record is checked once, here; the later steps of the data path rely on it.
"""

import contextlib
import dataclasses
import functools
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from hourjax.data.media import parquet_images
from hourjax.data.records.media_keys import check_unread, media_key, read_media
from hourjax.data.records.turns import (
  MARKER,
  REJECTED,
  Turn,
  joined_pair,
  place_markers,
  read_turns,
)
from hourjax.errors import UserError
from hourjax.schema import shorten

__all__ = ["MARKER", "Record", "Skipped", "Turn"]

TURNS = (  # keys, of which the first that is there counts
  "conversations",
  "messages",
  "conversation",
)
_KNOWN = ("id", "video", "image", "data_source", *TURNS)


@dataclasses.dataclass(frozen=True)
class Record:
  """Holds one checked record.

  Attributes:
    id: name of the record; numbers are turned into text.
    modality: what the record is about.
    media: paths as written in the file, relative to the media folder; one for
      a video, one or more for images, none for text.
    turns: of human and gpt; the first is of human.
    source: the record's `data_source`, or "".
    extra: all keys that hourjax does not read, with their values.
    repairs: the kinds of differences between the record as read and as
      written; not stored.
  """

  id: str
  modality: Literal["video", "image", "text"]
  media: tuple[str, ...]
  turns: tuple[Turn, ...]
  source: str
  extra: dict[str, Any]
  repairs: tuple[str, ...] = dataclasses.field(default=(), compare=False)

  @property
  def rejected(self) -> str | None:
    """Returns the answer that the last one is preferred to; None without."""
    found = self.extra.get(REJECTED)
    return found if isinstance(found, str) else None


@dataclasses.dataclass(frozen=True)
class Skipped:
  """Names a record that is left out, and the reason.

  It is not replaced by another record.
  """

  id: str
  reason: str


def parse_record(
  raw: Any, where: str, *, require_answer: bool = True
) -> Record:
  """Checks one record as read from JSON, see hourjax/README.md, Conversations.

  Records in the form of LLaVA's lists and of other trainers are read as the
  official loaders read them: `turns.py` has the table of differences, and
  `media_keys.py` the keys. A record without id is named after its place.

  Args:
    raw: {"id", "video" | "image" | neither, "data_source", "conversations"}.
    where: file and place, for messages.
    require_answer: whether a record without an answer is refused, as it is in
      training and not in inference.

  Raises:
    UserError: with `where`, the name of the record, and its fault.
  """
  if not isinstance(raw, dict):
    raise UserError(
      f"{where}: expected an object with 'id' and 'conversations', found "
      f"{type(raw).__name__}"
    )
  name, repairs = _name(raw, where)
  at = f"{where}: record {name}"
  raw = joined_pair(raw, TURNS, at)
  key = media_key(raw, at)
  modality: Literal["video", "image", "text"] = "text"
  media: tuple[str, ...] = ()
  if key:
    modality, media = read_media(raw, key, at)
  if key not in (None, "video", "image"):
    repairs.append(f"{modality} under another key")
  elif raw.get("image") == "":
    repairs.append("empty image: text")
  talk = next((k for k in TURNS if raw.get(k) is not None), TURNS[0])
  known = (*_KNOWN, "sample_id", *((key,) if key else ()))
  check_unread(raw, known, not key, at)
  turns, changed = read_turns(raw.get(talk), at, require_answer=require_answer)
  repairs += changed
  turns, changed = place_markers(turns, modality, len(media), at)
  repairs += changed
  if isinstance(raw.get(REJECTED), str) and turns[-1].role != "gpt":
    raise UserError(
      f"{at}: a rejected answer, and the last turn is from {turns[-1].role};"
      " add the answer that is preferred to it"
    )
  source = raw.get("data_source")
  return Record(
    id=name,
    modality=modality,
    media=media,
    turns=tuple(turns),
    source="" if source is None else str(source),
    extra={k: v for k, v in raw.items() if k not in known},
    repairs=tuple(repairs),
  )


def check_media(
  records: Iterable[Record], root: str | os.PathLike
) -> tuple[list[Record], list[Skipped]]:
  """Keeps the records whose media are files below the media folder.

  Args:
    records: checked.
    root: the media folder.

  Returns:
    The records that are kept, and the others with the reason.

  Raises:
    UserError: `root` is not a folder.
  """
  check_root(root)
  problems: dict[str, str | None] = {}  # many records share one video
  kept, skipped = [], []
  for record in records:
    for name in record.media:
      if name not in problems:
        problems[name] = media_problem(root, name)
    found = [text for name in record.media if (text := problems[name])]
    if found:
      reason = f"record {record.id}: {'; '.join(found)}"
      skipped.append(Skipped(record.id, reason))
    else:
      kept.append(record)
  return kept, skipped


def check_root(root: str | os.PathLike) -> None:
  """Raises a UserError if the media folder is no folder."""
  if not os.path.isdir(root):
    raise UserError(f"media folder {root} does not exist; set the media root")


def media_problem(root: str | os.PathLike, name: str) -> str | None:
  """Returns why a record's path names no medium below a folder, or None.

  A medium is a file, a folder, which may hold a video's frames, or an image
  inside a parquet file.

  Args:
    root: the media folder.
    name: path as written in the record.
  """
  base = os.path.normpath(root)
  path = os.path.normpath(os.path.join(base, name))
  if "://" in name:
    return f"{name} is a URL; download it and write its path"
  # Absolute, as "../a" is below "." by its name.
  if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(base)):
    return f"{name} lies outside the media folder {root}"
  if os.path.exists(path) or parquet_images.inside(path):
    return None
  near = _near(path)
  but = f", but {', '.join(near)} does" if near else ""
  if any(_form(other) == _form(os.path.basename(path)) for other in near):
    # The names look alike, so the characters that differ are written as codes.
    path, but = ascii(path), f", but {', '.join(map(ascii, near))} does"
  elif path != path.strip() or name != name.strip() or not path.isprintable():
    path = repr(path)
  return f"{path} does not exist{but}; fetch it or correct the media root"


def on_disk(root: str | os.PathLike, name: str) -> str | None:
  """Finds a file below a folder by its name in any Unicode form.

  Args:
    root: the folder.
    name: path relative to it, with "/".

  Returns:
    `name` itself if that file exists; otherwise the only path that differs just
    in the Unicode form of its characters; None if there is no such path, or
    more than one.
  """
  if os.path.exists(os.path.join(root, name)):
    return name
  found = ""
  for part in name.split("/"):
    folder = os.path.join(root, found)
    if part and not os.path.exists(os.path.join(folder, part)):
      same = _listing(folder).get(_key(part), ())
      same = [n for n in same if _form(n) == _form(part)]
      if len(same) != 1:
        return None
      part = same[0]
    found = f"{found}/{part}" if found else part
  return found


def _form(name: str) -> str:
  """Returns a name in Unicode's composed form."""
  return unicodedata.normalize("NFC", name)


def _key(name: str) -> str:
  """Returns a key shared by names of other case, spaces or Unicode form."""
  return _form(name).strip().casefold()


@functools.lru_cache(16)
def _listing(folder: str) -> dict[str, tuple[str, ...]]:
  """Lists the names in a folder, by `_key`."""
  names: dict[str, tuple[str, ...]] = {}
  with contextlib.suppress(OSError, ValueError):
    for name in sorted(os.listdir(folder)):
      names[_key(name)] = (*names.get(_key(name), ()), name)
  return names


def _near(path: str) -> list[str]:
  """Finds names of other case, spaces, ending or accents in the folder."""
  folder, name = os.path.split(path)
  names = _listing(folder)
  found = names.get(_key(name.rsplit("\\", 1)[-1]), ())
  if not found and not os.path.splitext(name)[1]:
    endings = (".mp4", ".mkv", ".webm", ".jpg", ".png")
    found = [n for e in endings for n in names.get(_key(name + e), ())]
  return list(found[:3])


def _name(raw: dict[str, Any], where: str) -> tuple[str, list[str]]:
  """Returns the record's name, and the repairs it needed."""
  for key in ("id", "sample_id"):
    name = raw.get(key)
    if name is None or name == "":
      continue
    if isinstance(name, bool) or not isinstance(name, str | int | float):
      raise UserError(
        f"{where}: {key!r} must be text or a number, found {shorten(name)}"
      )
    return str(name), ["sample_id as id"] if key != "id" else []
  # The place in its file, which stays the same wherever the file lies.
  return os.path.basename(where), ["no id: numbered"]
