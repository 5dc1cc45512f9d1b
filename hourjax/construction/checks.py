"""Checks of questions that need no model: times, options, leaks, benchmarks.

Each returns a reason to drop a question, or None.
"""

import collections
import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from hourjax.construction.answers import LETTERS
from hourjax.data.prepare import question_tables
from hourjax.errors import UserError

# Two questions of a video are the same if so much of their words is, and of
# their answers' words.
_SAME_QUESTION, _SAME_ANSWER = 0.75, 0.5
# A question is a benchmark's if so much of its words is, of at least so many;
# or of the words of question and options together.
_OVERLAP, _OVERLAP_WORDS, _OVERLAP_WHOLE = 0.85, 5, 0.7
_WORD = re.compile(r"\d+(?::\d+)+|\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?")
# Words that change no question. Those that order or negate are not among them.
_FILLING = """
a an the is are was were be been being am do does did done has have had can
could will would shall should may might must of in on at to for from by as
with and that this these those there it its he she they them his her their him
who whom which what when where why how video shown show shows seen see visible
appear appears during while s
"""
_STOP = frozenset(_FILLING.split())
_OTHERS = re.compile(
  r"\b(all|none|both|neither|any|either) (of )?(the )?(above|these|them"
  r"|options?|answers?)\b"
  r"|^\W*((both|neither|either|only) )?[A-D](, [A-D])*,? (and|or|nor) [A-D]"
  r"\W*$",
  re.IGNORECASE,
)
_CLOCK = re.compile(r"\b(?:(\d{1,2}):)?(\d{1,3}):([0-5]\d)\b")
_NUMBER = r"(\d+(?:\.\d+)?)(?:\s*(?:-|–|to|and)\s*(\d+(?:\.\d+)?))?"
_UNITS = re.compile(
  rf"\b{_NUMBER}\s*-?\s*(s|secs?|seconds?|min|mins|minutes?|h|hrs?|hours?)\b",
  re.IGNORECASE,
)
_BEFORE = re.compile(rf"\b(second|minute|hour)s?\s+{_NUMBER}\b", re.IGNORECASE)
_SLACK = 1.0  # seconds beyond the end that rounding explains

# Columns of benchmarks' annotation files, in lower case.
_VIDEOS = (*question_tables.NAMES["video"].split(), "videoid", "key", "url")
_QUESTIONS = question_tables.NAMES["question"].split()
_OPTIONS = question_tables.NAMES["options"].split()
_NESTED = ("qa", "questions")  # lists of questions within a row of a video


@dataclasses.dataclass(frozen=True)
class Question:
  """Holds a question about a video.

  Attributes:
    task: of the question.
    topic: of the task.
    text: the question.
    answer: the right answer; of options, one of them.
    options: of a multiple-choice question, in their order; () if it is open.
  """

  task: str
  topic: str
  text: str
  answer: str
  options: tuple[str, ...] = ()

  @property
  def format(self) -> str:
    """Returns "multiple_choice" or "open"."""
    return "multiple_choice" if self.options else "open"

  @property
  def letter(self) -> str:
    """Returns the letter of the right option."""
    return LETTERS[self.options.index(self.answer)]

  def by_letter(self, order: Sequence[int] = (0, 1, 2, 3)) -> dict[str, str]:
    """Returns the options by letter, in an order."""
    return dict(zip(LETTERS, (self.options[i] for i in order)))


def words(text: str) -> frozenset[str]:
  """Returns the words that a text is about, without endings.

  "What does the man in the red hat hold?" and "What is the man with a red hat
  holding?" both give hat, hold, man, red.
  """
  found = (match[0].lower() for match in _WORD.finditer(text))
  return frozenset(_stem(word) for word in found if word not in _STOP)


def _stem(word: str) -> str:
  """Returns a word without "'s", a plural or the ending of a verb."""
  word = word.removesuffix("'s")
  for ending in ("ing", "ed", "es", "s"):
    if word.endswith(ending) and len(word) - len(ending) >= 3:
      stem = word[: -len(ending)]
      if stem.endswith("s") and ending == "s":
        break
      # "cutting", "stopped"
      if ending in ("ing", "ed") and len(stem) > 3 and stem[-1] == stem[-2]:
        stem = stem[:-1]
      return stem.removesuffix("e")
  return word.removesuffix("e") if len(word) > 4 else word


def similarity(one: frozenset[str], two: frozenset[str]) -> float:
  """Returns the share of words in both among those in either; 1 for none."""
  either = len(one | two)
  return len(one & two) / either if either else 1.0


def options_fault(question: Question) -> str | None:
  """Says if options are equal, or speak of each other."""
  if not question.options:
    return None
  plain = [" ".join(re.findall(r"\w+", o.casefold())) for o in question.options]
  if len(set(plain)) < len(plain):
    return "options are equal"
  if any(_OTHERS.search(option) for option in question.options):
    return "an option speaks of others"
  return None


def seconds_named(text: str) -> list[float]:
  """Returns the times and durations that a text names, in seconds.

  "at 1:30, for 20 to 30 seconds" gives 90, 20 and 30.
  """
  found = []
  for hours, minutes, seconds in _CLOCK.findall(text):
    found.append(3600 * int(hours or 0) + 60 * int(minutes) + int(seconds))
  units = {"s": 1.0, "m": 60.0, "h": 3600.0}
  for first, second, unit in _UNITS.findall(text):
    factor = units[unit[0].lower()]
    found += [factor * float(number) for number in (first, second) if number]
  for unit, first, second in _BEFORE.findall(text):
    factor = units[unit[0].lower()]
    found += [factor * float(number) for number in (first, second) if number]
  return [float(value) for value in found]


def times_fault(question: Question, duration: float) -> str | None:
  """Says if a time in the question, the answer or an option is past the end.

  Args:
    question: the question.
    duration: of the video, in seconds.
  """
  texts = (question.text, question.answer, *question.options)
  latest = max((t for text in texts for t in seconds_named(text)), default=0.0)
  if latest > duration + _SLACK:
    return "a time is beyond the end"
  return None


def leak_fault(question: Question) -> str | None:
  """Says if the question gives its answer away.

  A question that names several possible answers, of which its own is one, does
  not: "Which is first, the oven or the fridge?".
  """
  answer = words(question.answer)
  text = words(question.text)
  if not answer or not answer <= text:
    return None
  if question.options:
    named = [words(option) <= text for option in question.options]
    return None if sum(named) > 1 else "the question names its answer"
  if re.search(r"\bor\b|\bthan\b", question.text, re.IGNORECASE):
    return None
  if answer <= {"yes", "no", "not"}:
    return None
  return "the question names its answer"


def repetitions(questions: Sequence[Question]) -> set[int]:
  """Returns the numbers of questions that repeat an earlier one.

  Args:
    questions: of one video.
  """
  texts = [words(question.text) for question in questions]
  replies = [words(question.answer) for question in questions]
  repeated: set[int] = set()
  for number, question in enumerate(questions):
    for earlier in range(number):
      if earlier in repeated or questions[earlier].format != question.format:
        continue
      if (
        similarity(texts[number], texts[earlier]) >= _SAME_QUESTION
        and similarity(replies[number], replies[earlier]) >= _SAME_ANSWER
      ):
        repeated.add(number)
        break
  return repeated


class Benchmarks:
  """Finds questions and videos of benchmarks among the constructed ones.

  Attributes:
    digest: of all of it, hexadecimal.
  """

  def __init__(
    self,
    videos: Iterable[str] = (),
    questions: Iterable[tuple[str, Sequence[str]]] = (),
  ):
    """Indexes what must not be constructed.

    Args:
      videos: their ids or file names.
      questions: each with its options, () for an open one.
    """
    self._videos = {_stem_of(name) for name in videos} - {""}
    self._texts: list[tuple[frozenset[str], frozenset[str]]] = []
    content = hashlib.sha256()
    for name in sorted(self._videos):
      content.update(f"{name}\0".encode())
    for text, options in questions:
      content.update(f"{text}\1{options}\0".encode())
      own = words(text)
      self._texts.append((own, own | words(" ".join(options))))
    self.digest = content.hexdigest()
    counts = collections.Counter(w for _, whole in self._texts for w in whole)
    self._counts = counts
    self._index: dict[str, list[int]] = collections.defaultdict(list)
    for number, (own, whole) in enumerate(self._texts):
      rare = self._rarest(own, _OVERLAP) | self._rarest(whole, _OVERLAP_WHOLE)
      for word in rare:
        self._index[word].append(number)

  def _rarest(self, found: frozenset[str], share: float) -> set[str]:
    """Returns words of which any set that shares enough has one.

    Sets with a similarity of 0.7 differ in at most 3 of 10 words, so one of the
    rarest four of each is in both.
    """
    keep = len(found) - int(np.ceil(share * len(found))) + 1
    order = sorted(found, key=lambda word: (self._counts[word], word))
    return set(order[:keep])

  def has_video(self, name: str) -> bool:
    """Returns whether a file is a benchmark's video, by its name.

    An id of YouTube, 11 characters, is found anywhere in the name.
    """
    stem = _stem_of(name)
    windows = (stem[i : i + 11] for i in range(len(stem) - 10))
    return stem in self._videos or any(w in self._videos for w in windows)

  def has_question(self, question: Question) -> bool:
    """Returns whether a question is one of a benchmark, by its words."""
    own = words(question.text)
    whole = own | words(" ".join(question.options))
    rare = self._rarest(own, _OVERLAP) | self._rarest(whole, _OVERLAP_WHOLE)
    numbers = {n for word in rare for n in self._index.get(word, ())}
    for number in numbers:
      text, both = self._texts[number]
      if len(own) >= _OVERLAP_WORDS and similarity(own, text) >= _OVERLAP:
        return True
      enough = question.options and len(both) > len(text)
      if enough and similarity(whole, both) >= _OVERLAP_WHOLE:
        return True
    return False


def _stem_of(name: str) -> str:
  """Returns a file's name without folders and ending."""
  base = name.strip().rpartition("/")[2]
  stem, dot, ending = base.rpartition(".")
  return stem if dot and 2 <= len(ending) <= 4 else base


def random_of(*about: object) -> np.random.Generator:
  """Returns a generator that depends on these values alone."""
  digest = hashlib.blake2b("\0".join(map(str, about)).encode()).digest()
  return np.random.default_rng(list(digest[:16]))


def shuffle(questions: Sequence[Question], name: str) -> list[Question]:
  """Shuffles options such that each letter is right equally often.

  In every four multiple-choice questions of a video each letter is once.

  Args:
    questions: of the video.
    name: of the video, which the order depends on.
  """
  rng = random_of("options", name)
  letters = itertools.chain.from_iterable(
    rng.permutation(len(LETTERS)).tolist() for _ in itertools.count()
  )
  shuffled = []
  for question in questions:
    if question.options:
      wrong = [o for o in question.options if o != question.answer]
      wrong = [wrong[i] for i in rng.permutation(len(wrong))]
      wrong.insert(next(letters), question.answer)
      question = dataclasses.replace(question, options=tuple(wrong))
    shuffled.append(question)
  return shuffled


def read_benchmarks(paths: Sequence[str]) -> Benchmarks:
  """Reads ids of videos and questions of benchmarks.

  Args:
    paths: of text files with a name or id of a video in each line, or of
      annotation files as benchmarks publish them (.parquet, .csv, JSON).

  Raises:
    UserError: a file cannot be read, or has neither videos nor questions.
  """
  videos: list[str] = []
  questions: list[tuple[str, tuple[str, ...]]] = []
  for text in paths:
    path = pathlib.Path(text)
    if path.suffix.lower() == ".txt":
      videos += _lines(path)
      continue
    before = len(videos) + len(questions)
    columns: list[str] = []
    for row in question_tables.read_rows(path):
      if isinstance(row, dict):
        columns = columns or list(row)
        for video, question, options in _read(row):
          videos += [video] if video else []
          questions += [(question, options)] if question else []
    if len(videos) + len(questions) == before:
      raise UserError(
        f"--exclude={path}: it has neither videos ({', '.join(_VIDEOS)}) nor"
        f" questions ({', '.join(_QUESTIONS)}); its columns are"
        f" {', '.join(columns) or 'none'}"
      )
  return Benchmarks(videos, questions)


def _lines(path: pathlib.Path) -> list[str]:
  """Returns the lines of a text file that are not empty."""
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--exclude={path} cannot be read ({error})") from None
  return [line.strip() for line in lines if line.strip()]


def _read(
  row: dict[str, Any], video: str = ""
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
  """Yields video, question and options of a row and of those within it."""
  lower = {str(key).lower(): value for key, value in row.items()}

  def text(names: Sequence[str]) -> str:
    found = (lower[name] for name in names if name in lower)
    return next((str(v) for v in found if isinstance(v, str | int)), "")

  video = text(_VIDEOS).rpartition("=")[2] or video
  options: Any = next((lower[n] for n in _OPTIONS if n in lower), ())
  if isinstance(options, dict):
    options = list(options.values())
  if not isinstance(options, list | tuple):
    options = str(options).splitlines()
  yield video, text(_QUESTIONS), tuple(str(option) for option in options)
  for name in _NESTED:
    for each in (
      lower.get(name) or () if isinstance(lower.get(name), list) else ()
    ):
      if isinstance(each, dict):
        yield from _read(each, video)
