"""Report on a prepared dataset: counts, dropped and repaired records."""

import array
import collections
import hashlib
import json
from typing import Any, TextIO

import numpy as np

from hourjax.data.columns import Columns
from hourjax.data.prepare.convert import Dropped, Kept
from hourjax.data.prepare.dataset_plots import BIN
from hourjax.data.records.questions import FACTS

EXAMPLES = 3  # examples that are shown of each reason

SKIPPED = "skipped.jsonl"
REPAIRED = "repaired.jsonl"
# Repairs that half of LLaVA's records need: counted, but not listed.
_USUAL = {"marker moved to the front", "no marker: put in front"}


class Report:
  """Counts conversations; lists dropped and repaired records in files."""

  def __init__(self, file: TextIO, repaired: TextIO):
    """Starts with empty counts.

    Args:
      file: the file SKIPPED, open for writing.
      repaired: the file REPAIRED, open for writing.
    """
    self._file, self._repaired_file = file, repaired
    self._repaired: dict[str, dict[str, Any]] = {}
    self._dropped: dict[str, dict[str, Any]] = {}
    self._seen: set[int] = set()
    self._ids: set[int] = set()
    self._repeated = 0
    self._numbers, self._questions = array.array("d"), array.array("i")
    self._by: dict[str, collections.Counter] = {
      name: collections.Counter() for name in ("sources", "streams", *FACTS)
    }
    self._topic_of: dict[str, str] = {}

  def keep(self, item: Kept) -> bool:
    """Counts a conversation; returns False if it repeats an earlier one."""
    if item.content in self._seen:
      reason = f"record {item.id}: {item.where} repeats an earlier one"
      self.drop(Dropped(item.where, item.id, "duplicate", reason))
      return False
    self._seen.add(item.content)
    # The same id with another text is another conversation, which is kept.
    name = item.id.encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
    self._repeated += number in self._ids
    self._ids.add(number)
    self._repair(item)
    self._numbers.append(item.number)
    self._questions.append(len(item.questions))
    self._by["sources"][item.source] += len(item.questions)
    self._by["streams"][item.stream] += len(item.questions)
    for question in item.questions:
      for name, value in zip(FACTS, question):
        self._by[name][value] += 1
      topic, task, _ = question
      self._topic_of.setdefault(task, topic)
    return True

  def drop(self, item: Dropped) -> None:
    """Counts and lists a record or row that is left out."""
    kind = self._dropped.setdefault(item.kind, {"count": 0, "examples": []})
    kind["count"] += 1
    if len(kind["examples"]) < EXAMPLES:
      kind["examples"].append(item.reason)
    # ASCII, since a reason may quote text that is not valid UTF-8.
    self._file.write(json.dumps(item._asdict()) + "\n")

  def _repair(self, item: Kept) -> None:
    """Counts and lists the repairs of a record."""
    for name in item.repairs:
      kind = self._repaired.setdefault(name, {"count": 0, "examples": []})
      kind["count"] += 1
      if len(kind["examples"]) < EXAMPLES:
        kind["examples"].append(f"{item.where}: record {item.id}")
    if not _USUAL.issuperset(item.repairs):
      listed = {"where": item.where, "id": item.id, "repairs": item.repairs}
      self._repaired_file.write(json.dumps(listed) + "\n")

  @property
  def dropped(self) -> dict[str, dict[str, Any]]:
    """Returns {"count", "examples"} by reason, most frequent first."""
    return _frequent(self._dropped)

  @property
  def numbers(self) -> np.ndarray:
    """Returns the `record_number` of each conversation, float [N]."""
    return np.array(self._numbers)

  def count(self, columns: Columns, chosen: np.ndarray) -> dict:
    """Returns the numbers of the chosen conversations.

    Args:
      columns: columns of the conversations that were kept.
      chosen: whether each of them is counted, bool [N].
    """
    questions = int(np.array(self._questions)[chosen].sum())
    return _count(columns, chosen, questions)

  def summary(self, columns: Columns, unstored: set[str] | None) -> dict:
    """Returns all numbers as JSON values.

    Args:
      columns: columns of the conversations that were kept.
      unstored: videos that the feature store lacks; None without a store.
    """
    whole = np.ones(len(columns), bool)
    questions = self._by["sources"].total()
    summary = {
      "kept": _count(columns, whole, questions),
      "dropped": self.dropped,
      "repaired": _frequent(self._repaired),
      "repeated_ids": self._repeated,
      "tokens": int(columns.tokens.sum(dtype=np.int64)),
    }
    if unstored is not None:
      summary["videos_without_features"] = _without_features(columns, unstored)
    for kind, column in (
      ("sources", columns.source),
      ("streams", columns.stream),
    ):
      summary[kind] = {
        name: _count(columns, column == i, self._by[kind][name])
        for i, name in enumerate(getattr(columns, kind))
      }
    for name in FACTS:
      summary[f"{name}s"] = dict(self._by[name].most_common())
    summary["topic_of_task"] = self._topic_of
    known = columns.duration[~np.isnan(columns.duration)]
    bins = np.bincount((known // (60 * BIN)).astype(np.int64))
    summary["videos_per_5_minutes"] = bins.tolist()
    return summary


def table(summary: dict) -> str:
  """Formats a summary as a few lines of text."""
  head = ("", "conversations", "questions", "videos", "hours")
  rows = [head, ("all", *_cells(summary["kept"]))]
  held_out = summary.get("held_out")
  if held_out:
    rows.append(("held out of these", *_cells(held_out)))
  for kind in ("sources", "streams"):
    groups = sorted(
      summary[kind].items(), key=lambda item: -item[1]["conversations"]
    )
    rows += [(f"{kind[:-1]} {name}", *_cells(n)) for name, n in groups]
  width = max(len(row[0]) for row in rows)
  lines = [
    f"{row[0]:<{width}}" + "".join(f"{cell:>15}" for cell in row[1:])
    for row in rows
  ]
  if held_out and not held_out["conversations"]:
    lines.append("nothing is held out; give a larger --holdout, or a number")
  kept = summary["kept"]
  if kept["videos_of_unknown_duration"]:
    count = kept["videos_of_unknown_duration"]
    lines.append(f"{count:,} videos are of unknown duration and add no hours")
  lines += _unstored_lines(summary.get("videos_without_features", {}))
  if summary["repeated_ids"]:
    count = summary["repeated_ids"]
    lines.append(f"{count:,} kept records have the id of another one")
  lines += _repaired_lines(summary.get("repaired", {}))
  return "\n".join(lines + _dropped_lines(summary["dropped"]))


def _without_features(columns: Columns, unstored: set[str]) -> dict[str, Any]:
  """Counts the videos that the feature store lacks.

  Those whose number of frames is known come as pixels; examples are of the
  others, if there are any.
  """
  missing = [
    (known > 0, name)
    for name, known in zip(columns.videos, columns.num_frames.tolist())
    if name in unstored
  ]
  missing.sort()
  return {
    "count": len(missing),
    "as_pixels": sum(pixels for pixels, _ in missing),
    "examples": [name for _, name in missing[:EXAMPLES]],
  }


def _unstored_lines(found: dict[str, Any]) -> list[str]:
  """Says how many videos are not in the feature store, and what that means.

  Args:
    found: as `_without_features` returns it; older versions counted no pixels.
  """
  pixels = found.get("as_pixels", 0)
  unusable = found.get("count", 0) - pixels
  lines = []
  if pixels:
    lines.append(
      f"{pixels:,} videos are not in the feature store and come as pixels: set"
      " config.data.media, and config.rows.frames for their frames"
    )
  if unusable:
    lines.append(
      f"{unusable:,} videos are not in the feature store and their frames were"
      f" not counted, such as {found['examples'][0]}; extract them before"
      " training, or prepare with --media so that they come as pixels"
    )
  return lines


def _repaired_lines(repaired: dict[str, dict]) -> list[str]:
  """Formats the counts of repairs."""
  if not repaired:
    return []
  lines = [f"kept, and read otherwise than written, see {REPAIRED}:"]
  for name, kind in repaired.items():
    example = kind["examples"][0]
    lines.append(f"  {kind['count']:>9,} {name}, such as {example}")
  return lines


def _frequent(kinds: dict[str, dict]) -> dict[str, dict]:
  """Sorts counts by reason, the most frequent first."""
  return dict(sorted(kinds.items(), key=lambda pair: -pair[1]["count"]))


def _dropped_lines(dropped: dict[str, dict]) -> list[str]:
  """Formats the counts of dropped records."""
  if not dropped:
    return ["nothing was dropped"]
  total = sum(kind["count"] for kind in dropped.values())
  lines = [f"dropped {total:,}, listed in {SKIPPED}:"]
  for name, kind in dropped.items():
    lines.append(f"  {kind['count']:>9,} {name}")
    lines += [f"{'':12}{reason}" for reason in kind["examples"]]
  return lines


def _cells(count: dict) -> tuple[str, ...]:
  names = ("conversations", "questions", "videos")
  return (*(f"{count[n]:,}" for n in names), f"{count['hours']:,.1f}")


def _count(columns: Columns, chosen: np.ndarray, questions: int) -> dict:
  """Returns the numbers of the chosen conversations."""
  videos = np.unique(columns.video[chosen & (columns.video >= 0)])
  seconds = columns.duration[videos]
  return {
    "conversations": int(chosen.sum()),
    "questions": questions,
    "videos": len(videos),
    "hours": round(float(np.nansum(seconds)) / 3600, 3),
    "videos_of_unknown_duration": int(np.isnan(seconds).sum()),
  }
