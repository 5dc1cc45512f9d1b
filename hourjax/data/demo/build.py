"""The demo data set: videos, records in VideoMarathon's format, a tokenizer.

`build` writes it into a folder, or reuses what an earlier run wrote there.
"""

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pydantic

from hourjax import progress, schema
from hourjax.atomic_file import write_file
from hourjax.data.demo import drawing, questions, script, tokenizer, world
from hourjax.data.demo.questions import QUESTION_MAKERS, DemoQuestion
from hourjax.data.demo.script import SPLITS, Script
from hourjax.errors import UserError

LETTERS = "ABCD"
INSTRUCTION = "Answer with the letter."
# Tasks whose answer is one word about one frame: what stage 1 begins with.
LOOKUPS = (
  "temporal_perception",
  "spatial_perception",
  "object_recognition",
  "object_attribute",
  "action_recognition",
  "scene_recognition",
)
TURNS = 8  # questions in each conversation of stages 2 and 3
# What is asked about a video's needles, in each conversation of stage 3 and in
# haystacks.
NEEDLE_QUESTIONS = ("card", "word", "first", "last")
# What a test video's question about its clip is about.
CLIP_QUESTIONS = ("word", "word", "first", "last")
Turn = tuple[str, str, dict[str, Any]]  # question, answer, facts about both


class RecordWriter:
  """Writes the records of one split's videos, in the order of the calls.

  Right letters, yes and no, tasks and formats are balanced over all calls, so
  the output depends on the seed and on earlier calls. A record has the format
  of VideoMarathon (see hourjax/README.md, Conversations) and one more key,
  `questions`, with facts about each human turn.
  """

  def __init__(self, seed: int, split: str):
    """Starts the random numbers of a split."""
    code = SPLITS.index(split)
    self._rng = np.random.default_rng([seed, code, 0, 1])
    self._decks: dict[str, list[str]] = collections.defaultdict(list)
    self._used: collections.Counter = collections.Counter()

  def lookups(self, script: Script, conversations: int) -> list[dict]:
    """Writes conversations of one open question for each of LOOKUPS."""
    records = []
    for number in range(conversations):
      found = [self._find(script, task) for task in LOOKUPS]
      turns = [self._turn(question) for question in found if question]
      turns = [turns[i] for i in self._rng.permutation(len(turns))]
      records.append(_record(script, number, turns))
    return records

  def train(self, script: Script, conversations: int) -> list[dict]:
    """Writes conversations of TURNS questions about a training video.

    No two questions of a conversation share a task.
    """
    return [
      _record(script, number, self._others(script, TURNS))
      for number in range(conversations)
    ]

  def memory(self, script: Script, conversations: int) -> list[dict]:
    """Writes conversations of TURNS questions for MemAug.

    They are NEEDLE_QUESTIONS and others, in random order.
    """
    records = []
    for number in range(conversations):
      turns = [
        self._turn(_needle_question(script, about))
        for about in NEEDLE_QUESTIONS
      ]
      turns += self._others(script, TURNS - len(turns))
      turns = [turns[i] for i in self._rng.permutation(len(turns))]
      records.append(_record(script, number, turns))
    return records

  def test(self, script: Script) -> list[dict]:
    """Writes records of one question each about a test video.

    They ask for its card, for something in its clip, and for each task of which
    the video has a question.
    """
    abouts = "card", self._draw("clip", CLIP_QUESTIONS)
    turns = [self._turn(_needle_question(script, about)) for about in abouts]
    turns += self._others(script, len(world.TASKS))
    return [_record(script, i, [turn]) for i, turn in enumerate(turns)]

  def needles(self, script: Script) -> list[dict]:
    """Writes a record for each question about a video's card and clip."""
    found = [_needle_question(script, about) for about in NEEDLE_QUESTIONS]
    turns = [self._turn(question) for question in found]
    return [_record(script, i, [turn]) for i, turn in enumerate(turns)]

  def _draw(self, deck: str, cards: Sequence[str], keep: bool = False) -> str:
    """Returns the next of the shuffled cards; each comes once before any again.

    A plain cycle would give each video's first question the same letter.
    With `keep` the card stays the next one.
    """
    pile = self._decks[deck]
    if not pile:
      pile.extend(cards[i] for i in self._rng.permutation(len(cards)))
    return pile[-1] if keep else pile.pop()

  def _others(self, script: Script, count: int) -> list[Turn]:
    """Asks questions of different tasks, those asked least so far first."""
    tasks = list(world.TASKS)
    tasks = [tasks[i] for i in self._rng.permutation(len(tasks))]
    tasks.sort(key=self._used.__getitem__)
    turns: list[Turn] = []
    for task in tasks:
      if len(turns) == count:
        break
      found = self._find(script, task)
      if found is not None:
        self._used[task] += 1
        turns.append(self._turn(found))
    return turns

  def _find(self, script: Script, task: str) -> DemoQuestion | None:
    """Returns a question of this task, None if no try finds one."""
    yes = self._draw(f"{task} yes", ("yes", "no"), keep=True) == "yes"
    for make in QUESTION_MAKERS[task] * 3:
      found = make(script, self._rng, yes)
      if found is not None:
        return found
    return None

  def _turn(self, found: DemoQuestion) -> Turn:
    """Writes a question in its format."""
    if found.yes is not None:
      self._draw(f"{found.task} yes", ("yes", "no"))
    needle = found.needle
    facts = {
      "topic": world.TASKS[found.task][0],
      "task": found.task,
      "format": found.format,
      "answer": found.answer,
      "options": None,
      "letter": None,
      "needle": needle is not None,
      "needle_kind": found.needle_kind or None,
      "dropped": needle.dropped if needle else None,
      "seconds": list(found.span) if found.span else None,
    }
    if found.format == "open":
      return found.text, found.answer, {**facts, "chance": found.chance}
    wrong = self._rng.permutation(len(found.wrong))[: len(LETTERS) - 1]
    options = [found.wrong[i] for i in wrong]
    letter = self._draw(f"{found.task} letter", LETTERS)
    options.insert(LETTERS.index(letter), found.answer)
    lines = [f"{name}. {text}" for name, text in zip(LETTERS, options)]
    facts |= {"options": options, "letter": letter, "chance": 1 / len(options)}
    return "\n".join([found.text, *lines, INSTRUCTION]), letter, facts


def _needle_question(script: Script, about: str) -> DemoQuestion:
  """Asks about the card, or about something in the clip."""
  if about == "card":
    return questions.card_question(script.needle)
  assert script.clip is not None  # every rendered video has one
  return questions.clip_question(script.clip, about)


def _record(script: Script, number: int, turns: list[Turn]) -> dict:
  """Joins turns into one record."""
  turns_of_record = []
  for i, (question, answer, _) in enumerate(turns):
    mark = "<image>\n" if i == 0 else ""
    turns_of_record.append({"from": "human", "value": mark + question})
    turns_of_record.append({"from": "gpt", "value": answer})
  return {
    "id": f"{script.name}-{number:02d}",
    "video": f"{script.name}.mp4",
    "data_source": "demo",
    "duration": float(script.duration),
    "conversations": turns_of_record,
    "questions": [facts for _, _, facts in turns],
  }


TRAIN_SECONDS = (130, 170)
# Test videos at test_scale 1: their number, shortest and longest duration in s.
TEST_SECONDS = (
  (24, (180, 300)),
  (16, (600, 600)),
  (12, (1200, 1200)),
  (8, (1800, 1800)),
  (8, (3600, 3600)),
)
FILES = ("captions", "lookups", "train", "memory", "test")
CAPTION_SECONDS = 8  # between two frames of a video that have captions
# Part of the summary, so that a data set of older code is written again.
VERSION = 7
# Encoding releases the GIL, and each video is encoded on one core.
THREADS = 2


@dataclasses.dataclass(frozen=True)
class Options:
  """Holds the options that determine a demo data set.

  Attributes:
    seed: seed of everything random.
    train_videos: number of training videos, of 130 to 170 s.
    test_scale: number of test videos per duration, as a multiple of
      TEST_SECONDS' counts, rounded; at least one video of the shortest.
    conversations: number of conversations about each training video.

  Raises:
    UserError: an option is out of range.
  """

  seed: int = 0
  train_videos: int = 1080
  test_scale: float = 1.0
  conversations: int = 6

  def __post_init__(self) -> None:
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
    """Returns (shortest, longest) duration of every video, by split."""
    counts = [int(n * self.test_scale + 0.5) for n, _ in TEST_SECONDS]
    counts[0] = max(counts[0], 1)
    test = [
      span for n, (_, span) in zip(counts, TEST_SECONDS) for _ in range(n)
    ]
    return {"train": [TRAIN_SECONDS] * self.train_videos, "test": test}

  def scripts(self) -> dict[str, list[Script]]:
    """Makes the scripts of all videos, by split."""
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
  an interrupted run continues if the options are the same, and with other
  options the old files are replaced.

  Args:
    folder: gets videos/, FILES, tokenizer/ and demo.json.
    options: of the data set.

  Returns:
    The summary, and whether everything was there already.

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
  for part in (folder / "videos").glob(".*.mp4.*.part*"):
    part.unlink(missing_ok=True)
  scripts = options.scripts()
  names = [f"{s.name}.mp4" for group in scripts.values() for s in group]
  start = {"options": wanted, "complete": False, "videos": names}
  _write_json(folder / "demo.json", start)
  _write_videos(folder / "videos", scripts, reuse=same)
  with progress.step("writing the questions"):
    written = _write_records(folder, scripts, options)
  summary = {**start, "complete": True, "splits": {}}
  for name, items in written.items():
    split = "test" if name == "test" else "train"
    summary["splits"][name] = _count(scripts[split], items)
  _write_json(folder / "demo.json", summary)
  return summary, False


def _read_summary(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the content of demo.json, {} if there is none."""
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
  """Describes the keys of demo.json that are read again."""

  options: dict[str, Any]
  complete: bool
  # File names: those of a data set of other options are deleted.
  videos: list[Annotated[str, pydantic.Field(pattern=r"^[\w-]+\.mp4$")]]


def _all_there(folder: pathlib.Path, summary: dict[str, Any]) -> bool:
  """Returns whether all files of a data set exist."""
  paths = [folder / "videos" / name for name in summary["videos"]]
  paths += [folder / f"{name}.json" for name in FILES]
  paths += [folder / "tokenizer" / "tokenizer.json"]
  paths += [folder / "tokenizer" / "tokenizer_config.json"]
  return all(path.is_file() for path in paths)


def _write_json(path: pathlib.Path, content: Any) -> None:
  write_file(path, json.dumps(content, indent=1), several_writers=True)


def _write_videos(
  folder: pathlib.Path, scripts: dict[str, list[Script]], reuse: bool
) -> None:
  """Renders and encodes videos, longest first; keeps old ones if `reuse`."""
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
      pool.submit(drawing.write_video, folder / f"{s.name}.mp4", s): s
      for s in todo
    }
    try:
      for job in concurrent.futures.as_completed(jobs):
        job.result()
        bar.update(jobs[job].duration)
    except BaseException:
      pool.shutdown(wait=True, cancel_futures=True)
      raise


def _write_records(
  folder: pathlib.Path, scripts: dict[str, list[Script]], options: Options
) -> dict[str, list]:
  """Writes the records of both splits and the tokenizer."""
  train, test = (RecordWriter(options.seed, s) for s in script.SPLITS)
  written = {
    name: [
      record
      for s in scripts["train"]
      for record in write(s, options.conversations)
    ]
    for name, write in (
      ("lookups", train.lookups),
      ("train", train.train),
      ("memory", train.memory),
    )
  }
  written["test"] = [r for s in scripts["test"] for r in test.test(s)]
  captions = [c for s in scripts["train"] for c in _captions(s)]
  files = {"captions": captions, **written}
  for name, items in files.items():
    _write_json(folder / f"{name}.json", items)
  texts = (
    turn["value"]
    for name in ("lookups", "train", "memory")
    for r in written[name]
    for turn in r["conversations"]
  )
  tokenizer.write_tokenizer(folder / "tokenizer", texts)
  return written


def _captions(script: Script) -> list[dict]:
  """Returns what single frames show, in the words of questions and answers.

  They are for stage 0 (`hourjax.align`). Every frame of a card or clip is among
  them, since there are so few.
  """
  records = []
  for second in range(script.duration):
    if script.needle.shown_at(second):
      words = [script.needle.kind, script.needle.colour]
    elif script.clip and script.clip.shown_at(second):
      words = ["clip", script.clip.thing_at(second)[0], script.clip.word]
    elif second % CAPTION_SECONDS == 0:
      (scene,) = (s for s in script.scenes if s.start <= second < s.end)
      words = [scene.place, scene.kind, scene.colour, scene.side, scene.level]
      words += [scene.action]
    else:
      continue
    records.append(
      {"video": f"{script.name}.mp4", "second": second, "captions": words}
    )
  return records


def _count(scripts: list[Script], items: list[dict]) -> dict:
  """Returns the numbers of a split for the summary."""
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
