"""Writes the whole demo data set into a folder, or finds it there."""

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
from typing import Annotated, Any

import pydantic

from hourjax import progress, schema
from hourjax.data.demo import records, script, tokens, video
from hourjax.data.demo.script import Script
from hourjax.errors import UserError

TRAIN_SECONDS = (180, 240)
# Test videos at test_scale 1: how many of which duration in seconds.
TEST_SECONDS = (
  (24, (180, 300)),
  (16, (600, 600)),
  (12, (1200, 1200)),
  (8, (1800, 1800)),
  (8, (3600, 3600)),
)
FILES = ("train_stage1", "train", "test")
# Part of the summary, so that a data set of older code is written anew.
VERSION = 2
# Encoding runs outside Python's lock and each video uses one core.
THREADS = 2


@dataclasses.dataclass(frozen=True)
class Options:
  """What makes one demo data set differ from another.

  Attributes:
    seed: of all that is random.
    train_videos: number of training videos, of 180 to 240 s.
    test_scale: number of test videos per duration, as a multiple of
      TEST_SECONDS' counts, rounded; at least one video of the shortest.
    conversations: about each training video.

  Raises:
    UserError: an option is out of range.
  """

  seed: int = 0
  train_videos: int = 720
  test_scale: float = 1.0
  conversations: int = 4

  def __post_init__(self):
    lowest = {"seed": 0, "train_videos": 1, "conversations": 1}
    for name, low in lowest.items():
      if getattr(self, name) < low:
        raise UserError(
          f"{name} is {getattr(self, name)}; set it to at least {low}"
        )
    if not 0 < self.test_scale <= 100:
      raise UserError(
        f"test_scale is {self.test_scale}; set it above 0 and to at most 100"
      )

  @property
  def seconds(self) -> dict[str, list[tuple[int, int]]]:
    """For each split, the range of every video's duration."""
    counts = [int(n * self.test_scale + 0.5) for n, _ in TEST_SECONDS]
    counts[0] = max(counts[0], 1)
    test = [
      span for n, (_, span) in zip(counts, TEST_SECONDS) for _ in range(n)
    ]
    return {"train": [TRAIN_SECONDS] * self.train_videos, "test": test}

  def scripts(self) -> dict[str, list[Script]]:
    """For each split, what its videos show."""
    return {
      split: [
        script.make_script(self.seed, split, index, span)
        for index, span in enumerate(spans, start=1)
      ]
      for split, spans in self.seconds.items()
    }


def build(folder: pathlib.Path, options: Options) -> tuple[dict, bool]:
  """Writes videos, records, tokenizer and summary where they are missing.

  The summary demo.json is written first as incomplete and last as complete:
  a stopped run goes on where it stopped if the options are the same, and
  with other options the old files are replaced.

  Args:
    folder: gets videos/, FILES, tokenizer/ and demo.json.
    options: of the data set.

  Returns:
    The summary, and whether all was there already.

  Raises:
    UserError: the folder cannot be written to or holds a foreign demo.json.
  """
  wanted = {"version": VERSION, **dataclasses.asdict(options)}
  old = _read_summary(folder)
  same = old.get("options") == wanted
  if same and old["complete"] and _all_there(folder, old):
    return old, True
  try:
    (folder / "videos").mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"cannot make {folder / 'videos'}: {error}; pick another --workdir"
    ) from error
  if not same:
    for name in old.get("videos", ()):
      (folder / "videos" / name).unlink(missing_ok=True)
  for part in (folder / "videos").glob(".*.mp4.*.part"):
    part.unlink(missing_ok=True)
  scripts = options.scripts()
  names = [f"{s.name}.mp4" for group in scripts.values() for s in group]
  start = {"options": wanted, "complete": False, "videos": names}
  _write_json(folder / "demo.json", start)
  _write_videos(folder / "videos", scripts, reuse=same)
  with progress.step("writing the questions"):
    written = _write_records(folder, scripts, options)
  summary = {**start, "complete": True, "splits": {}}
  for split, items in written.items():
    summary["splits"][split] = _count(scripts[split], items)
  _write_json(folder / "demo.json", summary)
  return summary, False


def _read_summary(folder: pathlib.Path) -> dict:
  path = folder / "demo.json"
  if not path.exists():
    return {}
  remedy = "delete the file or pick another --workdir"
  try:
    summary = schema.read_json(path, remedy=remedy)
    schema.validate(_Summary, summary, path.name, remedy=remedy)
  except UserError as error:
    raise UserError(f"{path} is no summary of demo data ({error})") from None
  return summary


class _Summary(schema.Schema):
  """What is read back of demo.json."""

  options: dict[str, Any]
  complete: bool
  # Names in the folder of videos: those of other options are deleted.
  videos: list[Annotated[str, pydantic.Field(pattern=r"^[\w-]+\.mp4$")]]


def _all_there(folder: pathlib.Path, summary: dict) -> bool:
  paths = [folder / "videos" / name for name in summary["videos"]]
  paths += [folder / f"{name}.json" for name in FILES]
  paths += [folder / "tokenizer" / "tokenizer.json"]
  paths += [folder / "tokenizer" / "tokenizer_config.json"]
  return all(path.is_file() for path in paths)


def _write_json(path: pathlib.Path, content) -> None:
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  part.write_text(json.dumps(content, indent=1))
  os.replace(part, path)


def _write_videos(folder: pathlib.Path, scripts, reuse: bool) -> None:
  todo = [s for group in scripts.values() for s in group]
  if reuse:
    todo = [s for s in todo if not (folder / f"{s.name}.mp4").is_file()]
  todo.sort(key=lambda s: -s.duration)
  with (
    concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    progress.bar(
      sum(s.duration for s in todo), unit="frame", desc="render"
    ) as bar,
  ):
    jobs = {
      pool.submit(video.write_video, folder / f"{s.name}.mp4", s): s
      for s in todo
    }
    try:
      for job in concurrent.futures.as_completed(jobs):
        job.result()
        bar.update(jobs[job].duration)
    except BaseException:
      pool.shutdown(wait=True, cancel_futures=True)
      raise


def _write_records(folder, scripts, options: Options) -> dict[str, list]:
  train, test = (records.Writer(options.seed, s) for s in script.SPLITS)
  written = {
    "train": [
      record
      for s in scripts["train"]
      for record in train.train(s, options.conversations)
    ],
    "test": [record for s in scripts["test"] for record in test.test(s)],
  }
  # Stage 1 sees one short question at a time, stage 2 all conversations.
  first = [r for r in written["train"] if len(r["questions"]) == 1]
  files = {"train_stage1": first, **written}
  for name, items in files.items():
    _write_json(folder / f"{name}.json", items)
  texts = (
    turn["value"] for r in written["train"] for turn in r["conversations"]
  )
  tokens.write_tokenizer(folder / "tokenizer", texts)
  return written


def _count(scripts: list[Script], items: list[dict]) -> dict:
  """One split's numbers; durations count videos, the rest questions."""
  questions = [q for record in items for q in record["questions"]]
  needles = [s.needle for s in scripts]
  minutes = collections.Counter(-(-s.duration // 60) for s in scripts)

  def tally(key: str) -> dict:
    return dict(sorted(collections.Counter(q[key] for q in questions).items()))

  return {
    "videos": len(scripts),
    "seconds": sum(s.duration for s in scripts),
    "records": len(items),
    "questions": len(questions),
    "needle_questions": sum(q["needle"] for q in questions),
    "needles": len(needles),
    "needles_dropped": sum(needle.dropped for needle in needles),
    "topic": tally("topic"),
    "task": tally("task"),
    "format": tally("format"),
    "minutes": {str(m): n for m, n in sorted(minutes.items())},
  }
