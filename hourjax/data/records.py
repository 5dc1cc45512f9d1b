"""Records: one question set about one video, image set or nothing.

A record is checked once, here; what follows on the data path may rely on it.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from hourjax.errors import UserError

MARKER = "<image>"  # where the text refers to what is seen

_KNOWN = ("id", "video", "image", "data_source", "conversations")


@dataclasses.dataclass(frozen=True)
class Turn:
  """What one side says."""

  role: Literal["human", "gpt"]
  text: str


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
  """

  id: str
  modality: Literal["video", "image", "text"]
  media: tuple[str, ...]
  turns: tuple[Turn, ...]
  source: str
  extra: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A record that is left out, and why; never replaced by another one."""

  id: str
  reason: str


def parse_record(
  raw: Any, where: str, *, require_answer: bool = True
) -> Record:
  """Checks one record as read from JSON (SPEC section 2).

  A leading gpt turn is dropped. In image records a turn's only marker moves
  to the front of the turn:

    "What is this?\\n<image>"  ->  "<image>\\nWhat is this?"

  Turns with several markers stay as they are, and so do video records: there
  `encode_conversation` writes the marker, before the time instruction.

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
  name = _name(raw, where)
  at = f"{where}: record {name}"
  modality, media = _media(raw, at)
  turns = _turns(raw.get("conversations"), at)
  if require_answer:
    _check_answers(turns, at)
  _check_markers(turns, modality, len(media), at)
  if modality == "image":
    turns = tuple(Turn(t.role, _marker_first(t.text)) for t in turns)
  source = raw.get("data_source")
  return Record(
    id=name,
    modality=modality,
    media=media,
    turns=turns,
    source="" if source is None else str(source),
    extra={k: v for k, v in raw.items() if k not in _KNOWN},
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
  """Why a path of a record is no file below the media folder, or None."""
  base = os.path.normpath(root)
  path = os.path.normpath(os.path.join(base, name))
  if not Path(path).is_relative_to(base):
    return f"{name} lies outside the media folder {root}"
  if not os.path.isfile(path):
    return f"{path} does not exist; fetch it or correct the media root"
  return None


def _name(raw: dict[str, Any], where: str) -> str:
  name = raw.get("id")
  if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
    raise UserError(f"{where}: 'id' must be text or an integer, found {name!r}")
  return str(name)


def _media(raw: dict[str, Any], at: str) -> tuple[str, tuple[str, ...]]:
  given = [k for k in ("video", "image") if raw.get(k) is not None]
  if not given:
    return "text", ()
  if len(given) == 2:
    raise UserError(
      f"{at}: has both 'video' ({raw['video']!r}) and 'image' "
      f"({raw['image']!r}); keep one"
    )
  key = given[0]
  value = raw[key]
  paths = value if isinstance(value, list) else [value]
  if not paths or not all(isinstance(p, str) and p for p in paths):
    raise UserError(
      f"{at}: {key!r} must be a path or a list of paths, found {value!r}"
    )
  if key == "video" and len(paths) != 1:
    raise UserError(f"{at}: {len(paths)} videos, 1 expected; split the record")
  return key, tuple(paths)


def _turns(conversations: Any, at: str) -> tuple[Turn, ...]:
  if not isinstance(conversations, list) or not conversations:
    raise UserError(
      f"{at}: 'conversations' must be a non-empty list, found {conversations!r}"
    )
  for i, raw in enumerate(conversations):
    if not isinstance(raw, dict) or not isinstance(raw.get("value"), str):
      raise UserError(
        f"{at}: turn {i} must be {{'from': ..., 'value': text}}, found {raw!r}"
      )
  start = 1 if conversations[0].get("from") == "gpt" else 0
  if len(conversations) == start:
    raise UserError(f"{at}: only one gpt turn; a human turn must come first")
  turns = []
  for i, raw in enumerate(conversations[start:]):
    expected = ("human", "gpt")[i % 2]
    if raw.get("from") != expected:
      raise UserError(
        f"{at}: turn {i + start} is from {raw.get('from')!r}, expected "
        f"{expected!r}; human and gpt must alternate"
      )
    turns.append(Turn(expected, raw["value"]))
  return tuple(turns)


def _check_answers(turns: tuple[Turn, ...], at: str) -> None:
  if turns[-1].role != "gpt":
    raise UserError(f"{at}: the last turn is from human; add its gpt answer")
  if not any(t.text.strip() for t in turns if t.role == "gpt"):
    raise UserError(f"{at}: all {len(turns) // 2} gpt answers are empty")


def _check_markers(
  turns: tuple[Turn, ...], modality: str, media: int, at: str
) -> None:
  if any(MARKER in t.text for t in turns if t.role == "gpt"):
    raise UserError(f"{at}: {MARKER} in a gpt answer; only questions may see")
  found = sum(t.text.count(MARKER) for t in turns)
  if found != media:
    what = {"video": "video", "image": "image(s)", "text": "media"}[modality]
    raise UserError(
      f"{at}: {found} {MARKER} marker(s) but {media} {what}; give every one "
      "of them exactly one marker in a human turn"
    )


def _marker_first(text: str) -> str:
  if text.count(MARKER) != 1 or text.startswith(MARKER):
    return text
  # Stripped as a whole, so that an empty question leaves no newline.
  return f"{MARKER}\n{text.replace(MARKER, '').strip()}".strip()
