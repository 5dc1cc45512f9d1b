"""Records in VideoMarathon's format, such as the demo's test records.

Files: one JSON list or JSONL of records about videos, as in training. Each
question is asked on its own, without the turns before it. The demo's records
tell more of their questions (`questions[n]`: letter, options, task, chance,
whether it is a needle), which is used where it is there. Without it a question
is multiple choice if options stand below it and the answer names one of them;
it is a yes-or-no question if the answer is yes or no; else its answer is free
text.

Prompt: the record's own question; the answer is not part of it.
"""

import dataclasses
from collections.abc import Iterator

from hourjax.data.records.files import read_records
from hourjax.data.records.record import Record
from hourjax.errors import UserError
from hourjax.evaluation.benchmarks.benchmark import Benchmark, Source
from hourjax.evaluation.benchmarks.record_questions import (
  MARKER_LINE,
  question_at,
)
from hourjax.evaluation.questions import Question
from hourjax.evaluation.scoring import LeftOut

QUESTION = "{question}"


def read(source: Source) -> list[Question | LeftOut]:
  """Makes the questions of all records.

  Their ids are the record's id, or "id#1", "id#2" where it has several
  questions.

  Args:
    source: an annotation file.

  Raises:
    UserError: all records are damaged.
  """
  records, skipped = read_records(source.file)
  if skipped and not records:
    raise UserError(
      f"{len(skipped)} of {len(skipped)} records of {source.file} are damaged,"
      f" the first: {skipped[0].reason}; repair or drop them"
    )
  items: list[Question | LeftOut] = []
  for record in records:
    items += _questions(record, source)
  return items + [
    LeftOut(item.id, source.file.name, item.reason) for item in skipped
  ]


def _questions(record: Record, source: Source) -> Iterator[Question | LeftOut]:
  """Yields the questions of a record, or a LeftOut for each that is none."""
  video = ", ".join(record.media) or source.file.name
  try:
    pairs = _pairs(record, f"{source.file.name}: question {record.id}")
  except UserError as error:
    yield LeftOut(record.id, video, str(error))
    return
  for number, (text, answer) in enumerate(pairs):
    name = f"{record.id}#{number + 1}" if len(pairs) > 1 else record.id
    at = f"{source.file.name}: question {name}"
    try:
      item = question_at(record, number, text, answer, at)
      media = source.videos.name(record.media[0])
      yield dataclasses.replace(item, id=name, video=media)
    except UserError as error:
      yield LeftOut(name, video, str(error))


def _pairs(record: Record, at: str) -> list[tuple[str, str]]:
  """Returns the questions of a record with their answers."""
  if record.modality != "video":
    raise UserError(f"{at}: is about {record.modality}, not a video; drop it")
  roles = [turn.role for turn in record.turns]
  if roles != ["human", "gpt"] * (len(roles) // 2):
    raise UserError(
      f"{at}: has the turns {', '.join(roles)}, expected human, gpt, in pairs:"
      " questions and their answers; repair or drop it"
    )
  # Texts stay as published, without the marker of the video and its newline.
  texts = [MARKER_LINE.sub("", turn.text) for turn in record.turns]
  return list(zip(texts[::2], texts[1::2], strict=True))


BENCHMARK = Benchmark(
  name="records",
  title="Records",
  revision=2,
  annotations=("test.json", "test.jsonl", "*.json", "*.jsonl"),
  columns=(frozenset({"id", "conversations"}),),
  read=read,
  prompts={"question": QUESTION},
  videos=("videos", "video"),
  max_tokens=32,
)
