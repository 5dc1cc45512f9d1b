"""Keys of a record that name its video or images.

`video` and `image` are the keys of LLaVA and VideoMarathon. Keys of other
trainers (`videos`, `image_path`, `Video`) are read where their meaning is
plain. A record that names a medium in any other way is refused: if it were
trained as text, the model would learn to answer without visual input.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from hourjax.errors import UserError
from hourjax.schema import shorten

MODALITIES: tuple[Literal["video", "image"], ...] = ("video", "image")

_KEYS: dict[str, Literal["video", "image"]] = {
  f"{kind}{ending}": kind
  for kind in MODALITIES
  for ending in ("", "s", "_path", "_paths", "_file", "_files")
}
# Words of which one names a medium, as part of a key: video_path, imgUrl.
_SOUND = {"audio", "audios", "speech", "sound", "sounds", "voice", "wav"}
_SEEN = {
  *("frame", "frames", "clip", "clips", "media", "movie", "film", "picture"),
  *("pictures", "photo", "photos", "visual", "visuals", "pixel", "pixels"),
  *("vid", "vids", "pic", "pics"),
}
_STARTS = ("video", "image", "img")
# Keys that end so describe a medium; without the medium they are harmless.
_ABOUT = {
  *("type", "caption", "captions", "description", "descriptions", "prompt"),
  *("width", "height", "size", "duration", "fps", "count", "tokens", "num"),
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_FILE = re.compile(
  r"[^\n]{1,1000}\.(?:mp4|m4v|mkv|webm|avi|mov|flv|wmv|mpe?g|m2?ts|3gp|ogv"
  r"|jpe?g|png|gif|webp|bmp|tiff?|heic|avif|img|npy|pt|wav|mp3|flac|m4a)"
  r"(?:[?#][^\n]*)?",
  re.IGNORECASE,
)
_DEPTH = 4  # levels of nested values that are searched


def modality_of(key: str) -> Literal["video", "image"] | None:
  """Returns the modality that a key of this name holds, None if none."""
  return _KEYS.get(key.strip().lower())


def media_key(raw: Mapping[str, Any], at: str) -> str | None:
  """Returns the key that holds a record's video or images, None for text.

  Args:
    raw: the record. A key that holds null counts as missing, and so does
      `image: ""`, which LLaVA's lists have in text records.
    at: file, place and record, for messages.

  Raises:
    UserError: the record has a video and images, or two keys that name
      different files.
  """
  found: dict[str, list[str]] = {}
  for key, value in raw.items():
    kind = modality_of(key)
    empty = value is None or (key == "image" and value == "")
    if key not in MODALITIES:
      empty = empty or value in ("", [], {})
    if kind and not empty:
      found.setdefault(kind, []).append(key)
  if len(found) == 2:  # one of them may hold nothing
    held = {k: [n for n in keys if raw[n]] for k, keys in found.items()}
    found = {k: keys for k, keys in held.items() if keys} or found
  if len(found) == 2:
    video, image = found["video"][0], found["image"][0]
    raise UserError(
      f"{at}: has both {video!r} ({shorten(raw[video])}) and {image!r}"
      f" ({shorten(raw[image])}); keep one"
    )
  keys = next(iter(found.values()), [])
  keys.sort(key=lambda key: key not in MODALITIES)
  for other in keys[1:]:
    if _names(raw[other]) != _names(raw[keys[0]]):
      raise UserError(
        f"{at}: {keys[0]!r} is {shorten(raw[keys[0]])} but {other!r} is"
        f" {shorten(raw[other])}; keep one"
      )
  return keys[0] if keys else None


def read_media(
  raw: Mapping[str, Any], key: str, at: str
) -> tuple[Literal["video", "image"], tuple[str, ...]]:
  """Reads the modality and paths under the key that `media_key` found.

  Args:
    raw: the record.
    key: that holds its video or images.
    at: file, place and record, for messages.

  Returns:
    Modality, and paths as written in the record.

  Raises:
    UserError: the key holds no path or list of paths, or several videos.
  """
  kind, value = modality_of(key), raw[key]
  assert kind is not None  # as `media_key` checked
  paths = value if isinstance(value, list) else [value]
  if not paths or not all(isinstance(p, str) and p for p in paths):
    raise UserError(
      f"{at}: {key!r} must be a path or a list of paths, found {shorten(value)}"
    )
  if kind == "video" and len(paths) != 1:
    raise UserError(f"{at}: {len(paths)} videos, 1 expected; split the record")
  return kind, tuple(paths)


def check_unread(
  raw: Mapping[str, Any], known: tuple[str, ...], text: bool, at: str
) -> None:
  """Refuses a record with a medium that would be ignored.

  Args:
    raw: the record.
    known: keys that are read, and may hold anything.
    text: whether no video or image was found; if so, no other key may hold
      something that looks like one. Sound is refused in every record.
    at: file, place and record, for messages.

  Raises:
    UserError: with the key and its value.
  """
  others = {k: v for k, v in raw.items() if k not in known}
  for key, value in _leaves(others, most=_DEPTH if text else 2):
    words = _words(key)
    if _SOUND.intersection(words) and _is_file(value):
      raise UserError(
        f"{at}: {key!r} is {shorten(value)}, which is not listened to; take the"
        " key out if the questions are answered by what is seen"
      )
    if text and (_looks(words, value) or _is_file(value)):
      raise UserError(
        f"{at}: {key!r} is {shorten(value)}, and neither 'video' nor 'image' is"
        " there; rename the key to what it holds, or take it out if the"
        " record is text alone"
      )


@functools.lru_cache(4096)
def _words(key: str) -> tuple[str, ...]:
  """Splits a key such as video_path or imgUrl into lower-case words."""
  return tuple(word.lower() for word in _WORD.findall(key))


def _looks(words: tuple[str, ...], value: Any) -> bool:
  """Returns whether a key of these words holds a medium."""
  seen = any(
    word.startswith(_STARTS) or word in _SEEN or word in _SOUND
    for word in words
  )
  if not seen or words[-1] in _ABOUT:
    return False
  if isinstance(value, bool | int | float):
    return words[-1] == "id" and not isinstance(value, bool)
  return _holds(value)


def _holds(value: Any) -> bool:
  """Returns whether a value is text or bytes, and not empty."""
  return isinstance(value, str | bytes) and bool(value.strip())


def _is_file(value: Any) -> bool:
  """Returns whether a value is the name of a media file, or its content."""
  if isinstance(value, bytes):
    return bool(value)
  if not isinstance(value, str) or len(value) > 1100 or "." not in value:
    return False
  return bool(_FILE.fullmatch(value.strip()))


def _leaves(
  value: Any, key: str = "", depth: int = 0, most: int = _DEPTH
) -> Iterator[tuple]:
  """Yields all keys above each value that is no list or object, and it."""
  if isinstance(value, Mapping | list):
    if depth < most:
      parts = value.items() if isinstance(value, Mapping) else enumerate(value)
      for name, part in parts:
        named = isinstance(value, Mapping)
        inner = ".".join(filter(None, (key, str(name)))) if named else key
        yield from _leaves(part, inner, depth + 1, most)
  else:
    yield key, value


def _names(value: Any) -> list[str]:
  """Returns the file names of a path or of a list of paths."""
  values = value if isinstance(value, list) else [value]
  return [os.path.basename(str(path)) for path in values]
