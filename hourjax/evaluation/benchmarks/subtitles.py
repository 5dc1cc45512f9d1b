"""Subtitles as text for a prompt.

A decoder has 32,768 positions, of which an hour of video takes 8,704. The
limit below is about 10,000 tokens in any script; what is longer is thinned out
evenly, as cutting it off would leave out the end of every long video.
"""

import html
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from hourjax.errors import UserError

LIMIT = 40_000  # bytes of UTF-8
RULE = (
  "all lines in order, without markup, a line that repeats the one before it"
  f" once; of more than {LIMIT} bytes of UTF-8 as many lines, evenly spaced, as"
  " fit"
)


def read_srt(path: pathlib.Path) -> str | None:
  """The text of an .srt file by RULE; None if there is no file or no text."""
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  lines: list[str] = []
  # Old files are not always UTF-8; one odd letter does not spoil a subtitle.
  for line in data.decode("utf-8-sig", errors="replace").splitlines():
    if "-->" in line:
      if lines and lines[-1].strip().isdecimal():
        lines.pop()  # the number of this subtitle
    else:
      lines.append(line)
  return join(lines)


def read_json(path: pathlib.Path, start: float, end: float) -> str | None:
  """LongVideoBench's subtitles of a clip by RULE.

  Args:
    path: a list of {"start", "end", "line"} with times as "00:01:02.500", or
      of {"timestamp": [seconds, seconds or null], "text"}.
    start, end: of the clip, in seconds of the video that the file belongs to.

  Returns:
    The text of what is said within the clip; None if there is no file or text.

  Raises:
    UserError: the file is damaged.
  """
  try:
    entries = json.loads(path.read_bytes())
    spoken = [_entry(entry) for entry in entries]
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f"{path} is damaged ({error!r}); fetch it again", kind="damaged"
    ) from error
  return join(
    line for since, until, line in spoken if since < end and until > start
  )


def _entry(entry: dict[str, Any]) -> tuple[float, float, str]:
  if "timestamp" in entry:
    since, until = entry["timestamp"]
    until = float("inf") if until is None else float(until)
    return float(since), until, str(entry["text"])
  return _seconds(entry["start"]), _seconds(entry["end"]), str(entry["line"])


def _seconds(time: str) -> float:
  hours, minutes, seconds = time.split(":")
  return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


_TAG = re.compile(r"<[^<>\n]*>|\{\\[^{}\n]*\}")


def join(lines: Iterable[str]) -> str | None:
  """Lines of subtitles as one text by RULE; None if nothing is left."""
  kept: list[str] = []
  text = html.unescape(_TAG.sub(" ", "\n".join(lines)))
  for line in (" ".join(line.split()) for line in text.split("\n")):
    if line and line != (kept[-1] if kept else None):
      kept.append(line)
  said, count = "\n".join(kept), len(kept)
  while (size := len(said.encode())) > LIMIT:
    count = min(count - 1, count * LIMIT // size)
    said = "\n".join(_spaced(kept, count))
  return said or None


def _spaced(lines: list[str], count: int) -> list[str]:
  """Evenly spaced lines, the first and the last among them: 5, 3 -> 0, 2, 4."""
  steps = max(count - 1, 1)
  return [lines[i * (len(lines) - 1) // steps] for i in range(count)]
