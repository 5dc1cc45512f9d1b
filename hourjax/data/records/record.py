"""Records: one question set about one video, image set or nothing.

A record is checked once, here; what follows on the data path may rely on it.
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
from hourjax.data.records.turns import MARKER, Turn, place_markers, read_turns
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
  """A checked record.

  Attributes:
    id: name of the record; numbers are turned into text.
    modality: what the record is about.
    media: paths as written in the file, relative to the media folder; one for
      a video, one or more for images, none for text.
    turns: human and gpt in turn, starting with human.
    source: the file's `data_source`, or "".
    extra: every key that has no meaning here, as read.
    repairs: in what it is read otherwise than it is written, one kind each;
      not stored.
  """

  id: str
  modality: Literal["video", "image", "text"]
  media: tuple[str, ...]
  turns: tuple[Turn, ...]
  source: str
  extra: dict[str, Any]
  repairs: tuple[str, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A record that is left out, and why; never replaced by another one."""

  id: str
  reason: str


def parse_record(
  raw: Any, where: str, *, require_answer: bool = True
) -> Record:
  """Checks one record as read from JSON (SPEC section 2).

  What LLaVA's lists and other trainers write differently is read as the
  official loaders read it: `record_turns` has the table, `record_media` the
  keys. A record without id is named after its place.

  Args:
    raw: {"id", "video" | "image" | neither, "data_source", "conversations"}.
    where: file and place, for messages.
    require_answer: training needs an answer to learn from; inference does not.

  Raises:
    UserError: naming `where`, the record and what is wrong with it.
  """
  if not isinstance(raw, dict):
    raise UserError(
      f"{where}: expected an object with 'id' and 'conversations', found "
      f"{type(raw).__name__}"
    )
  name, repairs = _name(raw, where)
  at = f"{where}: record {name}"
  key = media_key(raw, at)
  modality, media = read_media(raw, key, at) if key else ("text", ())
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
  """Keeps the records whose media are files under `root`.

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
    found = [problems[name] for name in record.media if problems[name]]
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
  """Why a path of a record is no file below the media folder, or None.

  A folder counts too: it may hold a video's frames. So do the images in a
  parquet file.
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
    # They look alike: what tells them apart is written out.
    path, but = ascii(path), f", but {', '.join(map(ascii, near))} does"
  elif path != path.strip() or name != name.strip() or not path.isprintable():
    path = repr(path)
  return f"{path} does not exist{but}; fetch it or correct the media root"


def on_disk(root: str | os.PathLike, name: str) -> str | None:
  """The name of a file below a folder, however its accents are written.

  Returns:
    `name` itself where it is there; else the one name that differs in nothing
    but the Unicode form of its characters; None where there is none, or more.
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
  return unicodedata.normalize("NFC", name)


def _key(name: str) -> str:
  """What names share that differ only in case, spaces or Unicode form."""
  return _form(name).strip().casefold()


@functools.lru_cache(16)
def _listing(folder: str) -> dict[str, tuple[str, ...]]:
  """The names in a folder, by `_key`."""
  names: dict[str, tuple[str, ...]] = {}
  with contextlib.suppress(OSError, ValueError):
    for name in sorted(os.listdir(folder)):
      names[_key(name)] = (*names.get(_key(name), ()), name)
  return names


def _near(path: str) -> list[str]:
  """What is there of almost that name: other case, spaces, ending, accents."""
  folder, name = os.path.split(path)
  names = _listing(folder)
  found = names.get(_key(name.rsplit("\\", 1)[-1]), ())
  if not found and not os.path.splitext(name)[1]:
    endings = (".mp4", ".mkv", ".webm", ".jpg", ".png")
    found = [n for e in endings for n in names.get(_key(name + e), ())]
  return list(found[:3])


def _name(raw: dict[str, Any], where: str) -> tuple[str, list[str]]:
  """The record's name, and what it was repaired by."""
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
