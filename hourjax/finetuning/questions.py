"""Rows of questions, as people write them, to checked questions.

    video,question,answer,options
    clip7,"What is it?",b,"a) a cat|b) a dog"

is, if there is a video dogs/Clip7.mp4,

    {"video": "dogs/Clip7.mp4", "gpt": "B", "facts": {...},
     "human": "What is it?
               A. a cat
               B. a dog
               Answer with the letter."}

What is read otherwise than written is counted in notes; what cannot be read is
left out with its reason. Rules that are not plain:

- A video is found by its path, its name or its name without extension, in any
  folder, whatever its case, and by the end of a path from another machine.
- An answer among options is a letter, the text of an option, or its number.
  Whether numbers begin with 0 or 1 follows from the whole table.
- A question about a part of a video begins with its times, "Between 01:05 and
  01:30: ...": the model reads the whole video, and knows seconds.
- Of several answers to one question the most frequent one counts, else the
  first. Several right options ("A, C") are an answer in words.
- A row of turns (`conversations`, LLaVA's format) stays as it is.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hourjax import progress
from hourjax.data.prepare import question_tables
from hourjax.data.prepare.question_tables import INSTRUCTION, Columns
from hourjax.data.records.record import MARKER, TURNS, parse_record
from hourjax.errors import UserError
from hourjax.evaluation.benchmarks import fields
from hourjax.evaluation.parsing import LETTERS
from hourjax.finetuning.cells import (
  answers_of,
  clock,
  meant_option,
  says_held_out,
  seconds,
  split_cell,
  text_of,
  unlabelled,
)
from hourjax.finetuning.table_rows import Rows, find_columns
from hourjax.finetuning.video_names import VideoNames

INSTRUCTION_SEVERAL = "Answer with the letters."
_SEVERAL = re.compile(r"[A-Ja-j](?:\s*(?:,|;|&|/|\+|\band\b)\s*[A-Ja-j])+")
_NUMBER = re.compile(r"\d{1,2}(?:\.0+)?")
_EXAMPLES = 3


class Skip(NamedTuple):
  """Names a row that is left out.

  Attributes:
    where: file and line.
    kind: of the reason, by which rows are counted.
    reason: a sentence.
  """

  where: str
  kind: str
  reason: str


@dataclasses.dataclass
class Questions:
  """Holds what was read of a file.

  Attributes:
    rows: number of rows of the file.
    found: questions, each as `question_tables.read_row` makes them, with
      "where", "held_out" and "start"; of LLaVA's records, with "record".
    skipped: rows that are left out.
    notes: what was read otherwise than written, a sentence each.
    missing: names of videos that are not there, and rows that name them.
  """

  rows: int
  found: list[dict[str, Any]]
  skipped: list[Skip]
  notes: list[str]
  missing: dict[str, int]

  @property
  def videos(self) -> list[str]:
    """Returns the names of the videos, each once, in order."""
    return list(dict.fromkeys(item["video"] for item in self.found))

  def counts(self) -> dict[str, tuple[int, str]]:
    """Returns kind -> (number of rows left out, the first reason)."""
    found: dict[str, tuple[int, str]] = {}
    for item in self.skipped:
      count, first = found.get(item.kind, (0, item.reason))
      found[item.kind] = count + 1, first
    return found


def read(
  rows: Rows,
  videos: VideoNames,
  *,
  columns: Columns | None = None,
  first_option: int | None = None,
) -> Questions:
  """Reads the questions of all rows.

  Args:
    rows: of the file.
    videos: that are there.
    columns: names of columns that the user has given, by role.
    first_option: number of the first option where answers are numbers; None
      finds out.

  Raises:
    UserError: a column is missing, the numbers of options cannot be told, or
      more than half of the rows cannot be used.
  """
  made = _Reader(rows, videos, columns or {}, first_option).read()
  if len(made.skipped) * 2 > made.rows:
    raise UserError(_refusal(rows, made, videos))
  return made


def _refusal(rows: Rows, made: Questions, videos: VideoNames) -> str:
  """Returns the message about a file of which most rows cannot be used."""
  counts = made.counts()
  kind = max(counts, key=lambda name: counts[name][0])
  count, first = counts[kind]
  text = (
    f"{len(made.skipped)} of {made.rows} rows of {rows.path} cannot be used,"
    f" {count} of them for the same reason: {first}"
  )
  if kind != "missing video":
    return f"{text}; correct the file, or say which columns hold what"
  names = ", ".join(map(repr, list(made.missing)[:_EXAMPLES]))
  there = ", ".join(map(repr, videos.names[:_EXAMPLES])) or "none"
  return (
    f"{len(made.missing)} videos that {rows.path} names are not there, in"
    f" {count} of {made.rows} rows: {names}, ...; the videos there are {there},"
    " ...; correct --videos, or name the column with --columns=video=NAME"
  )


class _Reader:
  """Reads one file's rows."""

  def __init__(
    self,
    rows: Rows,
    videos: VideoNames,
    columns: Columns,
    first: int | None,
  ):
    self._rows, self._videos, self._first = rows, videos, first
    self._out = Questions(len(rows.rows), [], [], list(rows.notes), {})
    self._counts: collections.Counter[str] = collections.Counter()
    tables = [
      row
      for _, row in rows.rows
      if isinstance(row, dict) and not any(key in row for key in TURNS)
    ]
    self._columns = find_columns(tables, columns, rows.path) if tables else {}
    if self._first is None:
      self._first = self._first_number(tables)

  def read(self) -> Questions:
    """Reads all rows."""
    out = self._out
    rows = self._rows.rows
    bar = progress.bar(len(rows), unit="row", desc="read questions")
    for number, (where, row) in enumerate(rows):
      if number % 100 == 0:
        bar.update(number - bar.n)
      try:
        if isinstance(row, UserError):
          raise row
        turns = any(key in row for key in TURNS)
        item = (self._record if turns else self._question)(row, where)
        out.found.append(item | {"where": where})
      except UserError as error:
        out.skipped.append(Skip(where, error.kind, str(error)))
    bar.update(len(rows) - bar.n)
    bar.close()
    out.found = list(self._merged(out.found))
    forms = {
      "answers": "{} questions have several answers; of each the most frequent"
      " or else the first counts",
      "several": "{} questions have several right options, and are answered by"
      " their letters",
      "repeated": "{} rows repeat an earlier one, and count once",
      "times": "{} questions are about a part of a video, and begin with its"
      " times",
    }
    out.notes += [
      text.format(self._counts[name])
      for name, text in forms.items()
      if self._counts[name]
    ]
    return out

  def _video(self, cell: Any, where: str) -> str:
    """Returns the name of the video that a cell means."""
    wanted = text_of(cell)
    if not wanted:
      raise UserError(
        f"{where} names no video; cells that were merged must be filled down",
        kind="no video",
      )
    found = self._videos.find(wanted)
    if found is None:
      missing = self._out.missing
      missing[wanted] = missing.get(wanted, 0) + 1
      raise UserError(
        f"{where}: there is no video {wanted!r}", kind="missing video"
      )
    return found

  def _record(self, row: dict[str, Any], where: str) -> dict[str, Any]:
    """Reads a row that is a record in LLaVA's format."""
    try:
      record = parse_record(row, where)
    except UserError as error:
      raise UserError(str(error), kind="malformed record") from None
    if record.modality != "video":
      raise UserError(
        f"{where}: record {record.id} is about {record.modality}, not about a"
        " video",
        kind="not about a video",
      )
    video = self._video(record.media[0], where)
    raw = {
      "id": record.id,
      "video": video,
      "data_source": record.source,
      "conversations": [
        {"from": turn.role, "value": turn.text} for turn in record.turns
      ],
      **record.extra,
    }
    held_out = says_held_out(record.extra.get("split"))
    return {"video": video, "record": raw, "held_out": held_out, "start": 0.0}

  def _question(self, row: dict[str, Any], where: str) -> dict[str, Any]:
    """Reads a row with a question."""

    def cell(role: str) -> Any:
      return row.get(self._columns[role][0]) if role in self._columns else None

    video = self._video(cell("video"), where)
    text = text_of(cell("question")).replace(MARKER, "").replace("<video>", "")
    stem, options = fields.split_options(text.strip())
    own = self._options(row, where)
    if any(own):
      options, stem = own, stem if options else text.strip()
    if not stem:
      raise UserError(f"{where} has no question", kind="no question")
    answers = answers_of(cell("answer"))
    if not answers:
      raise UserError(f"{where} has no answer", kind="no answer")
    facts = {k: text_of(cell(k)) for k in ("topic", "task") if cell(k)}
    begin, stem = self._timed(stem, cell, where)
    if len([option for option in options if option]) > 1:
      human, gpt, more = self._choice(stem, options, answers, where)
    else:
      if len(answers) > 1:
        self._counts["answers"] += 1
      human, gpt = stem, collections.Counter(answers).most_common(1)[0][0]
      more = {"answer": gpt, "format": question_tables.FORMATS[0]}
    return {
      "video": video,
      "source": "",
      "duration": None,
      "human": human,
      "gpt": gpt,
      "facts": facts | more,
      "held_out": says_held_out(cell("split")),
      "start": begin,
    }

  def _choice(
    self, stem: str, options: Sequence[str], answers: list[str], where: str
  ) -> tuple[str, str, dict[str, Any]]:
    """Returns both turns of a multiple-choice question, and its facts."""
    if len(answers) == 1 and _SEVERAL.fullmatch(answers[0]):
      answers = re.findall(r"\b[A-Ja-j]\b", answers[0])
    right = {self._index(answer, options, where) for answer in answers}
    # Letters of the options that are there: the third of four may be empty.
    kept = [index for index, option in enumerate(options) if option]
    texts = [options[index] for index in kept]
    letters = [LETTERS[kept.index(index)] for index in sorted(right)]
    lines = [f"{name}. {text}" for name, text in zip(LETTERS, texts)]
    asked = INSTRUCTION if len(right) == 1 else INSTRUCTION_SEVERAL
    human = "\n".join([stem, *lines, asked])
    if len(right) > 1:
      self._counts["several"] += 1
      gpt = ", ".join(letters)
      return human, gpt, {"answer": gpt, "letter": None, "format": "open"}
    facts = {
      "answer": options[min(right)],
      "options": texts,
      "letter": letters[0],
      "format": question_tables.FORMATS[1],
    }
    return human, letters[0], facts

  def _index(self, answer: str, options: Sequence[str], where: str) -> int:
    """Returns which option an answer means."""
    found = meant_option(answer, options)
    if found is None and _NUMBER.fullmatch(answer):
      found = int(float(answer)) - (self._first or 0)
    if found is None or not 0 <= found < len(options) or not options[found]:
      raise UserError(
        f"{where}: answer {answer!r:.80} is none of the options"
        f" {list(options)}",
        kind="answer is no option",
      )
    return found

  def _options(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Returns the options of a row's columns, an empty one for an empty cell.

    Without options it is empty.
    """
    names = self._columns.get("options", ())
    if len(names) > 1:
      texts = [text_of(row.get(name)) for name in names]
      while texts and not texts[-1]:
        texts.pop()
      return tuple(unlabelled(texts))
    value = row.get(names[0]) if names else None
    if value is None or not text_of(value):
      return ()
    try:
      return tuple(split_cell(value, where))
    except UserError as error:
      raise UserError(str(error), kind="options cannot be read") from None

  def _timed(self, stem: str, cell: Any, where: str) -> tuple[float, str]:
    """Returns where a question's part begins, and the question with its times.

    Raises:
      UserError: the times cannot be read, or end before they begin.
    """
    start, end = text_of(cell("start")), text_of(cell("end"))
    if not start and (span := cell("time")) not in (None, ""):
      parts = (
        span
        if isinstance(span, list)
        else re.split(
          r"\s*(?:-->|[-–—~]|\bto\b)\s*", text_of(span).strip("[]()")
        )
      )
      start, end = ([str(part).strip() for part in parts] + ["", ""])[:2]
    if not start and not end:
      return 0.0, stem
    times = [seconds(text) if text else None for text in (start or "0", end)]
    first, last = times
    if first is None or (end and (last is None or last < first)):
      raise UserError(
        f"{where}: the times {start!r} and {end!r} are no part of a video;"
        " write seconds, or m:ss, or h:mm:ss",
        kind="times cannot be read",
      )
    self._counts["times"] += 1
    if last is None or last == first:
      return first, f"At {clock(first)}: {stem}"
    return first, f"Between {clock(first)} and {clock(last)}: {stem}"

  def _first_number(self, rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Returns the number of the first option; None if no answer is a number.

    Raises:
      UserError: the table does not tell.
    """
    if "answer" not in self._columns:
      return None
    name = self._columns["answer"][0]
    found: collections.Counter[bool | None] = collections.Counter()
    for row in rows:
      answers = answers_of(row.get(name))
      if not any(_NUMBER.fullmatch(answer) for answer in answers):
        continue
      try:
        options = self._options(row, "")
      except UserError:
        continue
      for answer in answers if len(options) > 1 else ():
        if _NUMBER.fullmatch(answer) and meant_option(answer, options) is None:
          number = int(float(answer))
          # 0 is no number of a list from 1, and 4 none of four from 0.
          found[{0: True, len(options): False}.get(number)] += 1
    if not found:
      return None
    if found[True] == found[False]:
      if "idx" in name.lower() or "index" in name.lower():
        return 0
      raise UserError(
        f"{self._rows.path}: answers in column {name!r} are numbers of options,"
        " and none of them tells whether the first option is 0 or 1; add"
        " --first_option=0 or --first_option=1"
      )
    first = 0 if found[True] > found[False] else 1
    self._out.notes.append(
      f"answers are numbers of options, of which the first is {first}"
    )
    return first

  def _merged(self, found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields each question once, with its most frequent answer."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in found:
      asked = item.get("record", {}).get("conversations", item.get("human"))
      groups.setdefault(json.dumps([item["video"], asked]), []).append(item)
    for items in groups.values():
      answers = collections.Counter(item.get("gpt", "") for item in items)
      best = answers.most_common(1)[0][0]
      self._counts["repeated"] += len(items) - len(answers)
      self._counts["answers"] += len(answers) > 1
      yield next(item for item in items if item.get("gpt", "") == best)


def conversations(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns the records of questions: up to five about a video in each.

  Args:
    found: questions; all about a video are held out, or none. Records say which
      under "held_out".
  """
  groups: dict[str, list[Any]] = {}
  records = []
  for item in found:
    if "record" in item:
      records.append(item["record"] | {"held_out": item["held_out"]})
    else:
      groups.setdefault(item["video"], []).append(item)
  for items in groups.values():
    for _, record in question_tables.conversations(items):
      records.append(record | {"held_out": items[0]["held_out"]})
  return records
