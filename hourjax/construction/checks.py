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

from hourjax.construction.answers import LETTERS, plain_option
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
_COUNTS = "zero one two three four five six seven eight nine ten eleven twelv"
_NUMBERS = frozenset(_COUNTS.split())
_HOW_MANY = re.compile(r"how (many|much|often)\b", re.IGNORECASE)
_OTHERS = re.compile(
  r"\b(all|none|both|neither|any|either) (of )?(the )?"
  r"(above|options|answers)\b"
  r"|^\W*(all|none) of (these|them)\W*$"
  r"|^\W*((both|neither|either|only) )?[A-D](, [A-D])*,? (and|or|nor) [A-D]"
  r"\W*$",
  re.IGNORECASE,
)
# Times of a video stand behind such a word; a score, a clock on the wall, the
# minutes in a recipe and years do not.
_WHEN = (
  r"\b(?:at|from|until|till|to|between|and|after|before|by|around|about|in|within"
  r"|minute|second|mark|timestamp|-|–)\s+(?:the\s+)?"
)
_CLOCK = r"(?:(?P<hours>\d{1,2}):)?(?P<minutes>\d{1,3}):(?P<seconds>[0-5]\d)\b"
_UNIT = (
  r"(?P<number>\d+(?:[.,]\d+)*)(?:st|nd|rd|th)?\s*-?\s*"
  r"(?P<unit>s|secs?|seconds?|min|mins|minutes?|h|hrs?|hours?)\b"
)
_UNIT_BEFORE = r"\b(?P<unit>second|minute|hour)s?\s+(?P<number>\d+(?:\.\d+)?)\b"
_PLACED = tuple(
  re.compile(pattern, re.IGNORECASE)
  for pattern in (_WHEN + _CLOCK, _WHEN + _UNIT, _UNIT_BEFORE)
)
_ANY = tuple(
  re.compile(p, re.IGNORECASE) for p in (_CLOCK, _UNIT, _UNIT_BEFORE)
)
# A question that is answered by times.
_ASKS_WHEN = re.compile(
  r"\b(when|how long|what time|which (moment|minute|second)|timestamp)\b",
  re.IGNORECASE,
)
_SLACK = 1.0  # seconds beyond the end that rounding explains

# Columns of benchmarks' annotation files, in lower case.
_VIDEOS = (*question_tables.NAMES["video"].split(), "videoid", "key", "url")
_QUESTIONS = question_tables.NAMES["question"].split()
_OPTIONS = question_tables.NAMES["options"].split()
_YOUTUBE = re.compile(
  r"(?:[?&]v=|youtu\.be/|/embed/|/shorts/)([\w-]{11})(?![\w-])"
)
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
  return frozenset(_word_list(text))


def _word_list(text: str) -> list[str]:
  """Returns the words that a text is about, in their order."""
  found = (match[0].lower() for match in _WORD.finditer(text))
  return [_stem(word) for word in found if word not in _STOP]


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
  plain = {plain_option(option) for option in question.options}
  if len(plain) < len(question.options):
    return "options are equal"
  if any(_OTHERS.search(option) for option in question.options):
    return "an option speaks of others"
  return None


def seconds_named(text: str, *, anywhere: bool = False) -> list[float]:
  """Returns the times of the video that a text names, in seconds.

  "At 1:30, and until minute 5, 45 minutes are on the clock" gives 90 and 300,
  and anywhere also 2,700.

  Args:
    text: the text.
    anywhere: whether times count that do not stand behind "at", "until", ...
  """
  found: set[float] = set()
  for pattern in (*_PLACED, *(_ANY if anywhere else ())):
    for match in pattern.finditer(text):
      parts = match.groupdict()
      if "seconds" in parts:
        hours, minutes = int(parts["hours"] or 0), int(parts["minutes"])
        found.add(3600 * hours + 60 * minutes + int(parts["seconds"]))
        continue
      number, unit = parts["number"].replace(",", ""), parts["unit"].lower()
      if unit == "s" and re.fullmatch(r"(1[5-9]|20)\d\d", number):
        continue  # the 1980s
      if number.count(".") < 2:
        found.add(float(number) * {"s": 1, "m": 60, "h": 3600}[unit[0]])
  return sorted(found)


def times_fault(question: Question, duration: float) -> str | None:
  """Says if a time of the video is past its end.

  Any time counts in a question about time, and in options of one that asks
  when; elsewhere those that the words before them place in the video.

  Args:
    question: the question.
    duration: of the video, in seconds.
  """
  texts = (question.text, question.answer, *question.options)
  about_time = "tempor" in f"{question.topic} {question.task}" or bool(
    _ASKS_WHEN.search(question.text)
  )
  latest = max(
    (t for text in texts for t in seconds_named(text, anywhere=about_time)),
    default=0.0,
  )
  if latest > duration + _SLACK:
    return "a time is beyond the end"
  return None


def leak_fault(question: Question) -> str | None:
  """Says if the question gives its answer away.

  It does if the answer's words are in it, in their order and side by side. A
  question that names several possible answers, of which its own is one, does
  not ("Which is first, the oven or the fridge?"), nor one that asks how many of
  a number.
  """
  text, answer = _word_list(question.text), _word_list(question.answer)
  if not answer or not _holds(text, answer):
    return None
  if question.options:
    named = [_holds(text, _word_list(option)) for option in question.options]
    if sum(named) > 1:
      return None
  elif re.search(r"\bor\b|\bthan\b", question.text, re.IGNORECASE):
    return None
  if set(answer) <= {"yes", "no", "not"}:
    return None
  asks_number = re.match(
    r"how (many|much|often)\b", question.text, re.IGNORECASE
  )
  if asks_number and all(w in _NUMBERS or w.isdigit() for w in answer):
    return None
  return "the question names its answer"


def _holds(text: Sequence[str], part: Sequence[str]) -> bool:
  """Returns whether some words stand side by side in a text."""
  count = len(part)
  return count > 0 and any(
    text[i : i + count] == part for i in range(len(text) - count + 1)
  )


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
      wrong = list(question.options)
      wrong.remove(question.answer)  # once, should another one be equal
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
        for ids, question, options in _read(row):
          videos += ids
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
  return [_video_id(line) for line in lines if line.strip()]


def _read(
  row: dict[str, Any],
) -> Iterator[tuple[list[str], str, tuple[str, ...]]]:
  """Yields videos, question and options of a row and of those within it."""
  lower = {str(key).lower(): value for key, value in row.items()}

  def text(names: Sequence[str]) -> str:
    found = (lower[name] for name in names if name in lower)
    return next((str(v) for v in found if isinstance(v, str | int)), "")

  videos = [_video_id(str(lower[n])) for n in _VIDEOS if lower.get(n)]
  # Beside an id that is nobody else's, a number of the benchmark tells nothing.
  videos = [v for v in videos if len(v) > 5] or videos
  question, *listed = re.split(r"\n\s*\(?[A-H][.):]\s*", text(_QUESTIONS))
  options: Any = next((lower[n] for n in _OPTIONS if n in lower), listed)
  if isinstance(options, dict):
    options = list(options.values())
  if not isinstance(options, list | tuple):
    options = str(options).splitlines()
  plain = (re.sub(r"^\(?[A-H][.):]\s*", "", str(each)) for each in options)
  yield videos, question, tuple(plain)
  for name in _NESTED:
    for each in (
      lower.get(name) or () if isinstance(lower.get(name), list) else ()
    ):
      if isinstance(each, dict):
        yield from _read(each)


def _video_id(text: str) -> str:
  """Returns the id in an address of YouTube; other names as they are."""
  match = _YOUTUBE.search(text)
  return match[1] if match else text.strip()
