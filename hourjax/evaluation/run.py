"""From questions to records to a report, on one process or on many.

A video is remembered once and asked its questions in batches that do not
depend on who asks them, so the answers do not either.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from hourjax import progress
from hourjax.data.frame_rules import sparse_note
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.evaluation import report
from hourjax.evaluation.exam import BATCH, Exam
from hourjax.evaluation.parsing import PARSER_VERSION, parse
from hourjax.evaluation.questions import Question
from hourjax.evaluation.records import Records, Row
from hourjax.evaluation.report import Report
from hourjax.evaluation.scoring import LeftOut, Run, is_right, score
from hourjax.inference.videos import worker_slice


@runtime_checkable
class Answer(Protocol):
  """What a memory answers; see `inference`."""

  text: str
  tokens: int
  finished: bool


@runtime_checkable
class Memory(Protocol):
  """A video that a model remembers; `note` is what is to be said of it."""

  note: str

  def answer(
    self, questions: Sequence[str], *, max_tokens: int
  ) -> Sequence[Answer]: ...


@runtime_checkable
class Model(Protocol):
  """What an evaluation needs of a model."""

  name: str

  def remember(self, video: str) -> Memory: ...

  def remember_stored(self, store: FeatureStore, video: str) -> Memory: ...


def evaluate(
  model: Model,
  exam: Exam,
  out: str | os.PathLike,
  *,
  worker: tuple[int, int] = (0, 1),
) -> Report | None:
  """Asks what is not answered yet, and reports when all of it is.

  Args:
    model: as `hourjax.load` gives it.
    exam: what to ask.
    out: folder of records and report; what an earlier call answered there
      counts. Workers share it.
    worker: (i, n): takes the videos i, i + n, ...

  Returns:
    The report, also written to `out`; None while other workers have not
    answered theirs.

  Raises:
    UserError: `out` holds another run, no such worker, or nothing could be
      asked.
    OSError: `out` cannot be written, e.g. the disk is full.
  """
  ask(model, exam, out, worker=worker)
  run = gather(exam, out, worker[1])
  if run is None:
    return None
  made = report.build({model.name: run})
  report.write(made, out)
  return made


def ask(
  model: Model,
  exam: Exam,
  out: str | os.PathLike,
  *,
  worker: tuple[int, int] = (0, 1),
) -> None:
  """Asks one worker's share of the questions; see `evaluate`."""
  index, count = worker
  batches = exam.batches()
  share = worker_slice(list(batches), index, count)
  records = Records(out, index, count)
  records.claim({"model": model.name, **_about(exam)})
  answered = records.answered()
  todo = {
    video: [
      batch
      for batch in batches[video]
      if any(item.id not in answered for item in batch)
    ]
    for video in share
  }
  total = sum(len(batch) for video in share for batch in batches[video])
  left = sum(len(batch) for video in share for batch in todo[video])
  with progress.bar(total, unit="question", desc="answer") as bar:
    bar.initial = bar.n = total - left  # the pace is that of the others
    for video, missing in todo.items():
      for rows, lost in _ask_video(model, exam, video, missing):
        records.add([row for row in rows if row["id"] not in answered])
        records.leave_out(lost)
        bar.update(len(rows) + len(lost))


def gather(
  exam: Exam, out: str | os.PathLike, workers: int | None = None
) -> Run | None:
  """Scores what all workers recorded in a folder; needs no model.

  Answers are read and judged anew, so a better parser changes the score.

  Args:
    exam: that was asked.
    out: folder of the records.
    workers: how many ask now; None if none do.

  Returns:
    The run; None while questions are neither answered nor left out.

  Raises:
    UserError: no folder of an evaluation, or other questions were asked.
  """
  records = Records(out, workers=workers)
  about = records.about()
  if about.get("questions") != exam.fingerprint():
    raise UserError(
      f"{out} holds answers to {about.get('benchmark')} version"
      f" {about.get('version')}, to other questions than those of"
      f" {exam.benchmark} version {exam.version} in --data; correct --out,"
      " --benchmark, --subtitles or --data"
    )
  answered, lost = records.answered(), records.left_out()
  scored, left_out = [], list(exam.left_out)
  for item in exam.chosen:
    if item.id in answered:
      scored.append(score(item, answered[item.id]))
    elif item.id in lost:
      left_out.append(LeftOut(item.id, item.video, lost[item.id]["reason"]))
    else:
      return None
  notes = list(exam.notes)
  if (count := len(exam.questions)) > len(exam.chosen):
    notes.append(f"The first {len(exam.chosen):,} of {count:,} questions only.")
  # As it was when they were asked: reporting again needs no feature store.
  if isinstance(sparse := about.get("sparse"), int) and sparse > 0:
    notes.append(sparse_note(sparse))
  about |= {"parser": PARSER_VERSION, "notes": notes}
  return Run(about, tuple(scored), tuple(left_out))


def check(exam: Exam, out: str | os.PathLike) -> None:
  """Finds what `ask` would refuse, as far as it shows without the model.

  Raises:
    UserError: `out` holds answers to another exam.
  """
  Records(out).check(_about(exam))


def _about(exam: Exam) -> Row:
  """What the answers depend on beside the model; see `Records.claim`."""
  return {
    "benchmark": exam.benchmark,
    "version": exam.version,
    "parser": PARSER_VERSION,
    "questions": exam.fingerprint(),
    "subtitles": exam.subtitles,
    "videos": "video files" if exam.features is None else "features",
    "frames": exam.frames,
    "sparse": exam.sparse,
    "max_tokens": exam.max_tokens,
    "batch": BATCH,
  }


def _ask_video(
  model: Model,
  exam: Exam,
  video: str,
  batches: Sequence[Sequence[Question]],
) -> Iterator[tuple[list[Row], list[Row]]]:
  """Records of each batch, and what of it could not be asked."""
  if not batches:
    return
  began = time.monotonic()
  try:
    memory = _remember(model, exam, video)
  except UserError as error:
    for batch in batches:
      yield [], [_lost(item, error) for item in batch]
    return
  if memory.note:
    print(f"{video}: {memory.note}", file=sys.stderr, flush=True)
  for batch in batches:
    answers, lost = _answers(memory, batch, exam.max_tokens)
    now = time.monotonic()
    seconds, began = round((now - began) / len(batch), 3), now
    yield [_record(*pair, seconds) for pair in answers], lost


def _remember(model: Model, exam: Exam, video: str) -> Memory:
  store = exam.features
  if store is None:
    return model.remember(str(exam.videos / video))
  if video not in store:
    raise UserError(
      f"{video} is not in the feature store {store.root}; extract it"
    )
  return model.remember_stored(store, video)


def _answers(
  memory: Memory, batch: Sequence[Question], max_tokens: int
) -> tuple[list[tuple[Question, Answer]], list[Row]]:
  """Pairs of question and answer, and the questions that cannot be asked."""
  try:
    prompts = [item.prompt for item in batch]
    answers = memory.answer(prompts, max_tokens=max_tokens)
    return list(zip(batch, answers, strict=True)), []
  except UserError as error:
    if len(batch) == 1:
      return [], [_lost(batch[0], error)]
  # One of them is at fault: each is asked alone, the others count.
  alone = [_answers(memory, [item], max_tokens) for item in batch]
  answers = [pair for pairs, _ in alone for pair in pairs]
  return answers, [row for _, rows in alone for row in rows]


def _record(item: Question, answer: Answer, seconds: float) -> dict[str, Any]:
  parsed = parse(answer.text, item)
  return {
    "id": item.id,
    "video": item.video,
    "tasks": list(item.tasks),
    "duration": item.duration,
    "prompt": item.prompt,
    "answer": answer.text,
    "parsed": parsed,
    "expected": item.expected,
    "correct": is_right(parsed, item),
    "finished": bool(answer.finished),
    "tokens": int(answer.tokens),
    "seconds": seconds,
  }


def _lost(item: Question, error: UserError) -> Row:
  return {"id": item.id, "video": item.video, "reason": str(error)}
