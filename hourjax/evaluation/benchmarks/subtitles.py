"""Subtitles as text for a prompt.

A decoder has 32,768 positions, of which an hour of video takes 8,704. LIMIT is
about 10,000 tokens in any script. Of longer subtitles lines are left out
evenly, because cutting them off would lose the end of every long video.
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
  """Returns the text of an .srt file by RULE.

  Args:
    path: the file.

  Returns:
    The text; None if there is no file or no text in it.

  Raises:
    UserError: the file cannot be read.
  """
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  lines: list[str] = []
  # Old files are not always UTF-8. A letter that cannot be read is replaced,
  # since a subtitle remains readable without it.
  for line in data.decode("utf-8-sig", errors="replace").splitlines():
    if "-->" in line:
      if lines and lines[-1].strip().isdecimal():
        # The line before the times is the number of the subtitle.
        lines.pop()
    else:
      lines.append(line)
  return join(lines)


def read_json(path: pathlib.Path, start: float, end: float) -> str | None:
  """Returns LongVideoBench's subtitles of a clip by RULE.

  Args:
    path: a list of {"start", "end", "line"} with times as "00:01:02.500", or
      of {"timestamp": [seconds, seconds or null], "text"}.
    start: start of the clip, in seconds of the video that the file belongs to.
    end: end of the clip, likewise.

  Returns:
    The text of what is said within the clip; None if there is no file or text.

  Raises:
    UserError: the file is damaged or cannot be read.
  """
  try:
    entries = json.loads(path.read_bytes())
    times_and_lines = [_entry(entry) for entry in entries]
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f"{path} is damaged ({error!r}); fetch it again", kind="damaged"
    ) from error
  return join(
    line
    for line_start, line_end, line in times_and_lines
    if line_start < end and line_end > start
  )


def _entry(entry: dict[str, Any]) -> tuple[float, float, str]:
  """Returns start and end in seconds, and the line, of either form."""
  if "timestamp" in entry:
    start, end = entry["timestamp"]
    end = float("inf") if end is None else float(end)
    return float(start), end, str(entry["text"])
  return _seconds(entry["start"]), _seconds(entry["end"]), str(entry["line"])


def _seconds(time: str) -> float:
  """Returns "00:01:02.500" as 62.5."""
  hours, minutes, seconds = time.split(":")
  return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


# Markup of HTML, "<i>", and of Advanced SubStation, "{\\an8}".
_TAG = re.compile(r"<[^<>\n]*>|\{\\[^{}\n]*\}")


def join(lines: Iterable[str]) -> str | None:
  """Joins lines of subtitles to one text by RULE.

  Args:
    lines: the lines with their markup, in order.

  Returns:
    The text; None if nothing is left.
  """
  kept: list[str] = []
  text = html.unescape(_TAG.sub(" ", "\n".join(lines)))
  for line in (" ".join(line.split()) for line in text.split("\n")):
    if line and line != (kept[-1] if kept else None):
      kept.append(line)
  text, count = "\n".join(kept), len(kept)
  # Lines differ in length, so the number that fits is found by trial: each time
  # in proportion to the size, and one line less at least.
  while (size := len(text.encode())) > LIMIT:
    count = min(count - 1, count * LIMIT // size)
    text = "\n".join(_spaced(kept, count))
  return text or None


def _spaced(lines: list[str], count: int) -> list[str]:
  """Returns evenly spaced lines, with the first and the last one.

  Of 5 lines, 3 are lines 0, 2 and 4.
  """
  steps = max(count - 1, 1)
  return [lines[i * (len(lines) - 1) // steps] for i in range(count)]
